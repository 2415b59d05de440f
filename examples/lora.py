"""Train LoRA adapters beside frozen NVFP4 weights: gradients pass through packed products, and nothing dense is kept.

A mixture of experts is packed. Then its adapters, of the projection before the experts and of every expert, learn a
task: to give what the model would give had each of its weights another part of low rank. On a GPU it prints too how
much memory forward and backward take, beside what the weights would take dequantised.

python examples/lora.py
python examples/lora.py --device cuda --dtype bfloat16 --experts 64 --hidden 2048 --inner 768 --tokens 512
"""

import argparse
import copy
import gc
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4

EXPERTS, HIDDEN, INNER, TOP_K, RANK = 8, 64, 64, 2, 4  # unless the command line says otherwise


class LoRA(nn.Module):
    """What is added to x @ weight.T of one weight, or of the expert that each row has chosen: x @ A.T @ B.T."""

    def __init__(self, *weight_shape: int, rank: int = RANK) -> None:
        super().__init__()
        *experts, n, k = weight_shape
        self.a = nn.Parameter(torch.randn(*experts, rank, k) / math.sqrt(k))
        self.b = nn.Parameter(torch.zeros(*experts, n, rank))  # so that training begins at the frozen model

    def forward(self, x: Tensor, expert: Tensor | None = None) -> Tensor:
        if expert is None:
            return x @ self.a.T @ self.b.T
        return multiply(self.b[expert], multiply(self.a[expert], x))


def multiply(weights: Tensor, rows: Tensor) -> Tensor:
    """[S, N, K] times rows [S, K] -> [S, N]."""
    return torch.bmm(weights, rows.unsqueeze(-1)).squeeze(-1)


class Experts(nn.Module):
    """Stacked weights as transformers names them: quantize_ knows the module by its parameters."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / math.sqrt(hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) / math.sqrt(inner))

    def forward(self, x: Tensor, ids: Tensor, up_lora: LoRA, down_lora: LoRA) -> Tensor:
        """Rows x [S, K], each by the expert of its own."""
        gate, up = (multiply(self.gate_up_proj[ids], x) + up_lora(x, ids)).chunk(2, dim=-1)
        h = F.silu(gate) * up
        return multiply(self.down_proj[ids], h) + down_lora(h, ids)


class Model(nn.Module):
    def __init__(self, experts: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.proj, self.router = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, experts, bias=False)
        self.experts = Experts(experts, hidden, inner)
        self.proj_lora = LoRA(hidden, hidden)
        self.up_lora, self.down_lora = LoRA(experts, 2 * inner, hidden), LoRA(experts, hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.proj_lora(x)
        weights, ids = self.router(x).softmax(dim=-1).topk(TOP_K, dim=-1)
        rows = x.repeat_interleave(TOP_K, dim=0)
        y = self.experts(rows, ids.flatten(), self.up_lora, self.down_lora)
        return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if "lora" in name}


def build(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Model, Model]:
    """The model that is trained, packed, all but its adapters frozen; and the one that it is to become."""
    model = Model(**sizes).requires_grad_(False).to(device, dtype)
    fx_nvfp4.quantize_(model, filter_fn=lambda module, name: isinstance(module, Experts) or name == "proj")
    target = copy.deepcopy(model)
    for name, parameter in target.adapters().items():
        if name.endswith("b"):
            parameter.normal_(std=0.3)
    for parameter in model.adapters().values():
        parameter.requires_grad_()
    return model, target


def dequantized(model: Model) -> Model:
    """The same with dense weights: what training would cost without packed products, and what it must equal."""
    dense = copy.deepcopy(model)
    for owner, name in ((dense.proj, "weight"), (dense.experts, "gate_up_proj"), (dense.experts, "down_proj")):
        setattr(owner, name, nn.Parameter(getattr(owner, name).data.dequantize(), requires_grad=False))
    return dense


def gradients(run: nn.Module, model: Model, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.mse_loss(run(x), y), list(model.adapters().values())))


def train(run: nn.Module, model: Model, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Losses before each step."""
    optimizer = torch.optim.AdamW(model.adapters().values(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def peak_memory(run: nn.Module, model: Model, x: Tensor, y: Tensor) -> int:
    """Most bytes on the GPU during a step's forward and backward, beside what lies there before."""
    gradients(run, model, x, y)  # compiles
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(run, model, x, y)
    return torch.cuda.max_memory_allocated() - before


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    for name, value in (("experts", EXPERTS), ("hidden", HIDDEN), ("inner", INNER), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    sizes = {name: getattr(args, name) for name in ("experts", "hidden", "inner")}
    dtype = getattr(torch, args.dtype)
    model, target = build(args.device, dtype, **sizes)
    x = torch.randn(args.tokens, args.hidden, device=args.device, dtype=dtype)
    with torch.no_grad():
        y = target(x)
    del target
    compiled = torch.compile(model, backend="nvfp4_emu")  # forward and backward

    losses = train(compiled, model, x, y, steps=60)
    print(f"loss {losses[0]:.4f} before, {losses[-1]:.4f} after {len(losses)} steps")

    if dtype == torch.float32:  # in 16 bits a token may be routed otherwise, and the weights of the other are rounded
        dense = dequantized(model)
        pairs = zip(gradients(compiled, model, x, y), gradients(dense, dense, x, y), strict=True)
        error = max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)
        print(f"gradients: largest difference to those of the dequantised model {error:.1e} of the largest entry")
        del dense

    packed = [p.data for p in model.parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight)]
    trained = sum(p.numel() for p in model.adapters().values())
    print(f"{sum(p.numel() for p in packed):,} packed weights stayed frozen, {trained:,} trained")
    if args.device == "cuda":
        held = sum(getattr(p, part).nbytes for p in packed for part in p.tensor_data_names)
        print(f"weights: {held / 1e6:,.1f} MB packed, {sum(p.nbytes for p in packed) / 1e6:,.1f} MB dequantised")
        print(f"forward and backward beside them: {peak_memory(compiled, model, x, y) / 1e6:,.1f} MB at most")


if __name__ == "__main__":
    main()
