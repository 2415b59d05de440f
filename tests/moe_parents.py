"""Modules around lists of experts, in the ways that models in the wild are written: own words, their loops.

Every parent takes hidden states [B, S, H] and holds ``experts``, a list that it loops over in its own way.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 32, 48, 2
ACT_SCALE = 0.002


def packed_linear(features_in: int, features_out: int, dtype: torch.dtype, activations: str = "none", bias=False):
    """nn.Linear whose weight is packed."""
    linear = nn.Linear(features_in, features_out, bias=bias, dtype=dtype)
    scale = torch.tensor(ACT_SCALE, dtype=torch.float64) if activations == "static" else None
    weight = NVFP4Weight.from_dense(torch.randn(features_out, features_in, dtype=dtype) * 0.2, activations, scale)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class GatedMLP(nn.Module):
    """gate_proj, up_proj, down_proj and SiLU."""

    def __init__(self, dtype, activations="none", intermediate=INTERMEDIATE):
        super().__init__()
        self.gate_proj = packed_linear(HIDDEN, intermediate, dtype, activations)
        self.up_proj = packed_linear(HIDDEN, intermediate, dtype, activations)
        self.down_proj = packed_linear(intermediate, HIDDEN, dtype, activations)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedGateMLP(nn.Module):
    """One product for gate and up, whose result is split."""

    def __init__(self, dtype, activations="none"):
        super().__init__()
        self.w13 = packed_linear(HIDDEN, 2 * INTERMEDIATE, dtype, activations)
        self.w2 = packed_linear(INTERMEDIATE, HIDDEN, dtype, activations)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class PlainMLP(nn.Module):
    """Up, activation, down, with biases that may learn."""

    def __init__(self, dtype, activations="none"):
        super().__init__()
        self.fc1 = packed_linear(HIDDEN, INTERMEDIATE, dtype, activations, bias=True)
        self.fc2 = packed_linear(INTERMEDIATE, HIDDEN, dtype, activations, bias=True)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SpelledMLP(nn.Module):
    """Packed buffers and a dequantisation of its own."""

    def __init__(self, dtype, activations="none"):
        super().__init__()
        self.dtype = dtype
        for name, n, k in (("up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
            dense = torch.randn(n, k) * 0.2
            global_scale = dense.abs().amax() / nvfp4.TWO_LEVEL_MAX
            codes, scale = nvfp4.quantize(dense, global_scale)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_global", global_scale)
        self.register_buffer("table", torch.tensor(nvfp4.E2M1_VALUES))

    def weight(self, name):
        codes, scale = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale")
        values = self.table[torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).int()]
        scaled = values.unflatten(-1, (-1, 16)) * (scale.float() * getattr(self, f"{name}_global")).unsqueeze(-1)
        return scaled.flatten(-2).to(self.dtype)

    def forward(self, x):
        gate, up = F.linear(x, self.weight("up")).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weight("down"))


class Parent(nn.Module):
    """A router and a list of experts."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none", experts=EXPERTS, top_k=TOP_K):
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(HIDDEN, experts, bias=False, dtype=dtype)
        self.experts = nn.ModuleList(expert(dtype, activations) for _ in range(experts))

    def route(self, rows):
        """Softmax over all experts, the largest renormalised."""
        logits = self.gate(rows)
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return weights.to(rows.dtype), ids, logits


class ExpertHit(Parent):
    """Loops over the experts that were hit; returns the router's logits too (Mixtral and its kin in transformers 4)."""

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        rows = hidden_states.view(-1, width)
        weights, ids, logits = self.route(rows)
        out = torch.zeros((batch * length, width), dtype=rows.dtype, device=rows.device)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            y = self.experts[e](rows[None, token].reshape(-1, width)) * weights[token, slot, None]
            out.index_add_(0, token, y.to(rows.dtype))
        return out.reshape(batch, length, width), logits


class EveryExpert(Parent):
    """torch.where per expert, adding in place by advanced indexing, and a residual (mistral-inference and its kin)."""

    def forward(self, hidden_states):
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        weights, ids = self.gate(rows).topk(self.top_k)
        weights = F.softmax(weights, dim=1, dtype=torch.float).to(rows.dtype)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(rows[token])
        return hidden_states + out.view_as(hidden_states)


