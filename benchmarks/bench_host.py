"""What a layer costs the host: Python and launches, where no CUDA graph hides them.

    python benchmarks/bench_host.py [--shape qwen3-30b] [--tokens 1 16 256] [--layers 8]

A stack of layers, each a residual, a norm, and routed experts, compiled as one graph. Per way and number of tokens, in
microseconds a layer, medians: host, until the call returns, with nothing queued before it; whole, until the GPU is
done. Ways: the op as one call; taken apart in generated code (option ``inline``); each of these with CUDA graphs, which
replay; and bf16 weights under Inductor. Results are compared with each other before they are timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from moe_layer_parts.data import random_calls, random_layer
from moe_layer_parts.exact import relative_error
from moe_layer_parts.experts import GroupedExperts, dense_weight
from moe_layer_parts.shapes import SHAPES, Shape
from torch import Tensor, nn

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.report_table import table

OURS = {"backend": "nvfp4_emu"}
WAYS: dict[str, dict[str, Any]] = {
    "op": {**OURS, "options": {"inline": False}},
    "inline": {**OURS, "options": {"inline": True}},
    "op, CUDA graph": {**OURS, "options": {"inline": False, "triton.cudagraphs": True}},
    "inline, CUDA graph": {**OURS, "options": {"inline": True, "triton.cudagraphs": True}},
    "bf16": {},
    "bf16, CUDA graph": {"options": {"triton.cudagraphs": True}},
}


class Layers(nn.Module):
    """x + experts(norm(x)), so many times, with the same routing."""

    def __init__(self, experts: list[nn.Module], hidden: int, device: torch.device) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, dtype=torch.bfloat16, device=device) for _ in experts)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for norm, experts in zip(self.norms, self.experts, strict=True):
            x = x + experts(norm(x), ids, weights)
        return x


def build(shape: Shape, layers: int, device: torch.device) -> tuple[Layers, Layers]:
    """(packed in tiles, in memory of its own for each layer; bf16, one layer's weights for all, for want of memory)."""
    layer = random_layer(shape, device)
    packed = [GroupedExperts(*map(_copied, layer.weights("w4a16", tiled=True))) for _ in range(layers)]
    dense = [dense_weight(w) for w in layer.weights("w4a16")]
    return Layers(packed, shape.hidden, device), Layers([GroupedExperts(*dense)] * layers, shape.hidden, device)


def _copied(w: NVFP4Weight) -> NVFP4Weight:
    return w.replace(qdata=w.qdata.clone(), block_scale=w.block_scale.clone())


def times(call: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """(seconds until the call returns, seconds until the GPU is done), medians."""
    host, whole = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return statistics.median(host), statistics.median(whole)


@torch.no_grad()
def measure(shape: Shape, tokens: int, models: tuple[Layers, Layers], repeats: int) -> list[tuple[str, ...]]:
    packed, dense = models
    device = packed.norms[0].weight.device
    (given,) = random_calls(shape, tokens, 1, device)
    first: Tensor | None = None
    rows = []
    for name, arguments in WAYS.items():
        torch._dynamo.reset()
        compiled = torch.compile(dense if name.startswith("bf16") else packed, fullgraph=True, **arguments)
        call = partial(compiled, *given)
        for _ in range(4):  # compiles, warms up, records
            y = call().clone()
        first = y if first is None else first
        error = relative_error(y, first.double())
        if not error < 0.05:
            raise RuntimeError(f"{name}, {tokens} tokens: {error:.2g} away from {next(iter(WAYS))}")
        host, whole = (seconds / len(packed.experts) * 1e6 for seconds in times(call, repeats))
        rows.append((str(tokens), name, f"{host:.1f}", f"{whole:.1f}", f"{error:.1e}"))
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-30b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    models = build(SHAPES[args.shape], args.layers, device)
    rows = [row for tokens in args.tokens for row in measure(SHAPES[args.shape], tokens, models, args.repeats)]
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"\n{SHAPES[args.shape].title}, {args.layers} layers, {where}")
    print("\n".join(table([("tokens", "way", "host us", "whole us", "difference"), *rows])))


if __name__ == "__main__":
    main()
