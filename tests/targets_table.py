"""Writes docs/targets.md: what every kernel takes of every GPU that it is compiled for.

python tests/targets_table.py                          # compiles all of them first, which takes minutes
python tests/targets_table.py --results A.json B.json  # of tests/cross_compile.py, and of it with --tiled
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "targets.md"
NAMES = {
    **{"80": "sm_80 (A100)", "86": "sm_86 (RTX 3090)", "89": "sm_89 (L40, RTX 4090)", "90": "sm_90 (H100, H200)"},
    **{"100": "sm_100 (B200)", "120": "sm_120 (RTX 5090)"},
    **{"gfx90a": "gfx90a (MI250)", "gfx942": "gfx942 (MI300)", "gfx950": "gfx950 (MI355)"},
}
Results = Sequence[dict[str, Any]]

_TEXT = """\
# What the kernels take of each GPU

Every Triton kernel, compiled for each target without a GPU of that kind, as `tests/test_kernel_targets.py` does, which
fails where one takes more shared memory than a block may have, or spills registers and is none of the few that it
lists. Compiled is not run: the README says where the kernels have run. Made by

<!-- not run: it compiles every kernel for nine targets, which takes minutes -->
```bash
python tests/targets_table.py
```

with Triton {triton}; registers and instructions are those of its compiler, and change with it.

## Matrix instructions

{instructions}

`mma.sync` takes its operands from registers, `wgmma` the right one from shared memory, `tcgen05` both or, for the left
one, from tensor memory; `v_mfma` is AMD's, with the sizes of its tile and the dtype of its operands. With fp32
activations NVIDIA's forward products take none, so that inputs keep their mantissa: what is listed there is of
gradients, which enter as three bf16 parts.

## Kernels on the canonical layout

A cell has registers of a thread (AMD: vector registers) and KB of shared memory (AMD: LDS) of a block. Rows: the row
tile of kernels that have one, for that many rows an expert. {canonical_spills}

{canonical}

## Kernels on tiles

In bf16. {tiled_spills}

{tiled}
"""


def page(canonical: Results, tiled: Results, triton: str) -> str:
    """The text of docs/targets.md."""
    return _TEXT.format(
        triton=triton,
        instructions=instructions_table([*canonical, *tiled]),
        canonical=resources_table(canonical, ("kernel", "dtype", "rows")),
        canonical_spills=spills(canonical),
        tiled=resources_table(tiled, ("kernel",)),
        tiled_spills=spills(tiled),
    )


def instructions_table(results: Results) -> str:
    """A row for each target, a column for each dtype of activations."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))

    def used(target: str, dtype: str) -> str:
        return ", ".join(
            sorted({m for r in results if (r["target"], r["dtype"]) == (target, dtype) for m in r["matrix"]})
        )

    rows = [[NAMES[t], *(f"`{found}`" if (found := used(t, d)) else "none" for d in dtypes)] for t in _targets(results)]
    return table(["target", *dtypes], rows)


def resources_table(results: Results, case: Sequence[str]) -> str:
    """A row for each kernel and what it is compiled for, a column for each target."""
    targets = _targets(results)
    cells = {(*(r[name] for name in case), r["target"]): f"{r['registers']}, {_kb(r['shared'])}" for r in results}
    cases = list(dict.fromkeys(key[:-1] for key in cells))
    return table([*case, *targets], [[*map(str, c), *(cells.get((*c, t), "") for t in targets)] for c in cases])


def spills(results: Results) -> str:
    """How many of them spill, in words."""
    count = sum(r["spilled"] > 0 for r in results)
    return f"None of these {len(results)} spills." if not count else f"{count} of these {len(results)} spill registers."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _targets(results: Results) -> list[str]:
    return [name for name in NAMES if any(r["target"] == name for r in results)]


def _kb(size: int) -> str:
    return f"{size / 1024:.3g} K"


def _compile(*arguments: str) -> str:
    script = Path(__file__).with_name("cross_compile.py")
    return subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", nargs=2, type=Path, help="what the two runs of tests/cross_compile.py printed")
    files = parser.parse_args().results
    texts = [file.read_text() for file in files] if files else [_compile(), _compile("--tiled")]
    PAGE.write_text(page(*map(json.loads, texts), triton.__version__))


if __name__ == "__main__":
    main()
