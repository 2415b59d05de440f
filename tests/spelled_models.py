"""A small MoE layer that holds packed bytes and spells its own dequantisation, in the styles models are written in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import format as nvfp4

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 64, 96, 2
# style -> the op that its products become
STYLES = {"linear": "linear", "einsum": "indexed", "batched": "indexed", "grouped": "grouped", "dense": "batched"}


def tokens(count: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(device, dtype)


class SpelledMoE(nn.Module):
    """Packed gate_up and down weights, a lookup table as a buffer, a router; `style` chooses the products."""

    def __init__(self, style: str, dtype: torch.dtype, table_entry: tuple[int, float] | None = None) -> None:
        super().__init__()
        self.style, self.dtype = style, dtype
        generator = torch.Generator().manual_seed(0)
        for name, n, k in (("up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
            dense = torch.randn(EXPERTS, n, k, generator=generator) * 0.1
            global_scale = dense.abs().amax(dim=(1, 2)) / nvfp4.TWO_LEVEL_MAX
            qdata, block_scale = nvfp4.quantize(dense, global_scale[:, None, None])
            self.register_buffer(f"{name}_qdata", qdata)
            self.register_buffer(f"{name}_scale", block_scale)
            self.register_buffer(f"{name}_global", global_scale)
        table = torch.tensor(nvfp4.E2M1_VALUES)
        if table_entry is not None:
            table[table_entry[0]] = table_entry[1]
        self.register_buffer("table", table)
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator).to(dtype))

    def weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        qdata, scale = getattr(self, f"{name}_qdata"), getattr(self, f"{name}_scale")
        codes = torch.stack((qdata & 0xF, qdata >> 4), dim=-1).flatten(-2)
        blocks = self.table[codes.int()].unflatten(-1, (-1, 16))
        scale = scale.float() * getattr(self, f"{name}_global")[:, None, None]
        return (blocks * scale.unsqueeze(-1)).flatten(-2).to(dtype or self.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = F.linear(x, self.router.to(x.dtype)).float().softmax(dim=-1)
        weights, ids = probabilities.topk(TOP_K, dim=-1)
        return weights.to(x.dtype), ids

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.style)(x, *self.route(x))

    def reference(self, x: Tensor) -> Tensor:
        """The layer's meaning in fp32, expert by expert, with the activations' own rounding between the products."""
        weights, ids = self.route(x)
        up, down = self.weight("up", torch.float32), self.weight("down", torch.float32)
        if self.style == "linear":
            return self.act(x.float() @ up[0].T).to(self.dtype).float() @ down[1].T
        out = torch.zeros_like(x, dtype=torch.float32)
        for e in range(EXPERTS):
            share = torch.where(ids == e, weights, 0).sum(dim=1, keepdim=True).float()
            out = out + share * (self.act(x.float() @ up[e].T).to(self.dtype).float() @ down[e].T)
        return out

    @staticmethod
    def act(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(x, self.weight("up")[0])), self.weight("down")[1])

    def einsum(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        h = self.act(torch.einsum("td,tand->tan", x, self.weight("up")[ids]))
        return (torch.einsum("tan,tadn->tad", h, self.weight("down")[ids]) * weights.unsqueeze(-1)).sum(dim=1)

    def batched(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, flat = x.repeat_interleave(TOP_K, dim=0), ids.reshape(-1)
        h = self.act(torch.bmm(self.weight("up")[flat], rows.unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(self.weight("down")[flat], h.unsqueeze(-1)).squeeze(-1)
        return (y.view(*ids.shape, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1)

    def grouped(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        sorted_ids, order = ids.reshape(-1).sort()
        counts = F.one_hot(sorted_ids, EXPERTS).sum(dim=0)
        offs = counts.cumsum(dim=0, dtype=torch.int32)
        h = self.act(F.grouped_mm(x[order // TOP_K], self.weight("up").transpose(1, 2), offs=offs))
        y = F.grouped_mm(h, self.weight("down").transpose(1, 2), offs=offs)
        y = torch.empty_like(y).index_copy(0, order, y)
        return (y.view(*ids.shape, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1)

    def dense(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        h = self.act(torch.bmm(x.expand(EXPERTS, *x.shape), self.weight("up").transpose(1, 2)))
        y = torch.bmm(h, self.weight("down").transpose(1, 2))
        share = torch.zeros(len(x), EXPERTS, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
        return torch.einsum("etd,te->td", y, share)
