"""One evaluation of a cone at sampled coordinates: the values, and how each leaf was addressed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .cone import Cone
from .found import Axis
from .leaves import Leaves
from .sample import Coords, Sampler, is_tensor, same_size, shape_of, with_boundaries

_SAMPLES = 12288
_FIRST = 1024  # samples that the search for edges starts with


@dataclass(frozen=True)
class Read:
    """What the samples read of one leaf: coordinates [S, rank] (the last read), which samples read it, and whether
    each read one element only."""

    node: Node
    index: Tensor
    seen: Tensor
    unique: bool

    @staticmethod
    def gather(node: Node, reads: Iterable[Coords], samples: int) -> Read:
        """What `samples` samples read of `node`, from what a `Sampler` recorded of it."""
        rank = len(shape_of(node)) if is_tensor(node) else 0
        index = torch.zeros(samples, rank, dtype=torch.int64)
        seen, unique = torch.zeros(samples, dtype=torch.bool), True
        for at in reads:
            known = seen[at.sample]
            unique &= torch.equal(index[at.sample][known], at.index[known])
            index[at.sample] = at.index
            unique &= torch.equal(index[at.sample], at.index)
            seen[at.sample] = True
        return Read(node, index, seen, unique)

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype

    def column(self, dim: int) -> Tensor:
        return self.index[:, dim]


class Probe:
    """One evaluation of a cone: values, and what was read, at `coords` [S, rank] of the operand."""

    def __init__(self, cone: Cone, coords: Tensor, leaves: Leaves) -> None:
        self.operand, self.coords, self.leaves = cone.operand, coords, leaves
        sampler = Sampler(leaves, cone.index_leaves)
        self.out = sampler.evaluate(cone.operand, coords)
        reads = [Read.gather(n, reads, len(coords)) for n, reads in sampler.reads.items()]
        self.chosen = {r.node: r for r in reads if r.node in cone.index_leaves}
        self.reads = [r for r in reads if r.node not in leaves.tables and r.node not in self.chosen]
        self.packed = [r for r in self.reads if r.node in cone.packed]
        self.shape = shape_of(cone.operand)

    def size(self, dim: int) -> Any:
        """The operand's size, a symbol where it is one."""
        return self.operand.meta["val"].shape[dim]

    def values(self, read: Read) -> Tensor:
        """Values [S] that the samples found in a leaf."""
        return self.leaves.hashed(read.node, Coords(read.index, torch.arange(len(self.coords))))

    def axis(self, read: Read, dim: int) -> Axis | None:
        """How a dimension of a leaf is addressed, or None if in no way that `Axis` can say."""
        column, size = read.column(dim), read.node.meta["val"].shape[dim]
        if axis := self._plain(column, size, read.node):
            return axis
        # Two dimensions that the leaf holds flattened.
        for inner in sorted(self._likely_sizes(read.node)) if isinstance(size, int) else ():
            if not 1 < inner < size or size % inner:
                continue
            outer = self._plain(column // inner, size // inner, read.node)
            if outer and (within := self._plain(column % inner, inner, read.node)):
                return Axis("pair", size=inner, parts=(outer, within))
        return None

    def _plain(self, column: Tensor, size: Any, leaf: Node) -> Axis | None:
        """How one dimension of `size` is addressed."""
        if bool((column == column[0]).all()):
            return Axis("const", value=int(column[0]))
        for d, extent in enumerate(self.operand.meta["val"].shape):
            if torch.equal(column, self.coords[:, d]) and same_size(extent, size):
                return Axis("dim", dim=d)
            if axis := self._sliced(column, d) or self._merged(column, d, size, leaf):
                return axis
        return self._chosen(column)

    def _chosen(self, column: Tensor) -> Axis | None:
        for index in self.chosen.values():
            if torch.equal(column, self.values(index).to(torch.int64)) and (axes := self.axes(index)) is not None:
                node = self.leaves.cone.index_leaves[index.node][0]
                return Axis("index", node=node, index_axes=axes)
        return None

    def _likely_sizes(self, leaf: Node) -> set[int]:
        """Sizes that dimensions may have been merged from: of the operand, of the leaves, and quotients of them."""
        nodes = [self.operand, leaf, *(r.node for r in self.reads), *(n for n in self.chosen if is_tensor(n))]
        sizes = {s for n in nodes for s in n.meta["val"].shape if isinstance(s, int) and s > 1}
        return sizes | {a // b for a in sizes for b in sizes if a % b == 0}

    def axes(self, read: Read, skip: int | None = None) -> tuple[Axis, ...] | None:
        """`axis` of every dimension except `skip`, or None if there is none for some."""
        axes = [self.axis(read, d) for d in range(read.index.shape[1]) if d != skip]
        return None if None in axes else tuple(axes)  # type: ignore[arg-type]

    def _sliced(self, column: Tensor, d: int) -> Axis | None:
        line = _line(self.coords[:, d], column)
        return Axis("affine", dim=d, size=line[0], value=line[1]) if line else None

    def _merged(self, column: Tensor, d: int, size: Any, leaf: Node) -> Axis | None:
        """Coordinates of dimension `d` are those of several, of which one addresses a dimension of `size`."""
        own, extent, whole = self.coords[:, d], self.shape[d], self.size(d)
        for s in sorted(self._likely_sizes(leaf)):
            if not 1 < s < extent:
                continue
            if torch.equal(column, own // s) and same_size(whole, s * size):
                return Axis("quotient", dim=d, size=s)
            if not isinstance(size, int):  # a symbol would make the axis wrong for other sizes
                continue
            if s == size and torch.equal(column, own % s):
                return Axis("remainder", dim=d, size=s)
            if s < size and isinstance(whole, int) and extent % s == 0 and (line := _line(own % s, column)):
                return Axis("remainder", dim=d, size=s, step=line[0], value=line[1])
        return None

    def where(self, mask: Tensor, k_dim: int) -> str:
        """The row, or index of another dimension, that the samples of a mask have in common and no others lie in.

        If there is none, the first element.
        """
        found = {d: torch.unique(self.coords[mask, d]) for d in range(len(self.shape))}
        rows = [d for d in found if d != k_dim]
        for d, common in sorted(found.items(), key=lambda item: len(item[1])):
            inside = torch.isin(self.coords[:, d], common)
            if len(common) > max(8, self.shape[d] // 8) or int(mask.sum()) * 2 < int(inside.sum()):
                continue
            name = "k =" if d == k_dim else "row" if d == rows[-1] else f"dim {d} at"
            return f"{name} {', '.join(map(str, common.tolist()[:8]))}"
        return f"element {self.coords[mask][0].tolist()}"


def _line(own: Tensor, column: Tensor) -> tuple[int, int] | None:
    """(step, start) such that column = own * step + start, step at least 1."""
    first, last = own.argmin(), own.argmax()
    length = int(own[last] - own[first])
    step, rest = divmod(int(column[last] - column[first]), length) if length else (0, 1)
    start = int(column[first]) - step * int(own[first])
    return (step, start) if step >= 1 and not rest and torch.equal(column, own * step + start) else None


def _first_coords(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random coordinates, among them all corners and, per dimension, the first and the last at random others."""
    sizes = torch.tensor(shape, dtype=torch.int64)
    coords = (torch.rand(_SAMPLES, len(shape), generator=generator, dtype=torch.float64) * sizes).long()
    corners = torch.tensor(list(itertools.product((0, 1), repeat=len(shape))))
    coords[: len(corners)] = corners * (sizes - 1)
    beside = 32
    for d, size in enumerate(shape):
        start = len(corners) + 2 * beside * d
        coords[start : start + beside, d] = 0
        coords[start + beside : start + 2 * beside, d] = size - 1
    return coords


def _is_wide_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and dtype.itemsize > 1


def probe_cone(cone: Cone, constants: Mapping[Node, Tensor], cuts: frozenset[Node] = frozenset()) -> Probe:
    """Evaluates a cone down to its leaves and `cuts`, finding out on the way which of the constants act as tables."""
    generator = torch.Generator().manual_seed(0)
    coords = _first_coords(shape_of(cone.operand), generator)
    promoted: frozenset[Node] = frozenset()
    leaves = Leaves(cone, constants, promoted, cuts)
    small = with_boundaries(cone.operand, lambda: Sampler(leaves, cone.index_leaves), coords[:_FIRST], generator)
    coords = torch.cat((small, coords[_FIRST:]))
    while True:
        probe = Probe(cone, coords, Leaves(cone, constants, promoted, cuts))
        known = {r.node for r in probe.reads if r.node in constants and r.node not in cone.packed}
        # What is read as a whole is a table; integers wider than a byte are shifts or places, never scales.
        whole = {r.node for r in probe.reads if r.node in known and (not r.unique or _is_wide_integer(r.dtype))}
        # More than one scale is left, so those that are one number written in the program are factors.
        numbers = {n for n in known if n.op == "get_attr" and constants[n].numel() == 1}
        more = whole or (numbers if len(probe.reads) - len(probe.packed) > 2 else set())
        if not more:
            return probe
        promoted |= more
