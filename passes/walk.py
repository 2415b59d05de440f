"""Walks from what a token becomes back to what it was made of: sums of rows, weighted by the routing.

Everything the rules here know is linear in the values that belong to tokens, whatever these are: who evaluates such a
walk for enough values of the leaves knows all of its coefficients. The rules are apart from those that recognise
weights, which know no scatters and no products.

Before:  out <- sum <- mul(weights) <- index_put(order) <- y, the rows of a product
After:   the values of out at sampled coordinates, for values of y of our choice, and which rows each sample read
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Coords
from .nodes import elements, shape_of
from .routing import POISON, Routing
from .sample import MOVES, OutOfRange, Rules, Sampler, Unsupported, is_tensor
from .sample_values import MAX_ELEMENTS, fill, is_small, pointwise, reduce, zeros

aten = torch.ops.aten
prims = torch.ops.prims

LINEAR = Rules(MOVES)
_FEATURES = 8  # at least so many elements of a row are treated alike
_SMALL_TABLE = 1 << 22  # routing values that are rather computed whole than followed
_FILLS = {
    *(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default),
    *(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default),
}

Values = Callable[[Node, Coords], "Tensor | None"]


class Walk(Sampler):
    """A sampler that knows what the routing is, and from the caller what tokens hold.

    Args:
        tokens: nodes that hold what belongs to a token; all others are routing, constants or parameters.
        routing: values of the nodes that are neither.
        values: of nodes where the walk ends, or None.
    """

    rules = LINEAR

    def __init__(self, tokens: frozenset[Node], routing: Routing, values: Values) -> None:
        super().__init__(self._known)
        self.tokens, self.routing, self._chosen = tokens, routing, values

    def _known(self, node: Node, at: Coords) -> Tensor | None:
        values = self._chosen(node, at)
        if values is not None or node in self.tokens:
            return values
        if self.routing.foreign(node) is None:
            if node.target in _FILLS or elements(node) > _SMALL_TABLE:
                return None
            table = self.routing.value(node)
            return table[tuple(at.index.unbind(1))].expand(len(at.sample))
        if node.op in ("placeholder", "get_attr"):
            raise Unsupported(node, "what it holds is neither the tokens' nor the experts'")
        return None

    def sources(self, node: Node) -> frozenset[Node]:
        """Not followed: nothing here depends on the leaves that chose a place."""
        return frozenset()

    def belongs_to_tokens(self, value: Any) -> bool:
        """Whether an argument is what the walk is linear in: a token's, or a parameter's, such as a bias."""
        return is_tensor(value) and (value in self.tokens or self.routing.foreign(value) is not None)


def _rows(walk: Walk, index: Node, dim: int) -> Tensor:
    """Values [R] of an index tensor that says the same for every element of a row, as `expand` makes it."""
    shape = shape_of(index)
    while len(shape) > 1:
        if index.target in (aten.expand.default, aten.repeat.default, aten.clone.default, aten.alias.default):
            index = index.args[0]  # type: ignore[assignment]
            if all(size == 1 for d, size in enumerate(shape_of(index)) if d != dim):
                break
            continue
        if all(size == 1 for d, size in enumerate(shape) if d != dim):
            break
        raise Unsupported(index, "rows are scattered element by element")
    if shape_of(index)[dim : dim + 1] != shape[dim : dim + 1]:
        raise Unsupported(index, "an index is repeated along its rows")
    return walk.routing.value(index).reshape(-1).to(torch.int64)


def _scattered(walk: Walk, at: Coords, rows: Tensor, dim: int, source: Node) -> tuple[Tensor, Tensor]:
    """(sample [M], value [M]) of all elements that a scatter of `source` along `dim` by `rows` [R] puts at `at`."""
    order = rows.argsort(stable=True)
    place = rows[order]
    wanted = at.index[:, dim].contiguous()
    first = torch.searchsorted(place, wanted)
    count = torch.searchsorted(place, wanted, right=True) - first
    total = int(count.sum())
    if total > MAX_ELEMENTS:
        raise Unsupported(source, f"{total} rows are summed at once")
    sample = torch.arange(len(wanted)).repeat_interleave(count)
    within = torch.arange(total) - (count.cumsum(0) - count).repeat_interleave(count)
    index = at.index[sample].clone()
    index[:, dim] = order[first[sample] + within]
    if not total:
        return sample, torch.zeros(0, dtype=source.meta["val"].dtype)
    return sample, walk.value(source, Coords(index, at.sample[sample], at.via))


def _add_rows(walk: Walk, node: Node, into: Node, rows: Tensor, dim: int, source: Node, at: Coords) -> Tensor:
    sample, values = _scattered(walk, at, rows, dim, source)
    return walk.value(into, at).double().index_add(0, sample, values.double())


def _set_rows(walk: Walk, node: Node, into: Node, rows: Tensor, dim: int, source: Node, at: Coords) -> Tensor:
    sample, values = _scattered(walk, at, rows, dim, source)
    written = torch.zeros(len(at.sample), dtype=torch.bool)
    written[sample] = True
    if len(sample) != int(written.sum()):
        raise Unsupported(node, "rows are written more than once")
    result = torch.zeros(len(at.sample), dtype=node.meta["val"].dtype)
    if not bool(written.all()):
        result[~written] = walk.value(into, at.take(~written)).to(result.dtype)
    return result.index_put((sample,), values.to(result.dtype))


@LINEAR.handles(aten.index_add.default, aten.index_copy.default)
def _index_add(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    if getattr(a, "alpha", 1) != 1:
        raise Unsupported(node, "alpha is not 1")
    dim = a.dim % len(shape_of(node))
    put = _add_rows if node.target is aten.index_add.default else _set_rows
    return put(walk, node, a.self, _counted(walk.routing.value(a.index).reshape(-1), node, dim), dim, a.source, at)


@LINEAR.handles(aten.scatter_add.default, aten.scatter.src, aten.scatter_reduce.two)
def _scatter_add(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    if node.target is aten.scatter_reduce.two and (a.reduce != "sum" or not a.include_self):
        raise Unsupported(node, "only sums are understood")
    dim = a.dim % len(shape_of(node))
    if any(a != b for d, (a, b) in enumerate(zip(shape_of(a.index), shape_of(node), strict=True)) if d != dim):
        raise Unsupported(node, "only part of each row is scattered")
    put = _set_rows if node.target is aten.scatter.src else _add_rows
    return put(walk, node, a.self, _rows(walk, a.index, dim), dim, a.src, at)


@LINEAR.handles(aten.index_put.default)
def _index_put(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    index, values = a.indices[0], a.values
    if len(a.indices) != 1 or index is None:
        raise Unsupported(node, "only whole rows are understood")
    if index.meta["val"].dtype == torch.bool:
        return _fill_rows(walk, node, index, a, at)
    if len(shape_of(index)) != 1 or shape_of(values) != (*shape_of(index), *shape_of(node)[1:]):
        raise Unsupported(node, "only whole rows are understood")
    rows = _counted(walk.routing.value(index), node, 0)
    put = _add_rows if a.accumulate else _set_rows
    return put(walk, node, a.self, rows, 0, values, at)


def _fill_rows(walk: Walk, node: Node, mask: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    rank = len(shape_of(mask))
    if a.accumulate or shape_of(a.values) not in ((), (1,)) or walk.belongs_to_tokens(a.values):
        raise Unsupported(node, "only filling the rows of a mask with one number is understood")
    chosen = walk.value(mask, at.moved(at.index[:, :rank]))
    number = walk.routing.value(a.values).reshape(())
    return torch.where(chosen, number, walk.value(a.self, at))


def _counted(rows: Tensor, node: Node, dim: int) -> Tensor:
    """Places as numbers from 0; those that count from the end are allowed where PyTorch allows them."""
    size = shape_of(node)[dim]
    rows = torch.where((rows < 0) & (rows >= -size), rows + size, rows).to(torch.int64)
    if bool(((rows < 0) | (rows >= size)).any()) or bool((rows == POISON).any()):
        raise OutOfRange(node, f"it indexes outside a dimension of {size}")
    return rows


def _check_per_row(walk: Walk, node: Node, *operands: Any) -> None:
    """Routing may treat rows differently, not elements: every row is tried, and not every element of it."""
    for operand in operands:
        if is_tensor(operand) and not walk.belongs_to_tokens(operand):
            while operand.target in (aten.expand.default, aten.clone.default):
                operand = operand.args[0]
            if elements(operand) > 1 and elements(operand) * _FEATURES > elements(node):
                raise Unsupported(node, f"{operand.name} differs from element to element of a row")


@LINEAR.handles(aten.gather.default)
def _gather(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    _check_per_row(walk, node, a.index)
    return MOVES.of(node).handler(walk, node, a, at)  # type: ignore[union-attr]


@LINEAR.handles(aten.mul.Tensor)
def _mul(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    _check_per_row(walk, node, a.self, a.other)
    if walk.belongs_to_tokens(a.self) and walk.belongs_to_tokens(a.other):
        raise Unsupported(node, "what belongs to tokens is multiplied by more than routing weights")
    return pointwise(walk, node, a, at)


@LINEAR.handles(aten.where.self)
def _where(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    if walk.belongs_to_tokens(a.condition):
        raise Unsupported(node, "it depends on what tokens hold, not on the routing alone")
    _check_per_row(walk, node, a.condition)
    return pointwise(walk, node, a, at)


LINEAR.handles(prims.convert_element_type.default, aten._to_copy.default, aten.add.Tensor)(pointwise)
LINEAR.handles(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)(fill)
LINEAR.handles(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)(zeros)
LINEAR.handles(aten.sum.dim_IntList, aten.sum.default, when=is_small)(reduce)


@LINEAR.handles(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def _empty(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    return torch.full((len(at.sample),), float("nan"), dtype=node.meta["val"].dtype)


@LINEAR.handles(aten.bmm.default, aten.mm.default)
def _product(walk: Any, node: Node, a: SimpleNamespace, at: Coords) -> Tensor:
    """A weighted sum, or a choice, spelled as a product over experts, slots or rows; zero weights read nothing."""
    tokens_left = walk.belongs_to_tokens(a.self)
    if tokens_left and walk.belongs_to_tokens(a.mat2):
        raise Unsupported(node, "a product that is none of packed experts")
    count, samples = shape_of(a.self)[-1], len(at.sample)
    if count * samples > MAX_ELEMENTS:
        raise Unsupported(node, f"it sums over {count} elements")
    every, index = torch.arange(count).repeat(samples), at.index.repeat_interleave(count, 0)
    (values, summed), (weights, weighing) = (
        ((a.self, -1), (a.mat2, -2)) if tokens_left else ((a.mat2, -2), (a.self, -1))
    )
    index[:, weighing] = every
    weight = walk.value(weights, at.repeated(count, index)).double()
    counts = weight != 0
    index = at.index.repeat_interleave(count, 0)
    index[:, summed] = every
    terms = walk.value(values, at.repeated(count, index).take(counts)).double() * weight[counts]
    sample = torch.arange(samples).repeat_interleave(count)[counts]
    return torch.zeros(samples, dtype=torch.float64).index_add(0, sample, terms)
