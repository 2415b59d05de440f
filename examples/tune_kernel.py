"""Tune the kernels of a packed mixture of experts: from the debug dump of a compilation, by changing a configuration.

python examples/tune_kernel.py                    # in a temporary folder
python examples/tune_kernel.py --folder dump      # in a folder that stays, to go on by hand

On a GPU configurations are timed; without one they run in Triton's interpreter, which shows that they are right.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.kernels.tile_candidates import candidates
from fx_nvfp4.kernels.tile_config import TileConfig, target_of_device

GPU = torch.cuda.is_available()
# The interpreter is slow, and computes on the bits of bfloat16 instead of its values.
EXPERTS, TOP, HIDDEN, INNER, TOKENS = (64, 8, 1024, 512, 64) if GPU else (4, 2, 128, 64, 5)
DTYPE = torch.bfloat16 if GPU else torch.float16


class MoE(nn.Module):
    """Experts whose weights are packed, as `fx_nvfp4.load` or `quantize_` leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, dtype=DTYPE)
        self.gate_up, self.down = packed(2 * INNER, HIDDEN), packed(HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(dim=-1).topk(TOP, dim=-1)
        gate, up = torch.einsum("td,tand->tan", x, self.gate_up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tan,tadn->tad", F.silu(gate) * up, self.down[ids])
        return (y * weights.unsqueeze(-1)).sum(dim=1)


def packed(n: int, k: int) -> nn.Parameter:
    weight = NVFP4Weight.from_dense((torch.randn(EXPERTS, n, k) / k**0.5).to(DTYPE))
    return nn.Parameter(weight, requires_grad=False)


def compile_with_dump(folder: Path) -> Path:
    """Compile a model with Inductor's debug trace on; the folder with the kernels of its block."""
    device = "cuda" if GPU else "cpu"
    options = {
        # TORCH_COMPILE_DEBUG=1 in the environment does the same.
        **{"trace.enabled": True, "trace.debug_dir": str(folder)},
        # From Inductor's cache there would be no dump.
        "force_disable_caches": True,
        # Kernels for tiles run on a GPU, where weights are put into tiles anyway; here the dump alone is wanted.
        "prepack": True if GPU else "always",
    }
    compiled = torch.compile(MoE().to(device).eval(), backend="nvfp4_emu", options=options)
    compiled(torch.randn(TOKENS, HIDDEN, device=device).to(DTYPE))
    return next(folder.rglob("fx_nvfp4_kernels"))


def run(dump: Path) -> str:
    """What run.py of a dump says: that the kernels are right, and on a GPU their time."""
    command = [sys.executable, "run.py", "--tokens", str(TOKENS)]
    done = subprocess.run(command, cwd=dump, capture_output=True, text=True)
    if done.returncode:
        return f"no good: {done.stderr.strip().splitlines()[-1]}"
    return " ".join(done.stdout.split())


def set_config(dump: Path, config: TileConfig | None) -> None:
    """Change the line of run.py that says which configuration runs, as one does in an editor."""
    file = dump / "run.py"
    lines = [f"CONFIG = {config}" if line.startswith("CONFIG =") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines) + "\n")


def edit_kernel(dump: Path, old: str, new: str) -> None:
    """Change the source of the product, which is in the dump too."""
    file = dump / "kernels" / "tiled.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def tune(folder: Path, stays: bool) -> None:
    dump = compile_with_dump(folder)
    print(f"{dump}:", *sorted(f.name for f in dump.iterdir()))
    print(f"as the library chooses: {run(dump)}")

    target = target_of_device(0) if GPU else "hopper"
    default, *others = candidates(TOKENS * TOP / EXPERTS, HIDDEN, target, most=6 if GPU else 2)
    for config in others:
        set_config(dump, config)
        print(f"CONFIG = {config.text}: {run(dump)}")
    set_config(dump, None)

    # What is edited is what runs: the check of run.py finds an error.
    factor, half = "tl.constexpr(128.0)", "tl.constexpr(64.0)"
    edit_kernel(dump, factor, half)
    print(f"kernels/tiled.py with half the factor of the sum: {run(dump)}")
    edit_kernel(dump, half, factor)
    if not stays:
        print("The folder goes now: run this again with --folder to have one that stays, and")
    print(
        f"Next: edit CONFIG in run.py or the sources in kernels/, run `python run.py --tokens {TOKENS}` there,\n"
        "and carry what is faster over to fx_nvfp4/kernels/, a better default to the table in tile_config.py\n"
        f"(now {default.text}). docs/tuning.md says more."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the dump stays")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        tune((args.folder or Path(temporary)).resolve(), stays=args.folder is not None)


if __name__ == "__main__":
    main()
