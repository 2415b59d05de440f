"""Sampling where a graph changes its course, so that nothing hides between random coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Edge
from .nodes import shape_of
from .sampler import Sampler

_FANOUT = 32  # parts that one round of the search divides a stretch into
_BESIDE = 48  # samples on either side of an edge
_MAX_EDGES = 64


def with_boundaries(
    node: Node, make: Callable[[], Sampler], index: Tensor, generator: torch.Generator, rounds: int = 3
) -> Tensor:
    """`index` [S, rank], and coordinates on both sides of every edge that evaluating `node` meets.

    A single row that differs among many would escape random coordinates: cat, scatters and comparisons of coordinates
    leave edges in the evaluation, and each is followed back to coordinates of `node` by search. What lies behind an
    edge may have edges of its own, hence the rounds. `make` gives the samplers. Raises `Unsupported`.
    """
    shape = torch.tensor(shape_of(node), dtype=torch.int64)
    searched: set[tuple[Node, int, int]] = set()
    for _ in range(rounds):
        sampler = make()
        sampler.evaluate(node, index)
        ends = {
            key: pair
            for key, edge in list(sampler.edges.items())[:_MAX_EDGES]
            if key not in searched and (pair := _sides(edge, index)) is not None
        }
        if not ends:
            break
        searched |= ends.keys()
        sides, dims = _approach(node, make, ends)
        beside = sides[:, :, None].expand(-1, -1, _BESIDE, -1)
        anywhere = (torch.rand(beside.shape, generator=generator) * shape).long()
        fixed = torch.arange(len(shape)) == dims[:, None]
        fixed = fixed[:, None, None].expand(beside.shape) | (torch.arange(_BESIDE) == 0)[None, None, :, None]
        index = torch.cat((index, torch.where(fixed, beside, anywhere).reshape(-1, len(shape))))
    return index


def _sides(edge: Edge, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """A sample below the edge and one above, the nearest; None if there is no such pair or enough lie beside it."""
    column, sample = torch.cat(edge.column), torch.cat(edge.sample)
    below, above = column < edge.bound, column >= edge.bound
    if not bool(below.any()) or not bool(above.any()):
        return None
    if min(int((column == edge.bound - 1).sum()), int((column == edge.bound).sum())) >= _BESIDE:
        return None
    limit = torch.iinfo(torch.int64)
    nearest_below = sample[torch.where(below, column, limit.min).argmax()]
    nearest_above = sample[torch.where(above, column, limit.max).argmin()]
    return index[nearest_below], index[nearest_above]


def _states(node: Node, make: Callable[[], Sampler], keys: Sequence[tuple[Node, int, int]], points: Tensor) -> Tensor:
    """On which side of its edge each of points [edges, P, rank] lies: 0 below, 1 above, -1 if it never comes there."""
    sampler = make()
    edges, count, rank = points.shape
    sampler.evaluate(node, points.reshape(-1, rank))
    states = torch.full((edges, edges * count), -1)
    for row, key in enumerate(keys):
        if edge := sampler.edges.get(key):
            states[row, torch.cat(edge.sample)] = (torch.cat(edge.column) >= edge.bound).long()
    return states.reshape(edges, edges, count)[torch.arange(edges), torch.arange(edges)]


def _approach(
    node: Node, make: Callable[[], Sampler], ends: dict[tuple[Node, int, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Neighbours on both sides of each edge, [edges, 2, rank], and the dimension [edges] in which they differ."""
    keys = list(ends)
    low, high = (torch.stack([pair[side] for pair in ends.values()]) for side in (0, 1))
    rank, every = low.shape[1], torch.arange(len(keys))
    # From one end to the other changing a dimension at a time: the edge is crossed within one of these legs.
    swapped = torch.arange(rank) < torch.arange(rank + 1)[:, None]
    path = torch.where(swapped, high[:, None], low[:, None])
    states = _states(node, make, keys, path)
    dims = (states != states[:, :1]).long().argmax(1).clamp(min=1) - 1
    low, high = path[every, dims], path[every, dims + 1]
    start = states[:, :1]
    while bool(((high - low).abs() > 1).any()):
        steps = torch.arange(_FANOUT + 1)
        points = low[:, None].repeat(1, _FANOUT + 1, 1)
        begin, length = low[every, dims], (high - low)[every, dims]
        points[every, :, dims] = begin[:, None] + length[:, None] * steps // _FANOUT
        crossed = (_states(node, make, keys, points) != start).long().argmax(1).clamp(min=1)
        low, high = points[every, crossed - 1], points[every, crossed]
    return torch.stack((low, high), 1), dims
