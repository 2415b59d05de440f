"""Expert ids as the ops take them: one for each row of x, counted from zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from .emitter import CannotRewriteError, Emitter, shape
from .experts import Site
from .found import Axis
from .product_layout import Layout, text

aten = torch.ops.aten
prims = torch.ops.prims

# Results that are places in a tensor, by op and, where it has several, number of the result.
_PLACES: dict[Any, int | None] = {
    aten.topk.default: 1,
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.kthvalue.default: 1,
    aten.mode.default: 1,
    aten.argmax.default: None,
    aten.argmin.default: None,
    aten.argsort.default: None,
    aten.argsort.stable: None,
    aten.multinomial.default: None,
    aten.nonzero.default: None,
}
# Ops that take what they return from their first argument.
_MOVES = {
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default, aten.index.Tensor),
    *(aten.gather.default, aten.index_select.default, prims.convert_element_type.default, aten._unsafe_view.default),
}


def ids_by_slot(emit: Emitter, site: Site, layout: Layout, experts: int) -> Node:
    """Expert ids [B, A], or [1, A] if they are those of every batch: batch b's operand is A experts side by side.

    Raises:
        CannotRewriteError: they are read in another order than the batches have.
    """
    axis = layout.expert
    assert axis is not None
    assert axis.node is not None
    assert layout.row.dim is not None
    rows = static(shape(site.weight.operand)[layout.row.dim], "rows used")
    ids, sizes = axis.node, shape(axis.node)
    used = [(d, a) for d, (a, size) in enumerate(zip(axis.index_axes, sizes, strict=True)) if size != 1]
    by_batch = [(d, a) for d, a in used if layout.row.dim not in a.dims()]
    slots = [(d, a) for d, a in used if layout.row.dim in a.dims()]
    if len(shape(site.weight.operand)) == 2 and by_batch:
        raise _unordered(ids, axis)
    slot_size = layout.row.size if layout.row.kind == "remainder" else None
    batch_dims, slot_dims = _ordered(by_batch, sizes, None), _ordered(slots, sizes, slot_size)
    if batch_dims is None or slot_dims is None or (slot_size is None and slots):
        raise _unordered(ids, axis)
    order = [*batch_dims, *slot_dims]
    if order != sorted(order):
        ids = emit(aten.permute.default, ids, [*order, *(d for d in range(len(sizes)) if d not in order)])
    chosen = math.prod(static(sizes[d], "chosen experts") for d in slot_dims)
    if slot_size is not None and rows != chosen * slot_size:
        raise _unordered(axis.node, axis)
    ids = emit.view(ids, [-1 if batch_dims else 1, chosen])
    return ids if counts_from_zero(axis.node) else count_from_zero(emit, ids, experts)


def count_from_zero(emit: Emitter, ids: Node, experts: int) -> Node:
    """Ids as the ops take them, where -1 was the last expert, as in indexing."""
    from_end = emit(aten.add.Scalar, ids, experts)
    return emit(aten.where.self, emit(aten.lt.Scalar, ids, 0), from_end, ids)


def _ordered(axes: Sequence[tuple[int, Axis]], sizes: Sequence[Any], slot: int | None) -> list[int] | None:
    """Dimensions of ids such that flattened they follow one of the operand's; `slot`: its elements for each id."""
    if not axes:
        return []
    if len(axes) == 1:
        ((d, axis),) = axes
        whole = axis.kind == "dim" if slot is None else (axis.kind, axis.size) == ("quotient", slot)
        return [d] if whole else None
    if len(axes) == 2 and slot is None:
        outer, inner = sorted(axes, key=lambda pair: pair[1].kind != "quotient")
        kinds = outer[1].kind, inner[1].kind, inner[1].value
        if kinds == ("quotient", "remainder", None) and outer[1].size == inner[1].size == sizes[inner[0]]:
            return [outer[0], inner[0]]
    return None


def _unordered(ids: Node, axis: Axis) -> CannotRewriteError:
    read = ", ".join(map(text, axis.index_axes))
    return CannotRewriteError(f"expert ids {shape(ids)} are read at {read}", "select one expert a batch")


def counts_from_zero(ids: Node) -> bool:
    """Whether ids cannot be negative: unsigned, or places of top-k, sort and their like, moved about."""
    if not ids.meta["val"].dtype.is_signed:
        return True
    while ids.op == "call_function" and ids.target in _MOVES:
        source = ids.args[0]
        if not isinstance(source, Node) or not source.meta["val"].dtype.is_signed:
            return False
        ids = source
    if ids.op != "call_function":
        return False
    if ids.target is operator.getitem:
        source, item = ids.args
        assert isinstance(source, Node)
        return item == _PLACES.get(source.target)
    return ids.target in _PLACES


def static(size: Any, what: str) -> int:
    """A size that is a number; raises CannotRewriteError for a symbol."""
    if not isinstance(size, int):
        raise CannotRewriteError(f"the number of {what}, {size}, is symbolic", "fix it")
    return size
