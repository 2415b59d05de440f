"""A copy of the tiled kernels that runs by itself: to edit, check and time them without a model.

Before:  a routed block, by its sizes
After:   FOLDER/kernels/*.py, the kernels' sources, and FOLDER/run.py, which runs that copy on random data, compares
         with the plain block, runs twice for races, and times it
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import fx

from . import kernels
from .layouts import is_tiled
from .passes.nodes import arguments, hint, weight_shape

_README = """Kernels of fx_nvfp4 as this compilation runs them, with what they need.

Edit anything under kernels/ (tiled.py is the product, tile_config.py and CONFIG in run.py the tile sizes), then

    python run.py                 # checks against the plain block, and times; without a GPU in Triton's interpreter
    python run.py --tokens 1 64   # other counts of tokens

docs/tuning.md of fx_nvfp4 walks through it.
"""

_RUN = '''"""Runs the kernels beside this file on one routed block: correct first, then timed."""

import argparse
import dataclasses
import importlib
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import fx_nvfp4  # the plain block, which results are compared with

# The copy beside this file takes the place of the installed kernels before anything uses those.
sys.path.insert(0, str(Path(__file__).parent))
import kernels

for path in (Path(__file__).parent / "kernels").glob("*.py"):
    name = "kernels" if path.stem == "__init__" else f"kernels.{path.stem}"
    sys.modules[f"fx_nvfp4.{name}"] = importlib.import_module(name)
sys.modules["fx_nvfp4"].kernels = kernels

from fx_nvfp4 import block as plain
from fx_nvfp4 import gpu_tiled
from fx_nvfp4.activation import parse
from fx_nvfp4.block import Block, Projection
from fx_nvfp4.prepack import prepack
from fx_nvfp4.reference import Activations
from fx_nvfp4.tuning import microseconds
from kernels.tile_config import TileConfig, TileConfigs

EXPERTS, TOP, HIDDEN, INNER = @SIZES@
LAYOUT, ACTIVATION, DTYPE = @FUNCTIONS@
# None: as the library chooses for the count of tokens. One of your own:
# CONFIG = TileConfig(rows=128, smallest=16, largest=32, block_k=128, num_warps=4, num_stages=4)
CONFIG = None


def projection(n: int, k: int, device: str) -> Projection:
    qdata = torch.randint(0, 256, (EXPERTS, n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(EXPERTS, n, k // 16, device=device) + 0.25).to(torch.float8_e4m3fn)
    global_scale = (torch.rand(EXPERTS, n, device=device) + 0.5) * 0.5 / k**0.5
    return Projection(qdata, scale, global_scale, None, Activations("none", None, "hardware"))


def tiled(p: Projection) -> Projection:
    words, scales = prepack(p.qdata, p.block_scale)
    return dataclasses.replace(p, qdata=words, block_scale=scales)


def check(block: Block, packed: Block, tokens: int, device: str) -> tuple:
    x = torch.randn(tokens, HIDDEN, device=device).to(DTYPE)
    weights, ids = torch.rand(tokens, EXPERTS, device=device).topk(TOP)
    weights = weights / weights.sum(-1, keepdim=True)
    configs = None if CONFIG is None else TileConfigs(CONFIG, CONFIG)
    one, other = (gpu_tiled.moe(x, ids, weights, packed, configs) for _ in range(2))
    assert torch.equal(one, other), "two runs differ: a race"
    some = slice(0, 64)
    expected = plain.moe(x[some], ids[some], weights[some], block).double()
    error = float((one[some].double() - expected).norm() / expected.norm())
    assert error < 1e-2, f"relative error {error:.1e}"
    return (lambda: gpu_tiled.moe(x, ids, weights, packed, configs)), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=@TOKENS@)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 2 * INNER if LAYOUT in ("concatenated", "interleaved") else INNER
    up = tuple(projection(rows, HIDDEN, device) for _ in range(2 if LAYOUT == "separate" else 1))
    block = Block(up, projection(HIDDEN, INNER, device), parse(ACTIVATION), LAYOUT, "output")
    packed = dataclasses.replace(block, up=tuple(map(tiled, up)), down=tiled(block.down))
    for tokens in args.tokens:
        call, error = check(block, packed, tokens, device)
        time = f"{microseconds(call, repeats=30):9.1f} us" if device == "cuda" else "right; timed on a GPU only"
        print(f"{tokens:6} tokens  relative error {error:.1e}  {time}")


if __name__ == "__main__":
    main()
'''


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What run.py is about."""

    experts: int
    top: int
    hidden: int
    inner: int
    layout: str
    activation: str
    dtype: str
    tokens: int


def dump(folder: Path, sizes: Sizes) -> None:
    """Write the copy into a folder, which is made; what is in it already stays, as somebody may have edited it."""
    source, target = Path(kernels.__file__).parent, folder / "kernels"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.txt").write_text(_README)
    (folder / "run.py").write_text(_filled(sizes))


def _filled(s: Sizes) -> str:
    values = {
        "@SIZES@": f"{s.experts}, {s.top}, {s.hidden}, {s.inner}",
        "@FUNCTIONS@": f"{s.layout!r}, {s.activation!r}, torch.{s.dtype}",
        "@TOKENS@": repr(sorted({1, 16, 256, s.tokens})),
    }
    text = _RUN
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def sizes_of(graph: fx.Graph) -> Sizes | None:
    """Of the first block of a graph whose weights are in tiles; None if there is none."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.fx_nvfp4.moe.default):
        a = arguments(node)
        if not is_tiled(a.down_qdata.meta["val"]):
            continue
        experts, hidden, inner = map(hint, weight_shape(a.down_qdata))
        tokens, top = map(hint, a.ids.meta["val"].shape)
        dtype = str(a.x.meta["val"].dtype).removeprefix("torch.")
        return Sizes(experts, top, hidden, inner, a.layout, a.activation, dtype, tokens)
    return None
