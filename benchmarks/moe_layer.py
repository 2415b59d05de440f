"""One MoE layer, packed and compiled by nvfp4_emu, beside its peers and beside what the device can reach at all.

    python benchmarks/moe_layer.py                                          # five models' layers, 1 to 16384 tokens
    python benchmarks/moe_layer.py --shapes qwen3-30b --tokens 1 16 64
    python benchmarks/moe_layer.py --shapes mixtral-8x7b --json r.json --plot r.png --vllm-wheel vllm-0.33.0-*.whl
    python benchmarks/moe_layer.py --saved benchmarks/results/h200.json     # what was measured before
    python benchmarks/moe_layer.py --shapes tiny --device cpu               # that it runs; its numbers mean nothing

Measured is a forward of the routed experts: gather, gate and up, SiLU, down, weighted sum; from x [T, H] in bf16,
expert ids and routing weights [T, A] on, so that sorting by expert is in the time, and the router is not. Weights are
random normal numbers, quantised; static activation scales of W4A4 differ from expert to expert, as in checkpoints.
Ours is a module in the style of transformers' grouped_mm experts that holds NVFP4Weight; a compilation that does not
lift it to one fx_nvfp4.moe op is an error. All are compiled with dynamic=True, as a model for any number of tokens is.

Before a cell is timed, its result is compared with exact products in float64, on memory that held NaN before; ours has
to give the same bits again, and as timed. How times are taken says moe_layer_parts/timing.py.

floor: the larger of (packed codes and block scales of the experts hit) / read rate, and operations / bf16 rate. Both
rates are measured at the start, and right after each cell, as warm as it left the device; the table's are the latter.
What cannot run is "-", with the reason below the table; if that is one of ours, the exit status is 1. Results are
saved after every cell.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence

import torch
from moe_layer_parts.ceilings import Ceilings
from moe_layer_parts.data import FORMATS, random_layer
from moe_layer_parts.measure import Bench, release
from moe_layer_parts.plot import save_plot
from moe_layer_parts.results import Cell, Run
from moe_layer_parts.shapes import SHAPES, Shape
from moe_layer_parts.table import render
from moe_layer_parts.variants import PEERS, Variant, ours
from moe_layer_parts.vllm_peers import add_wheels


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> Run:
    args = parse_arguments(argv)
    if args.saved:
        return show(Run.saved(args.saved), args.plot)
    torch.manual_seed(0)
    add_wheels(args.vllm_wheel)
    device = torch.device(args.device)
    ceilings = Ceilings(device)
    run = Run(device_name(device), ceilings.at_start)
    print(where(run))
    print(f"at the start: {run.at_start}")
    variants = [*map(ours, args.formats), *(PEERS[name] for name in args.peers)]
    for name in args.shapes:
        first, start = len(run.cells), time.perf_counter()
        try:
            measure_shape(SHAPES[name], variants, args, ceilings, run)
        finally:  # also what a run has that is broken off
            cells = run.cells[first:]
            print(
                f"\n{heading(SHAPES[name], cells, run)}\n{render(cells, variants)}\n"
                f"\n{time.perf_counter() - start:.0f} s",
                flush=True,
            )
        if args.plot:
            save_plot(run, args.plot)
    return run


def show(run: Run, plot: str | None) -> Run:
    """Print what was measured before."""
    print(where(run))
    known = [*map(ours, FORMATS), *PEERS.values()]
    for title in dict.fromkeys(cell.shape for cell in run.cells):
        cells = [cell for cell in run.cells if cell.shape == title]
        variants = [variant for variant in known if any(cell.variant == variant.name for cell in cells)]
        shape = next(shape for shape in SHAPES.values() if shape.title == title)
        print(f"\n{heading(shape, cells, run)}\n{render(cells, variants)}")
    if plot:
        save_plot(run, plot)
    return run


def measure_shape(
    shape: Shape, variants: Sequence[Variant], args: argparse.Namespace, ceilings: Ceilings, run: Run
) -> None:
    """Add the cells of one layer to run, and print and save them as they come."""

    def report(cell: Cell) -> None:
        run.cells.append(cell)
        print(cell, flush=True)
        if args.json:
            run.save(args.json)

    bench = Bench(random_layer(shape, ceilings.device), ceilings, args.seconds)
    for variant in variants:
        bench.cells(variant, args.tokens or list(shape.tokens), report)
    del bench
    release()


def where(run: Run) -> str:
    """The device and all versions."""
    return f"{run.device}; {', '.join(f'{k} {v}' for k, v in run.environment.items() if v)}"


def heading(shape: Shape, cells: Sequence[Cell], run: Run) -> str:
    """The layer's sizes, and what the device reached: at the start of the run, and the range between these cells."""
    sizes = f"{shape.experts} experts, top {shape.top}, hidden {shape.hidden}, intermediate {shape.intermediate}"
    rates = [cell.rates for cell in cells if cell.rates is not None]
    if not rates:
        return f"## {shape.title} ({sizes})\n"
    read, matmul = ([getattr(r, name) * 1e-12 for r in rates] for name in ("read", "matmul"))
    between = f"{min(read):.3g} to {max(read):.3g} TB/s, {min(matmul):.3g} to {max(matmul):.3g} TFLOP/s between cells"
    return f"## {shape.title} ({sizes})\n\nMicroseconds on {run.device}; {run.at_start} at the start, {between}.\n"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=real)
    parser.add_argument("--tokens", nargs="+", type=int, help="default 1 to 16384, of tiny fewer")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["w4a16", "w4a4"], help="of ours")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="none: ours alone")
    parser.add_argument("--seconds", type=float, default=0.3, help="to time a cell, at least; checks come on top")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="FILE", help="saved after every cell")
    parser.add_argument("--plot", metavar="FILE", help="roofline, drawn after every shape; needs matplotlib")
    parser.add_argument("--saved", metavar="FILE", help="measure nothing: the tables and the plot of an earlier --json")
    parser.add_argument(
        "--vllm-wheel", nargs="+", default=[], metavar="PATH", help="vLLM and what it needs: wheels, or folders"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    # What is not measured of ours is a failure; peers may be missing.
    sys.exit(any(cell.reason for cell in main().cells if cell.variant.startswith("ours")))
