"""Lays the parts of a recognised weight out as the ops take them.

Before:  qdata int32 [K/8, N], block_scale e4m3 in 128 x 4 tiles, global_scale [] that divides
After:   qdata uint8 [N, K/2], block_scale uint8 [N, K/16], global_scale float32 [N]

Codes that are stored as the ops take them are read where they lie. Everything else is laid out anew at each call, and
a note says so: it costs time, and what it would take to do it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fx_nvfp4.format import BLOCK

from .emitter import CannotRewriteError, Emitter, shape
from .found import Axis, PackedWeight
from .nodes import is_tensor

aten = torch.ops.aten
_AND = aten.bitwise_and.Scalar

Parts = tuple[Node, Node, Node]  # qdata, block_scale, global_scale
Dims = tuple[tuple[Axis, Any], ...]  # how dimensions are addressed, and their sizes


@dataclass(frozen=True)
class CanonicalWeight:
    """Nodes of qdata [.., N, K/2] and block_scale [.., N, K/16] (uint8) and global_scale [.., N] (float32)."""

    qdata: Node
    block_scale: Node
    global_scale: Node
    notes: tuple[str, ...]

    def parts(self) -> Parts:
        return self.qdata, self.block_scale, self.global_scale


@dataclass(frozen=True)
class RowDims:
    """How the dimensions of codes but the packed one are experts and rows.

    dims: all of them, in order, those that are stored flattened taken apart.
    chosen: those that have one place for the whole product -> the place, a number or the node of a symbolic one.
    expert, row: how what is left is addressed; several dimensions of experts count as one.
    """

    dims: Dims
    chosen: dict[int, int | Node]
    expert: Axis | None
    row: Axis

    @staticmethod
    def of(w: PackedWeight, grouped: bool) -> RowDims:
        """Raises CannotRewriteError if there are more dimensions than experts and rows."""
        dims = _row_dims(w.qdata_axes, w.qdata, w.packed_dim)
        n_dim = 2 * len(shape(w.operand)) - 3 - w.k_dim
        chosen = {d: place for d, (axis, _) in enumerate(dims) if (place := _fixed_place(axis)) is not None}
        axes = {d: axis for d, (axis, _) in enumerate(dims) if d not in chosen}
        last, rows_of_operand = len(dims) - 1, shape(w.operand)[n_dim]
        if isinstance(chosen.get(last), int) and isinstance(rows_of_operand, int) and rows_of_operand == 1:
            # One row, which nothing addresses: still a dimension of rows.
            axes[last] = Axis("affine", dim=n_dim, size=1, value=chosen.pop(last))  # type: ignore[arg-type]
        if grouped and 0 in chosen and dims[0][1] == 1:
            del chosen[0]  # a single expert, whose group may end before the rows do
            axes[0] = Axis("dim", dim=0)
        kept = [axes[d] for d in sorted(axes)]
        while len(kept) > 2 and (merged := _merged(*kept[:2])):
            kept[:2] = [merged]
        if not 1 <= len(kept) <= 2:
            sizes = [size for _, size in dims]
            raise CannotRewriteError(f"codes have {len(kept)} dims of rows, {sizes}", "store [N, K/2] or [E, N, K/2]")
        return RowDims(dims, chosen, None if len(kept) == 1 else kept[0], kept[-1])

    def choose(self, emit: Emitter, part: Node) -> Node:
        """A part [*dims, ..] without the chosen dimensions, those of experts merged: [E, N, ..] or [N, ..]."""
        for d in sorted(self.chosen, reverse=True):
            part = emit(aten.select.int, part, d, self.chosen[d])
        kept = len(self.dims) - len(self.chosen)
        wanted = 1 if self.expert is None else 2
        return part if kept == wanted else emit.view(part, [-1, *shape(part)[kept - 1 :]])


def canonical(emit: Emitter, w: PackedWeight, grouped: bool = False) -> CanonicalWeight:
    """The weight's parts; `grouped` for a product whose rows are grouped by expert, be it one expert.

    Raises:
        CannotRewriteError: codes, block scales and global scales do not belong to the same rows.
    """
    rows = RowDims.of(w, grouped)
    if _addressed(_scale_dims(w)) != _addressed(rows.dims):
        raise CannotRewriteError("block scales are addressed differently from codes", "give both the same leading dims")
    notes: list[str] = []
    sizes = [size for _, size in rows.dims]
    qdata = _bytes_of_codes(emit, w, sizes, notes)
    block_scale = _linear_scales(emit, w, sizes, notes)
    global_scale = _global_scale(emit, w, rows.dims)
    qdata, block_scale, global_scale = (rows.choose(emit, part) for part in (qdata, block_scale, global_scale))
    return CanonicalWeight(qdata, block_scale, global_scale, tuple(notes))


def map_parts(emit: Emitter, parts: Parts, target: Any, *args: Any) -> Parts:
    qdata, block_scale, global_scale = (emit(target, part, *args) for part in parts)
    return qdata, block_scale, global_scale


# How dimensions are addressed


def _row_dims(axes: Sequence[Axis], leaf: Node, packed_dim: int) -> Dims:
    sizes = [size for d, size in enumerate(shape(leaf)) if d != packed_dim]
    return tuple(part for axis, size in zip(axes, sizes, strict=True) for part in _apart(axis, size))


def _scale_dims(w: PackedWeight) -> Dims:
    """The same of block scales; tiles hold the rows of the codes' last dimensions."""
    if w.scale_layout == "linear":
        return _row_dims(w.scale_axes, w.block_scale, w.scale_dim)
    rows = [size for d, size in enumerate(shape(w.qdata)) if d != w.packed_dim]
    sizes = [*shape(w.block_scale)[: w.scale_dim], *rows[w.scale_dim - len(w.scale_axes) :]]
    return tuple(part for axis, size in zip(w.scale_axes, sizes, strict=True) for part in _apart(axis, size))


