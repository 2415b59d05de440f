"""How models lay out the products of their experts: every style of the zoo, as its source writes it.

A style takes the module `m` (moe_zoo.MoE), x [T, H], routing weights and ids [T, A], and returns [T, H].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGN = 8  # to which torchtitan's padded permutation rounds the rows of each expert


def _with_bias(y: Tensor, bias: Tensor | None, *index: Any) -> Tensor:
    return y if bias is None else y + bias[index]


def _share(m: Any, weights: Tensor, ids: Tensor) -> Tensor:
    """[T, E]: the routing weight of every expert, 0 where it is not chosen."""
    experts, form = m.recipe.experts, m.recipe.mask
    if form == "one-hot":
        return (F.one_hot(ids, experts).to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1)
    if form == "comparison":
        return torch.where(ids.unsqueeze(-1) == torch.arange(experts), weights.unsqueeze(-1), 0).sum(dim=1)
    return torch.zeros(len(ids), experts, dtype=weights.dtype).scatter(1, ids, weights)


# Experts gathered for each token


def einsum(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """gpt-fast, gpt-oss' own reference."""
    w = m.stack
    if w.recipe.stored == "rows":
        ups = [torch.einsum("td,tand->tan", x, up.chosen(ids)) for up in w.up]
    else:
        ups = [torch.einsum("td,tadn->tan", x, up.chosen(ids)) for up in w.up]
    h = w.act([_with_bias(u, b, ids) for u, b in zip(ups, w.up_biases(), strict=True)])
    down = "tan,tadn->tad" if w.recipe.stored == "rows" else "tan,tand->tad"
    y = _with_bias(torch.einsum(down, h, w.down.chosen(ids)), w.down_bias, ids)
    return torch.einsum("tad,ta->td", y, weights)


class _TransformersExperts:
    """What transformers' expert functions read from an experts module."""

    has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, m: Any) -> None:
        w, r = m.stack, m.recipe
        self.has_gate, self.has_bias, self.is_transposed = r.form != "plain", r.bias, r.stored != "rows"
        self.is_concatenated, self.num_experts = r.form == "concatenated", r.experts
        up = "gate_up_proj" if self.has_gate else "up_proj"
        setattr(self, up, w.up[0].all())
        setattr(self, f"{up}_bias", w.up_biases()[0])
        self.down_proj, self.down_proj_bias = w.down.all(), w.down_bias
        self._act = w.act

    def _apply_gate(self, y: Tensor) -> Tensor:
        return self._act([y])

    def act_fn(self, y: Tensor) -> Tensor:
        return self._act([y])