class StaticMasks(Parent):
    """Every expert on every token, weighed by a mask; no view of the hidden states; a shared expert to start from."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__(dtype, expert, activations)
        self.shared = expert(dtype, activations)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(dim=-1).topk(self.top_k, dim=-1)
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * ((ids == e) * weights).sum(dim=-1, keepdim=True)
        return out


class SigmoidGate(nn.Module):
    """Grouped top-k of sigmoid scores with a correction bias, renormalised and scaled (DeepSeek-V3)."""

    def __init__(self, dtype, experts=EXPERTS, top_k=TOP_K):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN, dtype=dtype))
        self.register_buffer("correction", torch.randn(experts) * 0.1)

    def forward(self, x):
        scores = F.linear(x.view(-1, x.shape[-1]).float(), self.weight.float()).sigmoid()
        choice = scores + self.correction
        groups = choice.view(len(choice), 4, -1).topk(2, dim=-1)[0].sum(dim=-1)
        kept = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=-1, sorted=False)[1], 1)
        kept = kept.unsqueeze(-1).expand(-1, -1, choice.shape[-1] // 4).reshape(len(choice), -1)
        ids = choice.masked_fill(~kept.bool(), float("-inf")).topk(self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


class SortedByNumpy(nn.Module):
    """Sorts slots by expert, counts by numpy, concatenates results (DeepSeek's own modelling code)."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__()
        self.gate = SigmoidGate(dtype)
        self.experts = nn.ModuleList(expert(dtype, activations) for _ in range(EXPERTS))
        self.shared_experts = expert(dtype, activations)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        ids, weights = self.gate(hidden_states)
        y = self.infer(hidden_states.view(-1, shape[-1]), ids, weights).view(*shape)
        return y + self.shared_experts(hidden_states)

    @torch.no_grad()
    def infer(self, x, ids, weights):
        counts = ids.new_zeros((ids.shape[0], len(self.experts))).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // ids.shape[1]], [], 0
        for e, count in enumerate(counts.cpu().numpy()):
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start += count
        sorted_outputs = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)
        unsorted = torch.empty_like(sorted_outputs)
        unsorted[order] = sorted_outputs
        weighed = unsorted.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1))
        return weighed.sum(dim=1).type(unsorted.dtype)


class CountedByTolist(nn.Module):
    """Counts by tolist, experts not chosen skipped, hidden states viewed in two dims (DeepSeek's inference)."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__()
        self.gate = SigmoidGate(dtype)
        self.experts = nn.ModuleList(expert(dtype, activations) for _ in range(EXPERTS))
        self.shared_experts = expert(dtype, activations)

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, shape[-1])
        ids, weights = self.gate(x)
        weights = weights.type_as(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        for e in range(len(self.experts)):
            if counts[e] == 0:
                continue
            token, slot = torch.where(ids == e)
            y[token] += self.experts[e](x[token]) * weights[token, slot, None]
        return (y + self.shared_experts(x)).view(shape)


class SharedExpert(Parent):
    """A shared expert behind a sigmoid gate; logits returned (Qwen2-MoE)."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__(dtype, expert, activations)
        self.shared_expert = expert(dtype, activations)
        self.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False, dtype=dtype)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        rows = hidden_states.view(-1, width)
        weights, ids, logits = self.route(rows)
        out = torch.zeros((batch * length, width), dtype=rows.dtype, device=rows.device)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slot, token = torch.where(mask[e])
            y = self.experts[e](rows[None, token].reshape(-1, width)) * weights[token, slot, None]
            out.index_add_(0, token, y.to(rows.dtype))
        out = out + F.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        return out.reshape(batch, length, width), logits


class WeighedInput(Parent):
    """Top-1, the score multiplies what the expert is given (Llama 4)."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__(dtype, expert, activations, top_k=1)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        score, choice = self.gate(rows).max(dim=-1)
        score, out = torch.sigmoid(score.float()).to(rows.dtype), torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mine = choice == e
            if mine.any():
                out[mine] = expert(rows[mine] * score[mine, None])
        return out.view(x.shape)


class TokenByToken(Parent):
    """A Python loop over tokens and slots; experts in a ModuleDict."""

    def __init__(self, dtype=torch.float32, expert=GatedMLP, activations="none"):
        super().__init__(dtype, expert, activations)
        self.experts = nn.ModuleDict({f"expert_{e}": m for e, m in enumerate(self.experts)})

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        weights, ids, _ = self.route(rows)
        out = torch.zeros_like(rows)
        for t in range(len(rows)):
            for a in range(self.top_k):
                out[t] += weights[t, a] * self.experts[f"expert_{ids[t, a].item()}"](rows[t])
        return out.view(*x.shape)


class AllExperts(Parent):
    """No choice: every expert on every token, weighed by softmax."""

    def forward(self, x):
        shares = self.gate(x).softmax(dim=-1)
        results = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (results * shares.unsqueeze(-2)).sum(dim=-1)


PARENTS = {
    cls.__name__: cls
    for cls in (
        *(ExpertHit, EveryExpert, StaticMasks, SortedByNumpy, CountedByTolist, SharedExpert, WeighedInput),
        *(TokenByToken, AllExperts),
    )
}
MLPS = {cls.__name__: cls for cls in (GatedMLP, FusedGateMLP, PlainMLP, SpelledMLP)}


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