def _apart(axis: Axis, size: Any) -> Dims:
    """An axis that two flattened dimensions share, taken apart."""
    if axis.kind != "pair":
        return ((axis, size),)
    assert axis.size is not None
    outer, inner = axis.parts
    return *_apart(outer, size // axis.size), *_apart(inner, axis.size)


def _addressed(dims: Dims) -> list[Axis]:
    """Axes without those of dimensions of size 1, which address nothing."""
    return [axis for axis, size in dims if size != 1]


def _fixed_place(axis: Axis) -> int | Node | None:
    if axis.kind == "const":
        return axis.value
    return axis.node if axis.kind == "index" and not is_tensor(axis.node) else None


def _merged(outer: Axis, inner: Axis) -> Axis | None:
    """Two dimensions of the codes, both whole, that are one of the operand."""
    if outer.kind == "quotient" and inner.kind == "remainder" and inner.value is None:
        return Axis("dim", dim=outer.dim) if (outer.dim, outer.size) == (inner.dim, inner.size) else None
    return None


# Codes


def _bytes_of_codes(emit: Emitter, w: PackedWeight, rows: Sequence[Any], notes: list[str]) -> Node:
    """Codes as uint8 [*rows, K/2], the even one in the low nibble."""
    words = _last(emit, w.qdata, w.packed_dim, notes)
    qdata = _as_bytes(emit, words)
    if not w.low_nibble_first:
        order = "the high nibble first" if len(w.nibbles) == 2 else f"nibbles in the order {list(w.nibbles)}"
        notes.append(f"{w.qdata.name} has {order} and is sorted at each call; store it sorted, the low nibble first")
        each = emit.view(qdata, [*shape(words), len(w.nibbles) // 2])
        qdata = _sorted(emit, each, w.nibbles)
    return emit.view(qdata, [*rows, shape(qdata)[-1]])


def _sorted(emit: Emitter, words: Node, nibbles: Sequence[int]) -> Node:
    """Bytes [.., W * B] of words [.., W, B] of B bytes whose codes do not lie in the order of their bits."""
    columns = []
    for even, odd in zip(nibbles[::2], nibbles[1::2], strict=True):
        low, high = (emit(aten.select.int, words, -1, place // 2) for place in (even, odd))
        low = emit(aten.bitwise_right_shift.Tensor_Scalar, low, 4) if even % 2 else emit(_AND, low, 0x0F)
        high = emit(_AND, high, 0xF0) if odd % 2 else emit(aten.bitwise_left_shift.Tensor_Scalar, high, 4)
        columns.append(emit(aten.unsqueeze.default, emit(aten.bitwise_or.Tensor, low, high), -1))
    *lead, count, width = shape(words)
    return emit.view(emit(aten.cat.default, columns, -1), [*lead, count * width])


def _last(emit: Emitter, leaf: Node, dim: int, notes: list[str]) -> Node:
    """leaf with dim moved to the end, where it is contiguous; as bytes if its elements are single ones."""
    if leaf.meta["val"].dtype.itemsize == 1:
        leaf = _as_bytes(emit, leaf)
    sizes = shape(leaf)
    if all(size == 1 for size in sizes[dim + 1 :]) and leaf.meta["val"].stride(dim) == 1:
        return emit.view(leaf, [*sizes[:dim], *sizes[dim + 1 :], sizes[dim]])
    notes.append(f"{leaf.name} is laid out anew at each call; store it with K as the last dim")
    leaf = emit(aten.permute.default, leaf, [*(d for d in range(len(sizes)) if d != dim), dim])
    return emit(aten.clone.default, leaf, memory_format=torch.contiguous_format)


def _as_bytes(emit: Emitter, leaf: Node) -> Node:
    return leaf if leaf.meta["val"].dtype == torch.uint8 else emit(aten.view.dtype, leaf, torch.uint8)


# Scales


def _linear_scales(emit: Emitter, w: PackedWeight, rows: Sequence[Any], notes: list[str]) -> Node:
    """Block scales as bytes, uint8 [*rows, K/16]."""
    if w.scale_layout == "linear":
        scales = _last(emit, w.block_scale, w.scale_dim, notes)
        return emit.view(scales, [*rows, shape(scales)[-1]])
    notes.append(f"{w.block_scale.name} is taken out of its 128 x 4 tiles at each call; unswizzle it once at load")
    lead, columns = shape(w.block_scale)[: w.scale_dim], shape(w.qdata)[w.packed_dim] * len(w.nibbles) // BLOCK
    height = math.prod(rows[len(lead) :])  # rows of all dims flattened make up the tiles
    tall, wide = -(-height // 128), -(-columns // 4)
    tiles = emit.view(_as_bytes(emit, w.block_scale), [*lead, tall, wide, 32, 4, 4])
    order = [len(lead) + d for d in (0, 3, 2, 1, 4)]
    tiles = emit(aten.permute.default, tiles, [*range(len(lead)), *order])
    scales = emit.view(tiles, [*lead, tall * 128, wide * 4])
    for dim, size in ((-2, height), (-1, columns)):
        if size != shape(scales)[dim]:
            scales = emit(aten.slice.Tensor, scales, len(lead) + 2 + dim, 0, size)
    return emit.view(scales, [*rows, columns])


def _global_scale(emit: Emitter, w: PackedWeight, dims: Dims) -> Node:
    """The multiplier of every row, float32 [*rows]."""
    rows = [size for _, size in dims]
    if w.global_scale is None:
        return emit.full(rows, w.factor, w.qdata)
    scale = emit.cast(w.global_scale, torch.float32)
    if w.global_op == "divide":
        scale = emit(aten.reciprocal.default, scale)
    apart = [_apart(axis, size) for axis, size in zip(w.global_axes, shape(scale), strict=True)]
    kept = [(axis, size) for part in apart for axis, size in part if size != 1]
    axes = [axis for axis, _ in dims]
    if any(axis not in axes for axis, _ in kept):
        raise CannotRewriteError(
            f"the global scale {shape(scale)} is addressed differently from codes",
            "give one per tensor, expert or row",
        )
    sizes = {axes.index(axis): size for axis, size in kept}
    if list(sizes) != sorted(sizes):
        raise CannotRewriteError(
            f"dims of the global scale {shape(scale)} are in another order than codes'", "swap them"
        )
    scale = emit.view(scale, [sizes.get(i, 1) for i in range(len(axes))])
    return emit(aten.clone.default, emit(aten.expand.default, scale, rows), memory_format=torch.contiguous_format)
