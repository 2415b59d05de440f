"""Handlers of ops whose results are elements of their inputs at other places: views, slices, cat, scatters, gathers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Coords, stack_columns, unravel
from .nodes import hint, shape_of
from .sampler import MOVES, Sampler, number

aten = torch.ops.aten
prims = torch.ops.prims
handles, handles_item = MOVES.handles, MOVES.handles_item


@handles(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default)
@handles(aten.lift_fresh_copy.default, aten.contiguous.default, prims.device_put.default)
def _same(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return sampler.value(node.args[0], at)  # type: ignore[arg-type]


@handles(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_copy.default)
@handles(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _reshape(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    inner, outer = shape_of(a.self), shape_of(node)
    same = 0  # leading dimensions that stay need no division
    while same < min(len(inner), len(outer)) and inner[same] == outer[same]:
        same += 1
    flat = torch.zeros(len(at.sample), dtype=torch.int64)
    for d in range(same, len(outer)):
        flat = flat * outer[d] + at.index[:, d]
    columns = [*at.index[:, :same].unbind(1), *unravel(flat, inner[same:])]
    return sampler.value(a.self, at.moved(stack_columns(columns, at)))


@handles(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    rank = at.index.shape[1]
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in a.dims]
    elif rank > 1:
        first, second = (a.dim0, a.dim1) if node.target is aten.transpose.int else (0, 1)
        order[first], order[second] = order[second], order[first]
    return sampler.value(a.self, at.moved(at.index[:, sorted(range(rank), key=order.__getitem__)]))


@handles(aten.expand.default)
def _expand(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return sampler.operand(a.self, at, shape_of(node))


@handles(aten.repeat.default)
def _repeat(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    inner = shape_of(a.self)
    tail = at.index[:, at.index.shape[1] - len(inner) :]
    return sampler.value(a.self, at.moved(tail % torch.tensor(inner, dtype=torch.int64)))


def _place(node: Node, index: Any, size: Any) -> int:
    """A place in a dimension of `size`, where one that counts from the end takes a size that is no symbol."""
    index = number(node, index)
    return index + number(node, size) if index < 0 else index


def _span(node: Node, a: SimpleNamespace) -> tuple[int, int, int]:
    whole = a.self.meta["val"].shape[a.dim]
    start, end = (None if x is None else _place(node, x, whole) for x in (a.start, a.end))
    start, end, step = slice(start, end, number(node, a.step)).indices(hint(whole))
    return start, max(start, end), step


@handles(aten.slice.Tensor)
def _slice(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    a.end = None  # a symbolic end makes the result's extent symbolic, and moves nothing
    start, _, step = _span(node, a)
    return sampler.value(a.self, at.column(a.dim, at.index[:, a.dim] * step + start))


@handles(aten.select.int)
def _select(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    shape = a.self.meta["val"].shape
    dim = a.dim % len(shape)
    place = sampler.place(node, a.index, at)
    if isinstance(place, int) and place < 0:
        place += number(node, shape[dim])
    return sampler.value(a.self, at.inserted(dim, place))


def _merge(node: Node, size: int, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Values [size] put together from (mask, values where it holds)."""
    dtype = node.meta["val"].dtype
    storage = torch.uint8 if dtype.itemsize == 1 and dtype.is_floating_point else dtype  # fp8 has no index_put
    out = torch.zeros(size, dtype=storage)
    for mask, values in parts:
        out[mask] = values.to(dtype).view(storage)
    return out.view(dtype)


