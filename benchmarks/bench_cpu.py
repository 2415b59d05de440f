"""One MoE layer on the CPU: packed weights beside bf16 weights and beside dequantisation in the graph; prints a table.

    python benchmarks/bench_cpu.py [--experts 32 --hidden 1024 --inner 512 --top 4] [--tokens 1 16 256] [--threads 2]

The layer is written once, as transformers writes its grouped_mm experts, and runs with
- packed: NVFP4Weight parameters, torch.compile(backend="nvfp4_emu"), with one moe op, from C++ and from plain PyTorch,
- bf16: weights that were never quantised, eager, compiled by Inductor, and as a loop over the experts hit,
- dequantised: packed buffers that the graph dequantises, compiled by Inductor.

Every packed variant is first checked, on random data, against float64 of the exact weights. Times are milliseconds: the
minimum of many calls, variants in turn, each call with another routing of its own, so that who shares the machine
disturbs all alike; the ratios mean more than the times. `ratio` is that to the fastest bf16 variant of the same row.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight, cpu
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.cpu.library import VARIABLE

Routed = tuple[Tensor, Tensor]  # ids and weights [T, A]
ROUTINGS = 8
SLOW = 20
BF16 = ("bf16 eager", "bf16 compiled", "bf16 loop")


def layer(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, H], gate_up [E, 2 I, H], down [E, H, I] -> [T, H], by grouped products."""
    key, order = ids.reshape(-1).sort()
    offs = F.one_hot(key, gate_up.shape[0]).sum(dim=0).cumsum(dim=0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offs)
    y = torch.empty_like(y).index_copy(0, order, y).view(*ids.shape, -1)
    return (y * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)


def loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same as a loop over the experts hit."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down[e].T
        out.index_add_(0, token, y * weights[token, slot].to(y.dtype).unsqueeze(-1))
    return out


def exact(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer in float64, from weights in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ gate_up[e].T).bfloat16().chunk(2, dim=-1)
        h = (F.silu(gate.float()) * up.float()).bfloat16()
        out.index_add_(0, token, (h.double() @ down[e].T) * weights[token, slot, None].double())
    return out


class Packed(nn.Module):
    """A weight [E, N, K] as packed buffers, which forward() dequantises to bf16 by a lookup table."""

    def __init__(self, packed: NVFP4Weight) -> None:
        super().__init__()
        for name in packed.tensor_data_names:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("table", torch.tensor(nvfp4.E2M1_VALUES))

    def forward(self) -> Tensor:
        codes = torch.stack((self.qdata & 15, self.qdata >> 4), dim=-1).flatten(-2)
        scale = self.block_scale.float() * self.global_scale.unsqueeze(-1)
        return (self.table[codes.int()].unflatten(-1, (-1, nvfp4.BLOCK)) * scale.unsqueeze(-1)).flatten(-2).bfloat16()


def random_weight(experts: int, n: int, k: int) -> NVFP4Weight:
    """Quantised from normal numbers, expert by expert: scales and codes as real weights have them."""
    global_scale = torch.rand(experts, n) * 2e-4 + 1e-4
    parts = [nvfp4.quantize(torch.randn(n, k) / k**0.5, s.unsqueeze(-1)) for s in global_scale]
    qdata, block_scale = (torch.stack([p.view(torch.uint8) for p in part]) for part in zip(*parts, strict=True))
    return NVFP4Weight(qdata, block_scale.view(torch.float8_e4m3fn), global_scale)


@contextlib.contextmanager
def body(name: str) -> Iterator[None]:
    """Whether the ops run from C++ or plain PyTorch."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def variants(gate_up: NVFP4Weight, down: NVFP4Weight) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The layer in every way that is compared, as functions of x, ids and weights."""
    dense = gate_up.dequantize(), down.dequantize()
    buffers = Packed(gate_up), Packed(down)
    emulated = torch.compile(layer, backend="nvfp4_emu", dynamic=False)
    inductor = torch.compile(layer, dynamic=False)
    in_graph = torch.compile(lambda *routed: layer(*routed, buffers[0](), buffers[1]()), dynamic=False)

    def plain(*routed: Tensor) -> Tensor:
        with body("plain"):
            return emulated(*routed, gate_up, down)

    return {
        "packed C++": lambda *routed: emulated(*routed, gate_up, down),
        "packed plain": plain,
        "bf16 eager": lambda *routed: layer(*routed, *dense),
        "bf16 compiled": lambda *routed: inductor(*routed, *dense),
        "bf16 loop": lambda *routed: loop(*routed, *dense),
        "dequantised": in_graph,
    }


def minima(calls: dict[str, Callable[..., Tensor]], x: Tensor, routings: list[Routed], seconds: float) -> dict:
    """Milliseconds of the fastest call of each variant, within about so many seconds for all."""
    best = dict.fromkeys(calls, float("inf"))

    def time_once(name: str, i: int) -> None:
        start = time.perf_counter()
        calls[name](x, *routings[i % len(routings)])
        best[name] = min(best[name], (time.perf_counter() - start) * 1e3)

    for name in calls:
        for i in range(3):
            time_once(name, i)
    # Of those that are slower by far, three calls have to do, lest they take all the time.
    close = [name for name in calls if best[name] < SLOW * min(best.values())]
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for name in close:
            time_once(name, i)
        i += 1
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("experts", 32), ("hidden", 1024), ("inner", 512), ("top", 4), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    gate_up = random_weight(args.experts, 2 * args.inner, args.hidden)
    down = random_weight(args.experts, args.hidden, args.inner)
    double = [nvfp4.dequantize(w.qdata, w.block_scale, w.global_scale.unsqueeze(-1)).double() for w in (gate_up, down)]
    calls = variants(gate_up, down)
    print(f"torch {torch.__version__}, {args.threads} threads, {cpu.description()}, {args}")
    print(" ".join(f"{name:>14}" for name in ("tokens", *calls, "ratio")))
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden).bfloat16()
        scores = [torch.rand(tokens, args.experts).topk(args.top) for _ in range(ROUTINGS)]
        routings = [(s.indices, s.values / s.values.sum(dim=-1, keepdim=True)) for s in scores]
        want = exact(x, *routings[0], *double)
        for name, call in calls.items():
            error = (call(x, *routings[0]).double() - want).abs().max() / want.abs().max()
            assert error < (2e-2 if name in BF16 or name == "dequantised" else 6e-3), f"{name}: off by {error:.1e}"
        best = minima(calls, x, routings, args.seconds)
        ratio = best["packed C++"] / min(best[name] for name in BF16)
        print(" ".join([f"{tokens:>14}", *(f"{t:>14.2f}" for t in best.values()), f"{ratio:>14.2f}"]), flush=True)


if __name__ == "__main__":
    main()
