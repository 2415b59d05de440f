"""What prepare() costs and saves: compile times of models that loop over a ModuleList of experts.

python benchmarks/bench_prepare.py
python benchmarks/bench_prepare.py --experts 16 64 --layers 8 --no-codegen

The module loops over its experts by torch.where, which traces without prepare(), if it takes long. Sizes of the
weights are small: compile time depends on the number of nodes, not on them. The second table is of whole models after
prepare(), of half as many layers and of all, with the time that prepare() itself took, and what one layer adds.
Every compilation starts from empty caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.lowering import compat

HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 64, 64, 2, 32


class Expert(nn.Module):
    """Gated MLP with packed weights."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "gate_proj": (INTERMEDIATE, HIDDEN),
            "up_proj": (INTERMEDIATE, HIDDEN),
            "down_proj": (HIDDEN, INTERMEDIATE),
        }
        for name, (n, k) in sizes.items():
            linear = nn.Linear(k, n, bias=False)
            linear.weight = nn.Parameter(NVFP4Weight.from_dense(torch.randn(n, k) * 0.1), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Router, a list of experts, and a loop over all of them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.view(-1, HIDDEN)
        weights, ids = self.gate(rows).softmax(dim=-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return hidden_states + out.view_as(hidden_states)


def model_of(layers: int, experts: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(experts) for _ in range(layers))).eval()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def compile_time(model: nn.Module, codegen: bool) -> float:
    """Seconds of the first call of the compiled model, less those of the second."""
    torch._dynamo.reset()
    x = torch.randn(1, TOKENS, HIDDEN)
    compiled = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options={"codegen": codegen})
    with torch.no_grad(), compat.without_caches(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        first, _ = timed(lambda: compiled(x))
        second, _ = timed(lambda: compiled(x))
    return first - second


def one_layer(experts: Sequence[int], codegen: bool) -> None:
    print(f"one layer, compile time\n{'experts':>8}{'as it is':>12}{'prepare()':>12}{'prepared':>12}")
    for count in experts:
        before = compile_time(model_of(1, count), codegen)
        model = model_of(1, count)
        preparing, _ = timed(lambda model=model: fx_nvfp4.prepare(model))
        after = compile_time(model, codegen)
        print(f"{count:8}{before:10.1f} s{preparing:10.1f} s{after:10.1f} s", flush=True)


def whole_model(layers: int, experts: int, codegen: bool) -> None:
    """Two sizes of one model: both times grow by the layer, and what the first layer has proven serves the others."""
    print(f"\nmodels of {experts} experts a layer, prepared")
    print(f"{'layers':>8}{'prepare()':>12}{'compile':>12}{'difference':>14}")
    times = {}
    for count in sorted({-(-layers // 2), layers}):
        model, x = model_of(count, experts), torch.randn(1, TOKENS, HIDDEN)
        with torch.no_grad():
            expected = model(x)
        preparing, _ = timed(lambda model=model: fx_nvfp4.prepare(model))
        with torch.no_grad():
            error = float((model(x) - expected).abs().max() / expected.abs().max())
        times[count] = preparing, compile_time(model, codegen)
        print(f"{count:8}{preparing:10.1f} s{times[count][1]:10.1f} s{error:14.1e}", flush=True)
    (fewer, before), (more, after) = min(times.items()), max(times.items())
    each = [(b - a) / (more - fewer) for a, b in zip(before, after, strict=True)] if more > fewer else after
    print(f"{'a layer':>8}{each[0]:10.2f} s{each[1]:10.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 32, 128], help="of one layer; the last also of the model"
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--no-codegen", action="store_true", help="without Inductor's part")
    options = parser.parse_args()
    one_layer(options.experts, not options.no_codegen)
    whole_model(options.layers, options.experts[-1], not options.no_codegen)


if __name__ == "__main__":
    main()
