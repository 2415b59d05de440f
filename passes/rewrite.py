"""Replaces products with packed weights by the ops of fx_nvfp4.ops.

Before:  w = dequantise(qdata, scales);  y = bmm(x.unsqueeze(1), w[ids].transpose(1, 2)).squeeze(1)
After:   y = fx_nvfp4.indexed(x, qdata, block_scale, global_scale, ids)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .emitter import CannotRewriteError, Emitter, shape
from .experts import Site
from .found import Axis, PackedWeight

aten = torch.ops.aten
prims = torch.ops.prims
nvfp4 = torch.ops.fx_nvfp4

Parts = tuple[Node, Node, Node]  # qdata, block_scale, global_scale


@dataclass(frozen=True)
class Rewritten:
    """The op node that replaced a product, and what a user may want to know about it."""

    op: Node
    notes: tuple[str, ...]


def rewrite(graph: fx.Graph, site: Site) -> Rewritten:
    """Replace one product that contracts K (:mod:`.rewrite_grad` has the others); nothing changes if this raises.

    Raises:
        CannotRewriteError: no op computes this product.
    """
    layout = Layout.of(site)
    emit = Emitter(graph, site.product.node)
    try:
        with graph.inserting_before(site.product.node):
            weight = canonical(emit, site.weight)
            op, y = _BUILDERS[layout.kind](emit, site, layout, weight)
            if site.product.bias is not None:
                y = emit(aten.add.Tensor, y, site.product.bias)
    except CannotRewriteError:
        emit.undo()
        raise
    site.product.node.replace_all_uses_with(y)
    graph.erase_node(site.product.node)
    return Rewritten(op, weight.notes)


# Which op, and how the operand's dims are made of the weight's rows


@dataclass(frozen=True)
class Layout:
    """How a product uses the weight's [E, N] or [N] rows.

    kind: "linear", "merged" (all experts' rows side by side), "batched", "grouped", "indexed" (one expert a batch)
    or "spread" (several chosen experts' rows side by side in each batch).
    """

    kind: str
    expert: Axis | None
    row: Axis

    @staticmethod
    def of(site: Site) -> Layout:
        w = site.weight
        axes = [w.axis(d) for d in _row_dims(w)]
        if not 1 <= len(axes) <= 2:
            raise CannotRewriteError(
                f"codes {shape(w.qdata)} have {len(axes)} dims of rows", "store [N, K/2] or [E, N, K/2]"
            )
        expert, row = (None, axes[0]) if len(axes) == 1 else (axes[0], axes[1])
        _check_operands(site)
        return Layout(_kind(site, expert, row), expert, row)


def _kind(site: Site, expert: Axis | None, row: Axis) -> str:
    rank = len(shape(site.weight.operand))
    n_dim = 2 * rank - 3 - site.weight.k_dim
    codes, operand = [shape(site.weight.qdata)[d] for d in _row_dims(site.weight)], shape(site.weight.operand)
    one_row = codes[-1] == 1 and isinstance(operand[n_dim], int) and operand[n_dim] == 1
    whole = (row.kind == "dim" and row.dim == n_dim) or one_row
    part = row.kind == "affine" and row.dim == n_dim and row.size == 1
    by_batch = expert is not None and rank == 3 and expert.kind == "dim" and expert.dim == 0
    by_batch |= expert is not None and rank == 3 and codes[0] == 1 and operand[0] == 1
    if site.product.offs is not None:
        if whole and by_batch:
            return "grouped"
    elif whole or part:
        if expert is None or expert.kind == "const":
            return "linear"
        if by_batch:
            return "batched"
        if rank == 3 and expert.kind == "index" and expert.dims() <= {0}:
            return "indexed"
    elif row.kind == "remainder" and row.dim == n_dim and expert is not None:
        if expert.kind == "quotient" and (expert.dim, expert.size) == (n_dim, row.size):
            return "merged"
        if rank == 3 and expert.kind == "index" and _splits_rows(expert, n_dim, row.size):
            return "spread"
    raise CannotRewriteError(
        f"rows are addressed as {_text(expert)} and {_text(row)} in {site.product.node.target}",
        "linear, batched, grouped and indexed products of whole experts are served",
    )


def _splits_rows(expert: Axis, n_dim: int, size: int | None) -> bool:
    """Whether ids [B, A] are read at (batch, n // size): each batch's operand is A experts side by side."""
    axes = expert.index_axes
    if len(axes) != 2 or expert.node is None:
        return False
    one_batch = shape(expert.node)[0] == 1 and axes[0].kind == "const"
    return (one_batch or (axes[0].kind, axes[0].dim) == ("dim", 0)) and (axes[1].kind, axes[1].dim, axes[1].size) == (
        "quotient",
        n_dim,
        size,
    )


def _check_operands(site: Site) -> None:
    x = site.x.meta["val"]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or site.product.node.meta["val"].dtype != x.dtype:
        raise CannotRewriteError(f"activations are {x.dtype}", "use float32, bfloat16 or float16 for both operands")
    if site.product.offs is not None and (site.on_left or len(x.shape) != 2):
        raise CannotRewriteError("a grouped product whose groups lie along K or N", "group the rows of x")


# Canonical operands


@dataclass(frozen=True)
class CanonicalWeight:
    """Nodes of qdata [.., N, K/2] and block_scale [.., N, K/16] (uint8) and global_scale [.., N] (float32)."""

    qdata: Node
    block_scale: Node
    global_scale: Node
    notes: tuple[str, ...]

    def parts(self) -> Parts:
        return self.qdata, self.block_scale, self.global_scale


def map_parts(emit: Emitter, parts: Parts, target: Any, *args: Any) -> Parts:
    qdata, block_scale, global_scale = (emit(target, part, *args) for part in parts)
    return qdata, block_scale, global_scale


def canonical(emit: Emitter, w: PackedWeight) -> CanonicalWeight:
    if w.scale_layout != "linear":
        raise CannotRewriteError("block scales lie in 128 x 4 tiles", "unswizzle them when the model is loaded")
    if _leading(w.scale_axes, w.block_scale, w.scale_dim) != _leading(w.qdata_axes, w.qdata, w.packed_dim):
        raise CannotRewriteError("block scales are addressed differently from codes", "give both the same leading dims")
    notes: list[str] = []
    rows = [shape(w.qdata)[d] for d in _row_dims(w)]
    qdata = _last(emit, w.qdata, w.packed_dim, rows, notes)
    if not w.low_nibble_first:
        notes.append("codes with the high nibble first are swapped at each call; swap them once at load")
        low, high = (
            emit(aten.bitwise_right_shift.Tensor_Scalar, qdata, 4),
            emit(aten.bitwise_left_shift.Tensor_Scalar, qdata, 4),
        )
        qdata = emit(aten.bitwise_or.Tensor, low, high)
    block_scale = _last(emit, w.block_scale, w.scale_dim, rows, notes)
    return CanonicalWeight(qdata, block_scale, _global_scale(emit, w, rows), tuple(notes))


def _last(emit: Emitter, leaf: Node, dim: int, rows: Sequence[Any], notes: list[str]) -> Node:
    """leaf as bytes [*rows, size of dim], dim moved to the end and contiguous."""
    if leaf.meta["val"].dtype.itemsize != 1:
        raise CannotRewriteError(
            f"{leaf.name} packs codes in {leaf.meta['val'].dtype}", "store codes two to a byte, in uint8"
        )
    if leaf.meta["val"].dtype != torch.uint8:
        leaf = emit(aten.view.dtype, leaf, torch.uint8)
    sizes = shape(leaf)
    order = [d for d in range(len(sizes)) if d != dim and sizes[d] != 1]
    if order != sorted(order) or any(d > dim for d in order):
        notes.append(f"{leaf.name} is laid out anew at each call; store it with K as the last dim")
        leaf = emit(aten.permute.default, leaf, [d for d in range(len(sizes)) if d != dim] + [dim])
        leaf = emit(aten.clone.default, leaf, memory_format=torch.contiguous_format)
    return emit.view(leaf, [*rows, sizes[dim]])


def _global_scale(emit: Emitter, w: PackedWeight, rows: Sequence[Any]) -> Node:
    """The multiplier of every row, float32 [.., N]."""
    if w.global_scale is None:
        return emit.full(rows, 1.0, w.qdata)
    scale = w.global_scale
    if scale.meta["val"].dtype != torch.float32:
        scale = emit(prims.convert_element_type.default, scale, torch.float32)
    if w.global_op == "divide":
        scale = emit(aten.reciprocal.default, scale)
    axes = [w.axis(d) for d in _row_dims(w)]
    kept = [(axis, size) for axis, size in zip(w.global_axes, shape(scale), strict=True) if size != 1]
    if any(axis not in axes for axis, _ in kept):
        raise CannotRewriteError(
            f"the global scale {shape(scale)} is addressed differently from codes",
            "give one per tensor, expert or row",
        )
    sizes = {axes.index(axis): size for axis, size in kept}
    scale = emit.view(scale, [sizes.get(i, 1) for i in range(len(axes))])
    return emit(aten.clone.default, emit(aten.expand.default, scale, list(rows)), memory_format=torch.contiguous_format)


def _leading(axes: Sequence[Axis], leaf: Node, packed_dim: int) -> tuple[Axis, ...]:
    """Axes of a leaf's dims but the packed one, without those of size 1, which address nothing."""
    sizes = [size for d, size in enumerate(shape(leaf)) if d != packed_dim]
    return tuple(axis for axis, size in zip(axes, sizes, strict=True) if size != 1)


def _row_dims(w: PackedWeight) -> list[int]:
    """The dims of the codes that are experts and rows: [N] or [E, N], of which one may be a single one.

    Any other dim of size 1 addresses nothing.
    """
    sizes = shape(w.qdata)
    dims = [d for d in range(len(sizes)) if d != w.packed_dim]
    for d in list(dims):
        if len(dims) > 2 and sizes[d] == 1:
            dims.remove(d)
    return dims


# One builder an op: (op node, result in place of the product)


def _linear(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    parts = weight.parts()
    if layout.expert is not None:
        parts = map_parts(emit, parts, aten.select.int, 0, layout.expert.value)
    parts = restrict_rows(emit, site, layout, parts, 0)
    return apply_to_rows(emit, site, lambda x: emit(nvfp4.linear.default, x, *parts))


def _merged(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    parts = [emit.view(p, [-1, *shape(p)[2:]]) for p in weight.parts()]
    return apply_to_rows(emit, site, lambda x: emit(nvfp4.linear.default, x, *parts))


def _batched(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    parts = restrict_rows(emit, site, layout, weight.parts(), 1)
    return apply_to_rows(emit, site, lambda x: emit(nvfp4.batched.default, x, *parts))


def _grouped(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    op = emit(nvfp4.grouped.default, site.x, *weight.parts(), site.product.offs)
    return op, op


def _indexed(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    """Batch b of x [B, M, K] meets expert ids[b]: M rows each."""
    assert layout.expert is not None
    parts = restrict_rows(emit, site, layout, weight.parts(), 1)
    ids = counted_from_zero(emit, emit.view(expert_ids(site, layout.expert), [-1]), weight)
    m, n = static_size(shape(site.product.node)[1 + site.on_left]), rows_used(site)
    if m != 1:
        ids = emit.view(emit(aten.expand.default, emit(aten.unsqueeze.default, ids, 1), [-1, m]), [-1])

    def product(x: Node) -> tuple[Node, Node]:
        op = emit(nvfp4.indexed.default, emit.view(x, [-1, shape(x)[-1]]), *parts, ids)
        return op, emit.view(op, [-1, m, n])

    return apply_to_rows(emit, site, product)


def _spread(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    """Batch b of x [B, M, K] meets the rows of experts ids[b, :] side by side, as einsum lays them out."""
    assert layout.expert is not None
    assert layout.expert.node is not None
    ids = layout.expert.node
    m, chosen = static_size(shape(site.product.node)[1 + site.on_left]), static_size(shape(ids)[1])
    ids = counted_from_zero(emit, ids, weight)
    every = emit.view(emit(aten.expand.default, emit(aten.unsqueeze.default, ids, 1), [-1, m, -1]), [-1])

    def product(x: Node) -> tuple[Node, Node]:
        rows = emit(aten.expand.default, emit(aten.unsqueeze.default, x, 2), [-1, -1, chosen, -1])
        op = emit(nvfp4.indexed.default, emit.view(rows, [-1, shape(x)[-1]]), *weight.parts(), every)
        return op, emit.view(op, [-1, m, rows_used(site)])

    return apply_to_rows(emit, site, product)


def restrict_rows(emit: Emitter, site: Site, layout: Layout, parts: Parts, dim: int) -> Parts:
    """parts restricted to the rows that the operand shows, for example those of gate or up."""
    if layout.row.kind == "dim":
        return parts
    start = layout.row.value or 0
    return map_parts(emit, parts, aten.slice.Tensor, dim, start, start + rows_used(site))


def static_size(size: Any) -> int:
    if not isinstance(size, int):
        raise CannotRewriteError(f"the number of rows a batch, {size}, is symbolic", "flatten the rows to one a batch")
    return size


def expert_ids(site: Site, expert: Axis) -> Node:
    """The node of expert ids, one per batch in order."""
    ids = expert.node
    assert ids is not None
    axes = [(axis, size) for axis, size in zip(expert.index_axes, shape(ids), strict=True) if size != 1]
    if not axes:
        in_order = shape(site.weight.operand)[0] == 1
    elif len(axes) == 2:
        (quotient, _), (remainder, inner) = axes
        in_order = (quotient.kind, remainder.kind) == ("quotient", "remainder") and quotient.size == inner
    else:
        in_order = len(axes) == 1 and axes[0][0].kind == "dim"
    if not in_order:
        read = ", ".join(map(_text, expert.index_axes))
        raise CannotRewriteError(f"expert ids {shape(ids)} are read at {read}", "select one expert a batch")
    return ids


def counted_from_zero(emit: Emitter, ids: Node, weight: CanonicalWeight) -> Node:
    """Ids as the ops take them: in indexing, -1 is the last expert."""
    if not ids.meta["val"].dtype.is_signed:
        return ids
    from_end = emit(aten.add.Scalar, ids, static_size(shape(weight.qdata)[0]))
    return emit(aten.where.self, emit(aten.lt.Scalar, ids, 0), from_end, ids)


_BUILDERS = {
    "linear": _linear,
    "merged": _merged,
    "batched": _batched,
    "grouped": _grouped,
    "indexed": _indexed,
    "spread": _spread,
}


def apply_to_rows(emit: Emitter, site: Site, product: Callable[[Node], Any]) -> tuple[Node, Node]:
    """product(x) for x [.., M, K]; a weight on the left takes and gives the other operand transposed."""

    def pair(x: Node) -> tuple[Node, Node]:
        y = product(x)
        return y if isinstance(y, tuple) else (y, y)

    if not site.on_left:
        return pair(site.x)
    rank = len(shape(site.x))
    order = [*range(rank - 2), rank - 1, rank - 2]
    op, y = pair(emit(aten.permute.default, site.x, order))
    return op, emit(aten.permute.default, y, order)


def rows_used(site: Site) -> int:
    sizes = shape(site.weight.operand)
    size = sizes[2 * len(sizes) - 3 - site.weight.k_dim]
    if not isinstance(size, int):
        raise CannotRewriteError(f"the number of output rows used, {size}, is symbolic", "use a fixed part of the rows")
    return size


def _text(axis: Axis | None) -> str:
    if axis is None:
        return "none"
    size = "" if axis.size is None else f" by {axis.size}"
    return f"{axis.kind} {axis.dim if axis.dim is not None else axis.node or axis.value}{size}"
