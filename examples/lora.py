"""Train LoRA adapters beside frozen NVFP4 weights: gradients pass through packed products, and nothing dense is kept.

A small mixture of experts is packed. Then its adapters, of the projection before the experts and of every expert, learn
a task: to give what the model would give had each of its weights another part of low rank.

python examples/lora.py
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4

EXPERTS, HIDDEN, INNER, TOP_K, RANK = 8, 64, 64, 2, 4


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

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / math.sqrt(HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / math.sqrt(INNER))

    def forward(self, x: Tensor, ids: Tensor, up_lora: LoRA, down_lora: LoRA) -> Tensor:
        """Rows x [S, K], each by the expert of its own."""
        gate, up = (multiply(self.gate_up_proj[ids], x) + up_lora(x, ids)).chunk(2, dim=-1)
        h = F.silu(gate) * up
        return multiply(self.down_proj[ids], h) + down_lora(h, ids)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.router = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.proj_lora = LoRA(HIDDEN, HIDDEN)
        self.up_lora, self.down_lora = LoRA(EXPERTS, 2 * INNER, HIDDEN), LoRA(EXPERTS, HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.proj_lora(x)
        weights, ids = self.router(x).softmax(dim=-1).topk(TOP_K, dim=-1)
        rows = x.repeat_interleave(TOP_K, dim=0)
        y = self.experts(rows, ids.flatten(), self.up_lora, self.down_lora)
        return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if "lora" in name}


def build() -> tuple[Model, Model]:
    """The model that is trained, packed, all but its adapters frozen; and the one that it is to become."""
    model = Model().requires_grad_(False)
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


def main() -> None:
    torch.manual_seed(0)
    model, target = build()
    x = torch.randn(256, HIDDEN)
    y = target(x)
    compiled = torch.compile(model, backend="nvfp4_emu")  # forward and backward

    losses = train(compiled, model, x, y, steps=60)
    print(f"loss {losses[0]:.4f} before, {losses[-1]:.4f} after {len(losses)} steps")

    dense = dequantized(model)
    pairs = zip(gradients(compiled, model, x, y), gradients(dense, dense, x, y), strict=True)
    error = max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)
    print(f"gradients: largest difference to those of the dequantised model {error:.1e} of the largest entry")

    packed = sum(p.numel() for p in model.parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight))
    print(f"{packed:,} packed weights stayed frozen, {sum(p.numel() for p in model.adapters().values()):,} trained")


if __name__ == "__main__":
    main()
