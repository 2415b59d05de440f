"""Handlers of ops that make new values: fills, reinterpreted bytes, reductions, searches, pointwise arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Coords, stack_columns, unravel
from .nodes import shape_of
from .sampler import ATEN, Sampler, Unsupported, number

aten = torch.ops.aten
prims = torch.ops.prims
handles, handles_item = ATEN.handles, ATEN.handles_item

MAX_REDUCED = 1024  # elements that one sample may reduce over
MAX_ELEMENTS = 1 << 22  # values that one step may hold


@handles(aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.new_full.default)
def fill(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    value = a.s if node.target is aten.scalar_tensor.default else a.fill_value
    return torch.full((len(at.sample),), number(node, value), dtype=node.meta["val"].dtype)


@handles(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
@handles(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def zeros(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return torch.zeros(len(at.sample), dtype=node.meta["val"].dtype)


@handles(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return torch.ones(len(at.sample), dtype=node.meta["val"].dtype)


@handles(prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step)
def _iota(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return at.index[:, 0] * number(node, getattr(a, "step", 1)) + number(node, getattr(a, "start", 0))


@handles(aten.view.dtype)
def _view_dtype(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    inner, outer = a.self.meta["val"].dtype.itemsize, a.dtype.itemsize
    samples = len(at.sample)
    if inner == outer:
        return sampler.value(a.self, at).contiguous().view(a.dtype)
    if outer < inner:
        ratio, last = inner // outer, at.index[:, -1]
        values = sampler.value(a.self, at.column(-1, last // ratio)).contiguous().view(torch.uint8)
        values = values.reshape(samples, ratio, outer)[torch.arange(samples), last % ratio]
        return values.contiguous().view(a.dtype).reshape(samples)
    ratio = outer // inner
    index = at.index.repeat_interleave(ratio, 0)
    index[:, -1] = index[:, -1] * ratio + torch.arange(ratio).repeat(samples)
    return sampler.value(a.self, at.repeated(ratio, index)).contiguous().view(a.dtype)


@handles(aten.index_put.default)
def _masked_fill(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    shape, mask = shape_of(node), a.indices[0]
    whole = len(a.indices) == 1 and mask.meta["val"].dtype == torch.bool and shape_of(mask) == shape
    if not whole or a.accumulate or math.prod(shape_of(a.values)) != 1:
        raise Unsupported(node, "only filling a mask of the whole tensor with one value is understood")
    fill = sampler.value(a.values, at.moved(torch.zeros(len(at.sample), len(shape_of(a.values)), dtype=torch.int64)))
    return torch.where(sampler.value(mask, at), fill, sampler.value(a.self, at))


def _reduced(a: SimpleNamespace) -> list[tuple[int, int]]:
    """(dimension, size) that a reduction runs over."""
    shape = shape_of(a.self)
    dims = getattr(a, "dim", None)
    dims = [dims] if isinstance(dims, int) else dims or range(len(shape))
    return sorted({d % len(shape): shape[d] for d in dims}.items())


def is_small(a: SimpleNamespace) -> bool:
    return math.prod(dict(_reduced(a)).values()) <= MAX_REDUCED


def _expanded(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    """All elements [S, R] that each sample of a reduction reduces."""
    reduced = dict(_reduced(a))
    count, samples, rank = math.prod(reduced.values()), len(at.sample), len(shape_of(a.self))
    if count > MAX_REDUCED or count * samples > MAX_ELEMENTS:
        raise Unsupported(node, f"it reduces over {count} elements")
    inner = dict(zip(reduced, unravel(torch.arange(count), list(reduced.values())), strict=True))
    kept = [d for d in range(rank) if d not in inner]
    outer = dict(zip(kept, kept if getattr(a, "keepdim", False) else range(len(kept)), strict=True))
    columns = [
        inner[d].repeat(samples) if d in inner else at.index[:, outer[d]].repeat_interleave(count) for d in range(rank)
    ]
    return sampler.value(a.self, at.repeated(count, stack_columns(columns, at))).reshape(samples, count)


@handles(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.prod.dim_int, when=is_small)
@handles(aten.argmax.default, aten.argmin.default, aten.any.dim, aten.any.dims, aten.sum.default, when=is_small)
def reduce(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    op = aten.sum.dim_IntList if node.target is aten.sum.default else node.target
    single = op in (aten.argmax.default, aten.argmin.default, aten.any.dim, aten.prod.dim_int)
    dtype = {"dtype": a.dtype} if getattr(a, "dtype", None) is not None else {}
    return op(_expanded(sampler, node, a, at), 1 if single else [1], **dtype)  # type: ignore[operator]


@handles_item(aten.max.dim, aten.min.dim, when=is_small)
def _item_max(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return node.args[0].target(_expanded(sampler, node, a, at), 1)[a.item]  # type: ignore[union-attr,operator]


@handles(aten.bucketize.Tensor, aten.searchsorted.Tensor)
def _searchsorted(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    bucketize = node.target is aten.bucketize.Tensor
    bounds, query = (a.boundaries, a.self) if bucketize else (a.sorted_sequence, a.self)
    if len(shape_of(bounds)) != 1:
        raise Unsupported(node, "the sorted sequence has more than one dimension")
    count = torch.arange(shape_of(bounds)[0])
    every = Coords(count[:, None], torch.zeros_like(count), at.via | sampler.sources(query))
    right = a.right or getattr(a, "side", None) == "right"
    values = sampler.operand(query, at, shape_of(node))
    return torch.searchsorted(sampler.value(bounds, every).contiguous(), values.contiguous(), right=right)


_COMPARE = {getattr(aten, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_PLACEMENT = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}


@handles(torch.Tag.pointwise)
@handles(prims.convert_element_type.default, aten._to_copy.default, aten.where.self, aten.clamp.default)
@handles(aten.__rshift__.Scalar, aten.__rshift__.Tensor, aten.__lshift__.Scalar, aten.__lshift__.Tensor)
def pointwise(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    shape = shape_of(node)
    args = [sampler.operand(x, at, shape) for x in node.args]
    kwargs = {k: sampler.operand(x, at, shape) for k, x in node.kwargs.items() if k not in _PLACEMENT}
    if node.target.overloadpacket in _COMPARE and not sampler.sources(node):  # type: ignore[union-attr]
        # A comparison of coordinates alone cuts the tensor in parts; equality cuts on both sides.
        difference = args[0] - args[1]
        sampler.edge(node, difference.floor().to(torch.int64), at, (0, 1))
    return node.target(*args, **kwargs)  # type: ignore[operator]