def batched_mm(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """transformers v5: its own function; packed weights are chosen by indexing what they dequantise to."""
    from transformers.integrations.moe import batched_mm_experts_forward

    return batched_mm_experts_forward(_TransformersExperts(m), x, ids, weights)


def grouped_mm(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """transformers v5: its own function."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(_TransformersExperts(m), x, ids, weights)


def batched_rows(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """One bmm batch a slot, rows as [S, 1, K] @ [S, K, N]."""
    w, flat = m.stack, ids.flatten()
    rows = x.repeat_interleave(ids.shape[1], dim=0).unsqueeze(1)
    ups = [torch.bmm(rows, up.kn(flat)).squeeze(1) for up in w.up]
    h = w.act([_with_bias(u, b, flat) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.bmm(h.unsqueeze(1), w.down.kn(flat)).squeeze(1), w.down_bias, flat)
    return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def scattered_rows(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As before, put back together by index_add."""
    w, flat = m.stack, ids.flatten()
    token = torch.arange(len(x)).repeat_interleave(ids.shape[1])
    rows = x[token].unsqueeze(-1)
    ups = [torch.matmul(up.nk(flat), rows).squeeze(-1) for up in w.up]
    h = w.act([_with_bias(u, b, flat) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.matmul(w.down.nk(flat), h.unsqueeze(-1)).squeeze(-1), w.down_bias, flat)
    return torch.zeros_like(x).index_add(0, token, (y * weights.flatten()[:, None]).to(x.dtype))


# All experts on all tokens


def dense_bmm(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """gpt-oss in transformers v4."""
    w, experts = m.stack, m.recipe.experts
    rows = x.repeat(experts, 1).view(experts, -1, x.shape[1])
    ups = [torch.bmm(rows, up.kn()) for up in w.up]
    h = w.act([_with_bias(u, b, slice(None), None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.bmm(h, w.down.kn()), w.down_bias, slice(None), None)
    return (y * _share(m, weights, ids).transpose(0, 1).unsqueeze(-1)).sum(dim=0)


def dense_matmul(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """x [T, H] broadcast against [E, H, N], and a product with the mask as the weighted sum."""
    w = m.stack
    ups = [torch.matmul(x, up.kn()) for up in w.up]
    h = w.act([_with_bias(u, b, slice(None), None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.matmul(h, w.down.kn()), w.down_bias, slice(None), None)
    return torch.matmul(_share(m, weights, ids).unsqueeze(1), y.transpose(0, 1)).squeeze(1)


def dense_einsum(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """All experts' rows in one einsum, as JAX models are ported."""
    w = m.stack
    ups = [torch.einsum("td,end->ten", x, up.nk()) for up in w.up]
    h = w.act([_with_bias(u, b, None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.einsum("ten,edn->ted", h, w.down.nk()), w.down_bias, None)
    return torch.einsum("ted,te->td", y, _share(m, weights, ids))


def llama4(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """transformers v5: the routing weight on the input, zero for experts that are not chosen."""
    w, experts = m.stack, m.recipe.experts
    rows = x.repeat(experts, 1) * _share(m, weights, ids).transpose(0, 1).reshape(-1, 1)
    rows = rows.view(experts, -1, x.shape[1])
    ups = [torch.bmm(rows, up.kn()) for up in w.up]
    h = w.act([_with_bias(u, b, slice(None), None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.bmm(h, w.down.kn()), w.down_bias, slice(None), None)
    return y.reshape(experts, -1, y.shape[-1]).sum(dim=0)


def llama4_scatter(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """transformers v4: gathered and scattered by indices that are the same for each expert."""
    w, experts = m.stack, m.recipe.experts
    index = torch.arange(len(x)).view(1, -1).expand(experts, -1).reshape(-1, 1).expand(-1, x.shape[1])
    rows = torch.gather(x, 0, index) * _share(m, weights, ids).transpose(0, 1).reshape(-1, 1)
    rows = rows.view(experts, -1, x.shape[1])
    ups = [torch.bmm(rows, up.kn()) for up in w.up]
    h = w.act([_with_bias(u, b, slice(None), None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.bmm(h, w.down.kn()), w.down_bias, slice(None), None)
    return torch.zeros_like(x).scatter_add(0, index, y.reshape(-1, y.shape[-1]))


def capacity(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """GShard, Switch: dispatch and combine by one-hot tensors [T, E, C], here with room for every token."""
    w, experts = m.stack, m.recipe.experts
    chosen = F.one_hot(ids, experts).sum(dim=1)  # [T, E]
    place = (chosen.cumsum(dim=0) - 1).masked_fill(chosen == 0, len(x))
    dispatch = (place.unsqueeze(-1) == torch.arange(len(x))).to(x.dtype)  # [T, E, C]
    rows = torch.einsum("tec,td->ecd", dispatch, x)
    ups = [torch.bmm(rows, up.kn()) for up in w.up]
    h = w.act([_with_bias(u, b, slice(None), None) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = _with_bias(torch.bmm(h, w.down.kn()), w.down_bias, slice(None), None)
    return torch.einsum("ecd,tec->td", y, dispatch * _share(m, weights, ids).unsqueeze(-1))


def stacked_loop(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A loop over the experts of stacked weights, each on every token."""
    w, share = m.stack, _share(m, weights, ids)
    out = torch.zeros_like(x)
    up, down = [u.nk() for u in w.up], w.down.nk()
    for e in range(m.recipe.experts):
        ups = [F.linear(x, u[e], None if b is None else b[e]) for u, b in zip(up, w.up_biases(), strict=True)]
        y = F.linear(w.act(ups), down[e], None if w.down_bias is None else w.down_bias[e])
        out = out + y * share[:, e : e + 1]
    return out


# Rows sorted by expert


def _grouped(m: Any, rows: Tensor, ids: Tensor, offs: Tensor) -> Tensor:
    """Both grouped products in bf16, as torchtitan computes them; ids [S] of each row for the biases."""
    w = m.stack
    ups = [F.grouped_mm(rows.bfloat16(), up.kn().bfloat16(), offs=offs) for up in w.up]
    h = w.act([_with_bias(u, b, ids) for u, b in zip(ups, w.up_biases(), strict=True)])
    y = F.grouped_mm(h.bfloat16(), w.down.kn().bfloat16(), offs=offs)
    return _with_bias(y, w.down_bias, ids).type_as(rows)


def _sorted(m: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the slots by expert, their experts, and counts."""
    order = torch.argsort(ids.reshape(-1), stable=True)
    counts = torch.histc(ids.reshape(-1).float(), bins=m.recipe.experts, min=0, max=m.recipe.experts)
    return order, ids.reshape(-1)[order], counts


def titan(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """torchtitan: gather, grouped products, scores, scatter_add."""
    order, experts, counts = _sorted(m, ids)
    index = (order // ids.shape[1]).reshape(-1, 1).expand(-1, x.shape[1])
    y = _grouped(m, torch.gather(x, 0, index), experts, counts.cumsum(0, dtype=torch.int32))
    y = (y.float() * weights.reshape(-1)[order].reshape(-1, 1)).to(x.dtype)
    return torch.zeros_like(x).scatter_add(0, index, y)


def titan_input(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """torchtitan with score_before_experts."""
    order, experts, counts = _sorted(m, ids)
    index = (order // ids.shape[1]).reshape(-1, 1).expand(-1, x.shape[1])
    rows = (torch.gather(x, 0, index).float() * weights.reshape(-1)[order].reshape(-1, 1)).to(x.dtype)
    y = _grouped(m, rows, experts, counts.cumsum(0, dtype=torch.int32))
    return torch.zeros_like(x).scatter_add(0, index, y)


def titan_unsorted(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """torchtitan, later: outputs put back in slot order, then one small product a token."""
    order, experts, counts = _sorted(m, ids)
    y = _grouped(m, x[order // ids.shape[1]], experts, counts.cumsum(0, dtype=torch.int32))
    back = torch.zeros_like(y)
    back[order] = y
    back = back.reshape(*ids.shape, -1)
    return torch.bmm(weights.float().unsqueeze(1), back.float()).squeeze(1).to(x.dtype)


def titan_padded(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """torchtitan with each expert's rows rounded up to a multiple; padding reads a row of zeros behind the others."""
    order, experts, counts = _sorted(m, ids)
    index = (order // ids.shape[1]).reshape(-1, 1).expand(-1, x.shape[1])
    rows, counts = torch.gather(x, 0, index), counts.long()
    padded = ((counts + ALIGN - 1) // ALIGN * ALIGN).clamp(min=ALIGN)
    ends = padded.cumsum(0)
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[experts]
    place = (ends - padded)[experts] + rank
    permuted = torch.full((len(rows) + m.recipe.experts * ALIGN,), -1).scatter(0, place, torch.arange(len(rows)))
    rows = torch.vstack((rows, rows.new_zeros(x.shape[1])))
    y = _grouped(m, rows[permuted], experts_of_rows(permuted, experts), ends.to(torch.int32))
    back = y.new_zeros(rows.shape)
    back[permuted] = y
    y = (back[:-1].float() * weights.reshape(-1)[order].reshape(-1, 1)).to(x.dtype)
    return torch.zeros_like(x).scatter_add(0, index, y)


def experts_of_rows(permuted: Tensor, experts: Tensor) -> Tensor:
    """Expert of each padded row; that of padding does not matter."""
    return torch.cat((experts, experts.new_zeros(1)))[permuted]


def split_sizes(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """JetMoe, Granite in transformers v4: stacked weights, rows split by counts that Python reads."""
    w, flat = m.stack, ids.flatten()
    order = flat.sort(stable=True)[1]
    sizes = F.one_hot(flat, m.recipe.experts).sum(dim=0).tolist()
    token = order // ids.shape[1]
    rows = x[token].split(sizes, dim=0)
    ups = [torch.cat([F.linear(r, w_) for r, w_ in zip(rows, up.nk(), strict=True)]) for up in w.up]
    h = w.act([_with_bias(u, b, flat[order]) for u, b in zip(ups, w.up_biases(), strict=True)]).split(sizes, dim=0)
    y = torch.cat([F.linear(r, w_) for r, w_ in zip(h, w.down.nk(), strict=True)])
    y = _with_bias(y, w.down_bias, flat[order]) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, y.to(x.dtype))


# A ModuleList of experts


def list_masked(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert on every token, times its share."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.list):
        out = out + expert(x) * (weights * (ids == e)).sum(dim=-1, keepdim=True)
    return out


def list_where(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Mixtral in transformers v4: each expert on its tokens, whose number depends on data."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, m.recipe.experts).permute(2, 1, 0)
    for e, expert in enumerate(m.list):
        slot, token = torch.where(mask[e])
        y = expert(x[None, token].reshape(-1, x.shape[1])) * weights[token, slot, None]
        out.index_add_(0, token, y.to(x.dtype))
    return out


def list_slices(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """DeepSeek's moe_infer: slices of sorted tokens by counts that Python reads."""
    counts = ids.new_zeros(len(ids), m.recipe.experts).scatter_(1, ids, 1).sum(dim=0)
    order = ids.reshape(-1).argsort(stable=True)
    rows, outputs, start = x[order // ids.shape[1]], [], 0
    for expert, count in zip(m.list, counts.tolist(), strict=True):
        outputs.append(expert(rows[start : start + count]))
        start += count
    y = torch.cat(outputs)
    back = torch.empty_like(y)
    back[order] = y
    return (back.view(*ids.shape, -1).type(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1).type(x.dtype)


def linear(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """No routing: a plain MLP of expert 0's weights, chosen by a constant."""
    w = m.stack
    ups = [F.linear(x, up.nk()[0], None if b is None else b[0]) for up, b in zip(w.up, w.up_biases(), strict=True)]
    return F.linear(w.act(ups), w.down.nk()[0], None if w.down_bias is None else w.down_bias[0])


STYLES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        *(linear, einsum, batched_mm, batched_rows, scattered_rows, grouped_mm, dense_bmm, dense_matmul, dense_einsum),
        *(llama4, llama4_scatter, capacity, stacked_loop, titan, titan_input, titan_unsorted, titan_padded),
        *(list_masked, list_where, list_slices, split_sizes),
    )
}
MODULE_LISTS = ("list_masked", "list_where", "list_slices")
LOOPS = ("stacked_loop", "split_sizes", *MODULE_LISTS)  # a product for every expert
DATA_DEPENDENT = ("list_where", "list_slices", "split_sizes")
WEIGHTED_INPUT = ("llama4", "llama4_scatter", "titan_input")
ALL_TOKENS_INPUT = ("llama4", "llama4_scatter")  # experts that are not chosen see zeros, and count if f(0) is not 0
IN_BFLOAT16 = ("titan", "titan_input", "titan_unsorted", "titan_padded")
