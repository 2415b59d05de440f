"""What the pass costs at compile time, beside Dynamo, AOTAutograd and Inductor.

python benchmarks/bench_compile.py                       # 48 layers of Qwen3-30B-A3B's real sizes
python benchmarks/bench_compile.py --layers 4 --experts 8 --hidden 256 --intermediate 64
python benchmarks/bench_compile.py --style spelled --no-codegen --profile

Builds a Qwen3-MoE model whose weights are never written, so that 128 experts of 1536 x 2048 in 48 layers take no
memory; compiles it, and does not run it. Two styles: "packed" holds NVFP4Weight parameters, as fx_nvfp4.load makes
them; "spelled" holds codes and scales, and its experts dequantise by a lookup table. --no-codegen leaves Inductor's
part out, which makes the share of the pass larger than a user sees it.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.backend import collect_reports, nvfp4_emu
from fx_nvfp4.format import BLOCK, E2M1_VALUES
from fx_nvfp4.report import Report

STAGES = ("recognise", "rewrite", "activations", "lift", "verify")


class CompiledError(Exception):
    """Raised instead of running what was compiled."""


class SpelledExperts(nn.Module):
    """Routed experts that dequantise their codes in forward, with grouped products."""

    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts, self.dtype = experts, dtype
        self.register_buffer("table", torch.tensor(E2M1_VALUES))
        for name, n, k in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)):
            qdata, block_scale, global_scale = empty_parts(experts, n, k)
            self.register_buffer(f"{name}_qdata", qdata)
            self.register_buffer(f"{name}_scale", block_scale)
            self.register_buffer(f"{name}_global", global_scale[:, 0].clone())

    def weight(self, name: str) -> Tensor:
        qdata = getattr(self, f"{name}_qdata")
        codes = torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)
        scale = getattr(self, f"{name}_scale").float() * getattr(self, f"{name}_global")[:, None, None]
        return (self.table[codes.int()].unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2).to(self.dtype)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sorted_ids, order = ids.reshape(-1).sort()
        offs = F.one_hot(sorted_ids, self.experts).sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        h = F.grouped_mm(x[order // ids.shape[1]], self.weight("gate_up").transpose(1, 2), offs=offs)
        gate, up = h.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.weight("down").transpose(1, 2), offs=offs)
        y = torch.empty_like(y).index_copy(0, order, y).view(*ids.shape, -1)
        return (y * weights.to(y.dtype).unsqueeze(-1)).sum(dim=1)


def empty_parts(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """qdata, block_scale and global_scale of a weight [.., N, K]; memory is taken only when somebody writes to it."""
    *rows, k = shape
    qdata = torch.empty(*rows, k // 2, dtype=torch.uint8)
    return qdata, torch.empty(*rows, k // BLOCK, dtype=torch.float8_e4m3fn), torch.empty(rows)


def build(args: argparse.Namespace, style: str) -> nn.Module:
    """A Qwen3-MoE model without values."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=args.layers,
        num_experts=args.experts,
        num_experts_per_tok=min(8, args.experts),
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        vocab_size=1024,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 512, 1),
        head_dim=128,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        packed = parameter.dim() == 3 or (parameter.dim() == 2 and "_proj" in owner)
        value = NVFP4Weight(*empty_parts(*parameter.shape)) if packed else torch.empty_like(parameter, device="cpu")
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if style == "spelled":
        for layer in model.model.layers:
            layer.mlp.experts = SpelledExperts(args.experts, args.hidden, args.intermediate, torch.bfloat16)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    return model.eval()


def measure(args: argparse.Namespace, style: str) -> tuple[Report, float, float]:
    """(report, seconds of everything, seconds of the backend) of one compilation."""
    model, ids = build(args, style), torch.zeros(1, args.tokens, dtype=torch.long)
    seconds: list[float] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        nvfp4_emu(gm, example_inputs, options={"codegen": args.codegen, "force_disable_caches": True})
        seconds.append(time.perf_counter() - start)

        def run(*_inputs: Any) -> Any:
            raise CompiledError

        return run

    torch._dynamo.reset()
    start = time.perf_counter()
    with torch.no_grad(), collect_reports() as report, contextlib.suppress(CompiledError):
        torch.compile(model, backend=backend)(input_ids=ids, use_cache=False)
    return report, time.perf_counter() - start, sum(seconds)


def row(style: str, report: Report, total: float, backend: float) -> tuple[str, ...]:
    stages = [f"{report.cost.stages.get(stage, 0.0):.2f}" for stage in STAGES]
    each = report.seconds / max(len(report.weights), 1)
    lifted = sum(block.lifted for block in report.blocks)
    sites = f"{len(report.matched)} / {lifted} / {len(report.refused)}"
    share = f"{report.seconds / total:.1%}"
    return style, sites, *stages, f"{report.seconds:.2f}", f"{each:.4f}", f"{backend:.1f}", f"{total:.1f}", share


def main() -> None:
    args = parse_arguments()
    header = ("style", "products / blocks / refused", *STAGES, "pass s", "s a weight", "backend s", "total s", "share")
    print(f"{args.layers} layers, {args.experts} experts, {args.hidden} x {args.intermediate}, {args.tokens} tokens")
    print(" | ".join(header))
    for style in args.style:
        profile = cProfile.Profile()
        if args.profile:
            profile.enable()
        result = measure(args, style)
        profile.disable()
        print(" | ".join(row(style, *result)), flush=True)
        if args.profile:
            pstats.Stats(profile).sort_stats("cumtime").print_stats(r"/(passes|fx_nvfp4)/", 40)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", nargs="+", choices=["packed", "spelled"], default=["packed", "spelled"])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-codegen", dest="codegen", action="store_false", help="leave Inductor's lowering out")
    parser.add_argument("--profile", action="store_true", help="print where the pass spends its time")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, fx_nvfp4 {fx_nvfp4.__version__}")
    return args


if __name__ == "__main__":
    main()
