"""A linear layer on tiled weights, by configuration: what fills a GPU where one weight makes few programs.

    python benchmarks/bench_linear.py [--shapes 512x2048 4096x2048 2048x4096] [--rows 1 16 64 256 1024]

Microseconds of CUDA-graph replays behind a flushed cache, bfloat16, weight-only, for weights N x K: with the tiles of
an expert with so many rows, as chosen, with the fastest of all, and bf16 weights (cuBLAS). Results are compared with
fp64 products of the exact weights first, and have to be the same twice. Needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from moe_layer_parts.exact import relative_error
from torch import Tensor

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.gpu_tiled import linear
from fx_nvfp4.kernels.tile_config import TileConfig, by_load, for_rows, target_of
from fx_nvfp4.reference import Activations
from fx_nvfp4.report_table import table
from fx_nvfp4.tuning import failures, microseconds

CONFIGS = [
    TileConfig(32, 8, 8, 256, 2, 4),
    TileConfig(32, 16, 16, 256, 2, 3),
    TileConfig(64, 16, 16, 256, 4, 3),
    TileConfig(64, 16, 32, 128, 4, 4),
    TileConfig(64, 16, 64, 128, 4, 3, at_once=8),
    TileConfig(64, 16, 128, 128, 4, 3, at_once=8),
    TileConfig(128, 16, 16, 128, 4, 4),
    TileConfig(128, 16, 32, 128, 4, 4),
    TileConfig(128, 16, 64, 128, 4, 3, at_once=8),
    TileConfig(128, 16, 64, 64, 4, 4, at_once=8),
    TileConfig(128, 16, 128, 64, 4, 3, at_once=8),
]


def run(x: Tensor, weight: NVFP4Weight, config: TileConfig) -> Tensor:
    return linear(
        x, weight.qdata, weight.block_scale, weight.global_scale, Activations("none", None, "hardware"), config
    )


def measured(x: Tensor, weight: NVFP4Weight, config: TileConfig, want: Tensor) -> float | str:
    """Microseconds, or what is wrong."""
    try:
        one, other = run(x, weight, config), run(x, weight, config)
        if not torch.equal(one, other):
            return "varies"
        error = relative_error(one, want)
        return microseconds(partial(run, x, weight, config)) if error < 4e-3 else f"off by {error:.1e}"
    except failures() as error:
        return f"{type(error).__name__}: {error}"


def compile_all(x: Tensor, weight: NVFP4Weight) -> None:
    def attempt(config: TileConfig) -> None:
        with contextlib.suppress(*failures()):  # comes again, and is shown
            run(x, weight, config)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, CONFIGS))


def text(time: float | str) -> str:
    return time if isinstance(time, str) else f"{time:.1f}"


def rows_of(n: int, k: int, rows: list[int]) -> list[tuple[str, ...]]:
    dense = NVFP4Weight.from_dense(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02)
    weight, exact = dense.tiled(), dense.dequantize().double()
    plain = dense.dequantize()
    lines = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ exact.T
        compile_all(x, weight)
        usual, chosen = by_load(m, target_of(x)), for_rows(m, n, target_of(x))
        times = {c: measured(x, weight, c, want) for c in dict.fromkeys([usual, chosen, *CONFIGS])}
        right = {c: t for c, t in times.items() if isinstance(t, float)}
        if not right:
            raise RuntimeError(f"{n} x {k}, {m} rows: no configuration is right: {set(times.values())}")
        best = min(right, key=lambda c: right[c])
        cublas = microseconds(partial(torch.nn.functional.linear, x, plain))
        shown = [text(times[c]) for c in (usual, chosen, best)]
        lines.append((f"{n} x {k}", str(m), *shown, f"{cublas:.1f}", best.text))
        print(f"{n} x {k}, {m} rows: {', '.join(text(times[c]) for c in CONFIGS)}", flush=True)
    return lines


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512x2048", "4096x2048", "2048x4096"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128, 256, 1024])
    args = parser.parse_args()
    torch.manual_seed(0)
    print("\n".join(f"{i}: {config.text}" for i, config in enumerate(CONFIGS)))
    lines = [line for shape in args.shapes for line in rows_of(*map(int, shape.split("x")), args.rows)]
    header = ("N x K", "rows", "expert's us", "chosen us", "fastest us", "bf16 us", "fastest configuration")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(table([header, *lines])))


if __name__ == "__main__":
    main()