@handles(aten.cat.default, aten.stack.default)
def _cat(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    dim = a.dim % at.index.shape[1]
    stacked = node.target is aten.stack.default
    column, parts, start, starts = at.index[:, dim], [], 0, []
    for source in a.tensors:
        shape = shape_of(source)
        if shape == (0,) and at.index.shape[1] > 1:
            continue  # cat skips such legacy empties
        size = 1 if stacked else shape[dim]
        mask = (column >= start) & (column < start + size)
        if bool(mask.any()):
            inside = at.take(mask)
            inside = inside.without(dim) if stacked else inside.column(dim, inside.index[:, dim] - start)
            parts.append((mask, sampler.value(source, inside)))
        starts.append(start)
        start += size
    sampler.edge(node, column, at, starts[1:])
    return _merge(node, len(column), parts)


@handles(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    dim = a.dim % at.index.shape[1]
    column = at.index[:, dim]
    if node.target is aten.slice_scatter.default:
        start, end, step = _span(node, a)
        inside = (column >= start) & (column < end) & ((column - start) % step == 0)
        source = at.take(inside)
        source = source.column(dim, (source.index[:, dim] - start) // step)
    else:
        start = _place(node, a.index, node.meta["val"].shape[dim])
        end, inside = start + 1, column == start
        source = at.take(inside).without(dim)
    sampler.edge(node, column, at, (start, end))
    parts = []
    if bool(inside.any()):
        parts.append((inside, sampler.value(a.src, source)))
    if not bool(inside.all()):
        parts.append((~inside, sampler.value(a.self, at.take(~inside))))
    return _merge(node, len(column), parts)


@handles(aten.constant_pad_nd.default)
def _pad(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    inner, inside, index = shape_of(a.self), torch.ones(len(at.sample), dtype=torch.bool), at.index.clone()
    for d, before in zip(reversed(range(len(inner))), a.pad[::2], strict=False):
        start = number(node, before)
        sampler.edge(node, at.index[:, d], at, (start, start + inner[d]), d)
        index[:, d] -= start
        inside &= (index[:, d] >= 0) & (index[:, d] < inner[d])
    fill = torch.full((len(inside),), number(node, a.value), dtype=node.meta["val"].dtype)
    parts = [(~inside, fill[~inside])]
    if bool(inside.any()):
        parts.append((inside, sampler.value(a.self, at.moved(index).take(inside))))
    return _merge(node, len(inside), parts)


@handles(aten.flip.default, prims.rev.default)
def _flip(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    index = at.index.clone()
    for d in a.dims:
        index[:, d] = shape_of(node)[d] - 1 - index[:, d]
    return sampler.value(node.args[0], at.moved(index))  # type: ignore[arg-type]


@handles(aten.copy.default)
def _copy(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return sampler.operand(a.src, at, shape_of(node))


@handles(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    shape = shape_of(a.self)
    chosen = {d: index for d, index in enumerate(a.indices) if index is not None}
    picked = torch.broadcast_shapes(*map(shape_of, chosen.values()))
    adjacent = list(chosen) == list(range(min(chosen), max(chosen) + 1))
    first = min(chosen) if adjacent else 0
    last = first + len(picked)
    inner = at.moved(at.index[:, first:last])
    rest = iter(torch.cat((at.index[:, :first], at.index[:, last:]), 1).unbind(1))
    columns = [
        sampler.chosen(chosen[d], inner, picked, size) if d in chosen else next(rest) for d, size in enumerate(shape)
    ]
    return _read_via(sampler, a.self, at.moved(stack_columns(columns, at)), *chosen.values())


def _read_via(sampler: Sampler, source: Node, at: Coords, *indices: Node) -> Tensor:
    return sampler.value(source, replace(at, via=at.via.union(*map(sampler.sources, indices))))


@handles(aten.embedding.default)
def _embedding(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    picked = shape_of(a.indices)
    row = sampler.chosen(a.indices, at.moved(at.index[:, : len(picked)]), picked, shape_of(a.weight)[0])
    return _read_via(sampler, a.weight, at.moved(torch.stack((row, at.index[:, -1]), 1)), a.indices)


@handles(aten.index_select.default, aten.gather.default)
def _gather(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    shape, picked = shape_of(a.self), shape_of(a.index)
    dim = a.dim % max(len(shape), 1)
    inner = at.moved(at.index[:, dim : dim + 1]) if node.target is aten.index_select.default else at
    column = sampler.chosen(a.index, inner, picked, shape[dim])
    return _read_via(sampler, a.self, at.column(dim, column), a.index)


@handles_item(aten.split.Tensor, aten.split_with_sizes.default)
def _item_split(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    sized = hasattr(a, "split_sizes")
    before = a.split_sizes[: a.item] if sized else [a.split_size] * a.item
    start = sum(number(node, size) for size in before)
    return sampler.value(a.self, at.column(a.dim, at.index[:, a.dim] + start))


@handles_item(aten.unbind.int)
def _item_unbind(sampler: Sampler, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return sampler.value(a.self, at.inserted(a.dim % (at.index.shape[1] + 1), a.item))
