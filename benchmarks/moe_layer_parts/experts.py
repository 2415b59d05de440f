"""The layer as a module, written as transformers writes its grouped_mm experts; three ways to hold the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.format import BLOCK, E2M1_VALUES, dequantize


class GroupedExperts(nn.Module):
    """Routed experts, SiLU-gated, from grouped products; the weights are packed, or dense and bf16."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj, self.down_proj

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids and weights [T, A] -> [T, H]."""
        gate_up, down = self.weights()
        expert, perm = torch.sort(ids.reshape(-1))
        # histc counts without a synchronisation; integers on a GPU, floats on a CPU, are what it takes.
        countable = expert.float() if x.device.type == "cpu" else expert.int()
        counts = torch.histc(countable, bins=down.shape[0], min=0, max=down.shape[0] - 1)
        offs = counts.cumsum(dim=0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[perm // ids.shape[1]], gate_up.transpose(-2, -1), offs=offs).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offs)
        y = y * weights.reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
        return y[inverse].view(*ids.shape, -1).sum(dim=1).to(x.dtype)


class SpelledExperts(GroupedExperts):
    """The same, dequantising all experts in the graph, by a table of the 16 codes."""

    table: Tensor

    def __init__(self, gate_up: NVFP4Weight, down: NVFP4Weight) -> None:
        nn.Module.__init__(self)
        for name, w in (("gate_up", gate_up), ("down", down)):
            for part in w.tensor_data_names:
                self.register_buffer(f"{name}_{part}", getattr(w, part))
        self.register_buffer("table", torch.tensor(E2M1_VALUES, device=gate_up.device))

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.dense("gate_up"), self.dense("down")

    def dense(self, name: str) -> Tensor:
        qdata = getattr(self, f"{name}_qdata")
        codes = torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)
        scale = getattr(self, f"{name}_block_scale").float() * getattr(self, f"{name}_global_scale").unsqueeze(-1)
        return (self.table[codes.int()].unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2).bfloat16()


def dense_weight(w: NVFP4Weight) -> Tensor:
    """The weights [E, N, K] in bf16, dequantised expert by expert."""
    dense = torch.empty(w.shape, dtype=torch.bfloat16, device=w.device)
    for e in range(len(dense)):
        block_scale = w.block_scale.view(torch.uint8)[e].view(torch.float8_e4m3fn)
        dense[e] = dequantize(w.qdata[e], block_scale, w.global_scale[e].unsqueeze(-1), torch.bfloat16)
    return dense
