"""How models choose experts: every routing of the zoo, as its source writes it.

A routing takes the module `m` (moe_zoo.MoE), logits [T, E] in fp32 and the number of experts a token, and returns
weights [T, A] in fp32 and ids [T, A].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_topk(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mixtral, Qwen3-MoE."""
    weights, ids = torch.topk(logits.softmax(dim=-1), k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def softmax_topk_raw(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """OLMoE: not normalised."""
    weights, ids = torch.topk(logits.softmax(dim=-1), k, dim=-1)
    return weights, ids


def topk_softmax(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """gpt-oss, Granite."""
    top, ids = torch.topk(logits, k, dim=-1)
    return top.softmax(dim=-1), ids


def sigmoid_bias(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 with one group, GLM-4: chosen by corrected scores, weighted by the others, scaled."""
    scores = logits.sigmoid()
    ids = torch.topk(scores + m.correction, k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, ids


def sigmoid_groups(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: top-k among the experts of the best groups."""
    scores = logits.sigmoid()
    corrected, groups = scores + m.correction, m.recipe.experts // 2
    group_scores = corrected.view(-1, groups, 2).topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(group_scores, k=(groups + 1) // 2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group_scores).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, 2).reshape(-1, m.recipe.experts)
    ids = torch.topk(corrected.masked_fill(~mask.bool(), float("-inf")), k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 1.5, ids


def sigmoid_topk(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Llama 4."""
    top, ids = torch.topk(logits, k, dim=-1)
    return top.sigmoid(), ids


def argsort_topk(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    probabilities = logits.softmax(dim=-1)
    ids = torch.argsort(probabilities, dim=-1, descending=True)[:, :k]
    return probabilities.gather(-1, ids), ids


def argmax(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Switch: one expert a token."""
    probabilities = logits.softmax(dim=-1)
    ids = probabilities.argmax(dim=-1, keepdim=True)
    return probabilities.gather(-1, ids), ids


def maximum(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(dim=-1).max(dim=-1, keepdim=True)
    return weights, ids


def repeated_argmax(m: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """GShard, NLLB: the best, then the best of the rest, by one-hot masks."""
    probabilities, found, weights = logits.softmax(dim=-1), [], []
    rest = probabilities
    for _ in range(k):
        ids = rest.argmax(dim=-1)
        hot = F.one_hot(ids, m.recipe.experts)
        found.append(ids)
        weights.append((probabilities * hot).sum(dim=-1))
        rest = rest.masked_fill(hot.bool(), float("-inf"))
    return torch.stack(weights, -1), torch.stack(found, -1)


ROUTINGS: dict[str, Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]] = {
    "softmax, top-k": softmax_topk,
    "softmax, top-k, raw": softmax_topk_raw,
    "top-k, softmax": topk_softmax,
    "sigmoid with bias": sigmoid_bias,
    "sigmoid with groups": sigmoid_groups,
    "top-k, sigmoid": sigmoid_topk,
    "argsort": argsort_topk,
    "argmax": argmax,
    "max": maximum,
    "repeated argmax": repeated_argmax,
}
TOP_1 = ("argmax", "max")
