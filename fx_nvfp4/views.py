"""Views of a packed weight: they stay packed, and say only what is shown.

einsum, matmul and models permute, merge, split, repeat and choose before they multiply. K is never split, but for
slices of whole blocks; rows may be sliced with any step, split into groups, or gathered. Experts are chosen lazily.

No view is marked as an alias of its base, whose storage holds nothing: a compiled graph that returns one would ask
for it by strides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.utils import fill_defaults

from .format import BLOCK
from .layouts import is_tiled
from .parts import as_bytes, map_parts, of_lead, rows_each
from .prepack import TILE_K, TILE_ROWS
from .regroup import regroup
from .tensor import NVFP4Weight, unsupported

aten = torch.ops.aten
implements = NVFP4Weight.implements


# The same numbers in other dims


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _permute(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w = args[0]
    order = list(range(w.dim()))
    if func is aten.permute.default:
        order = [d % w.dim() for d in args[1]]
    elif w.dim() > 1:
        a, b = (d % w.dim() for d in args[1:3]) if func is aten.transpose.int else (0, 1)
        order[a], order[b] = b, a
    return w.show([w.dims[d] for d in order])


@implements([aten.unsqueeze.default])
def _unsqueeze(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim = args
    at = dim % (w.dim() + 1)
    return w.show([*w.dims[:at], (), *w.dims[at:]])


@implements([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims])
def _squeeze(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, given = fill_defaults(args, 2, [range(args[0].dim())])
    asked = {d % w.dim() for d in ([given] if isinstance(given, int) else given)}
    kept = [merged for d, merged in enumerate(w.dims) if d not in asked or w.shape[d] != 1]
    return w.show(kept)


@implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default])
def _reshape(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    return regroup(func, *args[:2])


@implements([aten.expand.default])
def _expand(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    """Repeated dims repeat the choice of experts."""
    w, asked = args[:2]
    new = len(asked) - w.dim()
    shown = [(), *w.dims] if new == 1 else [*([()] * new), *w.dims]
    shape = [1] * new + list(w.shape)
    repeats = [(d, size) for d, size in enumerate(asked) if not (isinstance(size, int) and size == -1)]
    repeats = [(d, size) for d, size in repeats if size != shape[d]]
    if any(shape[d] != 1 or shown[d] for d, _ in repeats):
        raise unsupported(func, w, f"expanded to {list(asked)}, which repeats dims that hold something")
    if not repeats:
        return w.show(shown)
    count = len(repeats)
    dims = [tuple(a + count for a in merged) for merged in shown]
    for i, (d, _) in enumerate(repeats):
        dims[d] = (i,)
    ids = w.ids().expand(*(size for _, size in repeats), *w.lead)
    return _as_experts(w).show(dims, expert_ids=ids)


# Experts


@implements([aten.index.Tensor])
def _index(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, indices = args
    used = [d for d, index in enumerate(indices) if index is not None]
    if len(used) == 1 and w.dims[used[0]] == (len(w.lead),):
        return _gather_rows(func, w, used[0], indices[used[0]])
    return _choose(func, w, indices)


@implements([aten.index_select.default])
def _index_select(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, index = args
    dim %= w.dim()
    if w.dims[dim] == (len(w.lead),):
        return _gather_rows(func, w, dim, index)
    return _choose(func, w, [*[None] * dim, index])


def _choose(func: Any, w: NVFP4Weight, indices: Sequence[Tensor | None]) -> NVFP4Weight:
    """experts[indices] without gathering: the product gathers."""
    lead = len(w.lead)
    order = [merged[0] if len(merged) == 1 else -1 for merged in w.dims[:lead]]
    if len(indices) > lead or sorted(order) != list(range(lead)):
        raise unsupported(func, w, "indexed along dims that are not experts; only experts or rows can be indexed")
    if w.expert_ids is None and lead == 1 and indices[0] is not None and indices[0].dtype != torch.bool:
        # Indexing counts negative ids from the end; for the ops they belong to nobody.
        ids = torch.where(indices[0] < 0, indices[0] + w.lead[0], indices[0])
    else:
        ids = aten.index.Tensor(w.ids().permute(order), list(indices))
    shift = ids.dim() - lead
    dims = [*((d,) for d in range(ids.dim())), *(tuple(a + shift for a in merged) for merged in w.dims[lead:])]
    return _as_experts(w).show(dims, expert_ids=ids)


def _as_experts(w: NVFP4Weight) -> NVFP4Weight:
    """w with its stored leading dims as one, which expert ids count."""
    if w.expert_ids is not None or len(w.stored) == 1:
        return w
    scale = w.act_scale
    scale = scale.reshape(-1) if scale is not None and scale.dim() else scale
    return map_parts(w, lambda t: t.reshape(-1, *t.shape[len(w.lead) :]), ((0,), (1,), (2,)), scale)


def _gather_rows(func: Any, w: NVFP4Weight, dim: int, index: Tensor) -> NVFP4Weight:
    """Rows in another order: codes and scales move, at each call."""
    w = w.canonical()
    rows = len(w.stored)
    if index.dim() != 1:
        raise unsupported(
            func, w, f"rows along dim {dim} indexed with {list(index.shape)}, only a list of rows is served"
        )
    return map_parts(w, lambda t: aten.index.Tensor(t, [*[None] * rows, index]), w.dims, w.act_scale)


@implements([aten.select.int])
def _select(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, index = args
    dim %= w.dim()
    kept = [merged for d, merged in enumerate(w.dims) if d != dim]
    if not w.dims[dim]:
        return w.show(kept)
    a = _single(func, w, dim)
    if a == len(w.lead) + 1:
        raise unsupported(func, w, "one element of K selected; only experts and rows can be")
    if a == len(w.lead):
        row = index + w.sizes[a] if index < 0 else index
        return map_parts(w.canonical(), lambda t: t.narrow(len(w.stored), row, 1), kept, w.act_scale)
    dims = [tuple(b - (b > a) for b in merged) for merged in kept]
    return of_lead(w, dims, lambda t: t.select(a, index))


@implements([aten.unbind.int])
def _unbind(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, dim = fill_defaults(args, 2, [0])
    return [aten.select.int(w, dim, i) for i in range(w.shape[dim])]


# Parts


@implements([aten.slice.Tensor])
def _slice(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    dim %= w.dim()
    if start in (None, 0) and (end is None or end >= w.shape[dim]) and step == 1:
        return w.show(w.dims)
    a = _single(func, w, dim)
    if a == len(w.lead) + 1:
        cut = _slice_blocks(func, w, start, end, step)
    elif a == len(w.lead):
        cut = _slice_rows(w, start, end, step)
    else:
        cut = of_lead(w, w.dims, lambda t: aten.slice.Tensor(t, a, start, end, step))
    return cut


def _slice_rows(w: NVFP4Weight, start: int | None, end: int | None, step: int) -> NVFP4Weight:
    """Whole tiles stay tiles; other rows are unpacked from them, at each call."""
    rows = len(w.stored)
    if not is_tiled(w.qdata):
        return map_parts(w, lambda t: aten.slice.Tensor(t, rows, start, end, step), w.dims, w.act_scale)
    first, last, _ = slice(start, end).indices(w.sizes[-2])
    if step != 1 or first % TILE_ROWS or last % TILE_ROWS:
        return _slice_rows(w.canonical(), start, end, step)

    def cut(part: Tensor) -> Tensor:
        each = rows_each(w, part)
        return part.narrow(rows, first // each, max(last - first, 0) // each)

    return map_parts(w, cut, w.dims, w.act_scale)


def _slice_blocks(func: Any, w: NVFP4Weight, start: int | None, end: int | None, step: int) -> NVFP4Weight:
    """Whole blocks of K."""
    start, end, _ = slice(start, end).indices(w.sizes[-1])
    end = max(start, end)
    if step != 1 or start % BLOCK or end % BLOCK:
        raise unsupported(func, w, f"K sliced {start}:{end}:{step}, only whole blocks of {BLOCK} can be cut out")
    if is_tiled(w.qdata):
        if start % TILE_K or end % TILE_K:
            return _slice_blocks(func, w.canonical(), start, end, step)
        words, scales = (t.narrow(-3, start // TILE_K, (end - start) // TILE_K) for t in (w.qdata, w.block_scale))
        return w.replace(qdata=words, block_scale=scales)
    scale = as_bytes(w.block_scale, lambda t: t[..., start // BLOCK : end // BLOCK])
    return w.replace(qdata=w.qdata[..., start // 2 : end // 2], block_scale=scale)


@implements([aten.split.Tensor, aten.unsafe_split.Tensor])
def _split(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, size, dim = fill_defaults(args, 3, [kwargs.get("dim", 0)])
    return [aten.slice.Tensor(w, dim, start, start + size) for start in range(0, w.shape[dim], size)]


@implements([aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default])
def _split_with_sizes(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, sizes, dim = fill_defaults(args, 3, [kwargs.get("dim", 0)])
    ends = list(itertools.accumulate(sizes))
    return [aten.slice.Tensor(w, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _single(func: Any, w: NVFP4Weight, dim: int) -> int:
    """The one dim of [.., N, K] that a shown dim is."""
    merged = w.dims[dim]
    if len(merged) != 1:
        found = "merges several" if merged else "holds nothing"
        raise unsupported(func, w, f"taken apart along dim {dim}, which {found}; reshape after taking it apart")
    return merged[0]


# Several weights as one; their parts are copied, at each call


@implements([aten.stack.default])
def _stack(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    weights, dim = fill_defaults(args, 2, [kwargs.get("dim", 0)])
    _check_alike(func, weights)
    at = dim % (weights[0].dim() + 1)
    dims = [tuple(a + 1 for a in merged) for merged in weights[0].dims]
    dims.insert(at, (0,))
    return aten.cat.default([_with_lead(w, dims) for w in weights], at)


def _with_lead(w: NVFP4Weight, dims: list[tuple[int, ...]]) -> NVFP4Weight:
    """w as one of several experts; each brings its activation scale."""
    scale = None if w.act_scale is None else w.act_scale.expand(w.lead).unsqueeze(0)
    return map_parts(w, lambda t: t.unsqueeze(0), dims, scale)


@implements([aten.cat.default])
def _cat(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    weights, dim = fill_defaults(args, 2, [kwargs.get("dim", 0)])
    _check_alike(func, weights)
    if len({is_tiled(w.qdata) for w in weights}) > 1:
        weights = [w.canonical() for w in weights]
    first = weights[0]
    at = _single(func, first, dim % first.dim())
    if at == len(first.lead) + 1 or (at == len(first.lead) and first.act_scale is not None):
        raise unsupported(func, first, f"joined along dim {dim}: experts can be, and rows without static activations")
    scales = [w.act_scale.expand(w.lead) for w in weights if w.act_scale is not None]
    bytes_ = torch.cat([w.block_scale.view(torch.uint8) for w in weights], at)
    return first.replace(
        qdata=torch.cat([w.qdata for w in weights], at),
        block_scale=bytes_.view(first.block_scale.dtype),
        global_scale=torch.cat([w.global_scale for w in weights], at),
        act_scale=torch.cat(scales, at) if scales else None,
    )


def _check_alike(func: Any, weights: Sequence[Any]) -> None:
    """Raise unless the weights can be joined."""
    packed = [w for w in weights if isinstance(w, NVFP4Weight)]
    kinds = {(w.activations, w.dialect, w.orig_dtype, w.dims, len(w.lead)) for w in packed}
    if len(packed) < len(weights):
        raise unsupported(func, packed[0], "joined with a dense tensor; pack both or neither")
    if len(kinds) > 1 or any(w.expert_ids is not None for w in packed):
        raise unsupported(func, packed[0], f"joined with another kind of packed weight: {sorted(map(str, kinds))}")
