"""A small routed model that holds packed weights, as torch.compile, torch.export and AOTInductor are to meet one."""

import torch
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.fused import FusedExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, HIDDEN, INTERMEDIATE, OUT, TOP_K = 4, 64, 64, 32, 2


def tokens(count, seed=0):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed + count)).to(DEVICE)


def packed(*shape, seed, activations="none"):
    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    return NVFP4Weight.from_dense(dense, activations)


class Routed(nn.Module):
    """A dense router, one fused block of experts and a packed linear layer, in float32."""

    def __init__(self, activations="none"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator))
        shapes = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN)}
        shapes["down_proj"] = (HIDDEN, INTERMEDIATE)
        weights = {n: packed(EXPERTS, *s, seed=i, activations=activations) for i, (n, s) in enumerate(shapes.items())}
        self.experts = FusedExperts(weights, {}, "silu(g) * u", "separate")
        self.head = nn.Linear(HIDDEN, OUT)
        nn.init.ones_(self.head.bias)
        head = packed(OUT, HIDDEN, seed=9, activations=activations)
        self.head.weight = nn.Parameter(head, requires_grad=False)
        self.to(DEVICE)

    def route(self, x):
        return F.linear(x, self.router).softmax(dim=-1).topk(TOP_K, dim=-1)

    def forward(self, x, ids=None):
        shares, chosen = self.route(x)
        return self.head(x + self.experts(x, chosen if ids is None else ids, shares))

    def reference(self, x, ids=None):
        """The same from dense weights, every expert on every token; of weights alone, without activations rounded."""
        shares, chosen = self.route(x)
        chosen = chosen if ids is None else ids
        gate, up, down = (getattr(self.experts, n).dequantize() for n in ("gate_proj", "up_proj", "down_proj"))
        total = x
        for e in range(EXPERTS):
            y = F.linear(F.silu(F.linear(x, gate[e])) * F.linear(x, up[e]), down[e])
            total = total + torch.where(chosen == e, shares, 0).sum(dim=1, keepdim=True) * y
        return F.linear(total, self.head.weight.dequantize(), self.head.bias)
