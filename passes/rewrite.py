"""Replaces products with packed weights by the ops of fx_nvfp4.ops.

Before:  w = dequantise(qdata, scales);  y = bmm(x.unsqueeze(1), w[ids].transpose(1, 2)).squeeze(1)
After:   y = fx_nvfp4.indexed(x, qdata, block_scale, global_scale, ids)

A product that sums over the weight's rows, as the gradient of x does, becomes `input_grad` in the same layouts:

Before:  dx = mm(grad, w)
After:   dx = fx_nvfp4.input_grad(grad, qdata, block_scale, global_scale)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .canonical import Parts, canonical, map_parts
from .emitter import CannotRewriteError, Emitter, shape
from .expert_ids import ids_by_slot, static
from .experts import Site
from .product_layout import Layout
from .products import parse_product

aten = torch.ops.aten
prims = torch.ops.prims
nvfp4 = torch.ops.fx_nvfp4


@dataclass(frozen=True)
class Rewritten:
    """The op node that replaced a product, and what a user may want to know about it."""

    op: Node
    notes: tuple[str, ...]


def rewrite(graph: fx.Graph, site: Site) -> Rewritten:
    """Replace one product; the graph is unchanged if this raises.

    Raises:
        CannotRewriteError: no op computes this product.
    """
    product = parse_product(site.product.node)  # anew: its operands may have been products that are replaced by now
    assert product is not None
    site = replace(site, product=product)
    layout = Layout.of(site)
    emit = Emitter(graph, product.node)
    try:
        with graph.inserting_before(product.node):
            weight = canonical(emit, site.weight, grouped=product.offs is not None)
            parts = weight.parts()
            if product.alpha != 1:
                parts = (*parts[:2], emit(aten.mul.Scalar, parts[2], product.alpha))
            builder = _Builder(emit, site, layout, parts)
            y = builder.from_rows(_BUILDERS[layout.kind](builder, builder.as_rows()))
            if product.bias is not None:
                y = emit(aten.add.Tensor, y, product.bias, alpha=product.beta)
    except CannotRewriteError:
        emit.undo()
        raise
    product.node.replace_all_uses_with(y)
    graph.erase_node(product.node)
    assert builder.op is not None
    return Rewritten(builder.op, weight.notes)


class _Builder:
    """What the layouts share: operands, the rows of x, and the ops on them.

    F, G: features that enter and leave, K and N; in a product over the rows N and K.
    """

    def __init__(self, emit: Emitter, site: Site, layout: Layout, parts: Parts) -> None:
        self.emit, self.site, self.layout = emit, site, layout
        self.op: Node | None = None
        self._parts = parts

    def as_rows(self) -> Node:
        """x as [.., M, F]; a weight on the left takes the other operand transposed."""
        x = self.site.x
        if len(shape(x)) == 1:
            return self.emit(aten.unsqueeze.default, x, 0)
        return self._transposed(x) if self.site.on_left else x

    def from_rows(self, y: Node) -> Node:
        """[.., M, G] in place of the product."""
        if len(shape(self.site.x)) == 1:
            return self.emit(aten.squeeze.dim, y, 0)
        return self._transposed(y) if self.site.on_left else y

    def _transposed(self, x: Node) -> Node:
        rank = len(shape(x))
        return self.emit(aten.permute.default, x, [*range(rank - 2), rank - 1, rank - 2])

    def parts(self) -> Parts:
        """The weight's parts, of the experts and rows that the operand shows, for example the rows of gate or up."""
        parts, (expert, row) = self._parts, (self.layout.expert, self.layout.row)
        if expert is not None and expert.kind == "affine":
            parts = self._sliced(parts, 0, expert.value, self._extent(0), expert.size)
        dim = 0 if expert is None else 1
        if row.kind == "affine":
            assert row.dim is not None
            return self._sliced(parts, dim, row.value, self._extent(row.dim), row.size)
        if row.kind == "remainder" and row.value is not None:
            return self._sliced(parts, dim, row.value, row.size, row.step)
        return parts

    def _extent(self, dim: int) -> int:
        return static(shape(self.site.weight.operand)[dim], "rows used" if dim else "experts used")

    def _sliced(self, parts: Parts, dim: int, start: int | None, count: int | None, step: int | None) -> Parts:
        assert start is not None
        assert count is not None
        assert step is not None
        parts = map_parts(self.emit, parts, aten.slice.Tensor, dim, start, start + (count - 1) * step + 1, step)
        # Rows of codes and block scales are read where they lie; the ops take global scales without gaps.
        packed = (
            self.emit(aten.clone.default, parts[2], memory_format=torch.contiguous_format) if step != 1 else parts[2]
        )
        return *parts[:2], packed

    def multiply(self, op: Any, x: Node, parts: Parts, **routing: Node) -> Node:
        """op, or its counterpart that sums over the rows."""
        if self.site.contracts_rows:
            self.op = self.emit(nvfp4.input_grad.default, x, *parts, **routing)
        else:
            self.op = self.emit(op, x, *parts, *routing.values())
        return self.op

    def sizes(self, x: Node) -> list[Any]:
        return [self.emit.size(x, d) for d in range(len(shape(x)))]


# One builder a layout: x [.., M, F] -> [.., M, G]


def _linear(build: _Builder, x: Node) -> Node:
    return build.multiply(nvfp4.linear.default, x, build.parts())


def _batched(build: _Builder, x: Node) -> Node:
    return build.multiply(nvfp4.batched.default, x, build.parts())


def _grouped(build: _Builder, x: Node) -> Node:
    assert build.site.product.offs is not None
    return build.multiply(nvfp4.grouped.default, x, build.parts(), offs=build.site.product.offs)


def _folded(build: _Builder, x: Node) -> Node:
    """Batches of one expert one below the other: x [B, M, F] as [E, B / E * M, F]."""
    emit, expert = build.emit, build.layout.expert
    assert expert is not None
    batches, m, features = build.sizes(x)
    experts = static(shape(build.parts()[0])[0], "experts")
    if not statically_known_true(shape(x)[0] % experts == 0):
        raise CannotRewriteError(
            f"{shape(x)[0]} batches are no multiple of {experts} experts", "complete the last round"
        )
    if expert.kind == "quotient":
        y = build.multiply(nvfp4.batched.default, emit.reshape(x, [experts, -1, features]), build.parts())
        return emit.reshape(y, [batches, m, shape(y)[-1]])
    rows = emit(aten.permute.default, emit.reshape(x, [-1, experts, m, features]), [1, 0, 2, 3])
    y = build.multiply(nvfp4.batched.default, emit.reshape(rows, [experts, -1, features]), build.parts())
    apart = emit(aten.permute.default, emit.reshape(y, [experts, -1, m, shape(y)[-1]]), [1, 0, 2, 3])
    return emit.reshape(apart, [batches, m, shape(y)[-1]])


def _side(build: _Builder, x: Node) -> Node:
    """All experts' rows are those of one weight, or for a part of them each expert meets all of x."""
    emit, parts = build.emit, build.parts()
    if build.layout.row.value is None:
        flat = tuple(emit.view(p, [-1, *shape(p)[2:]]) for p in parts)
        return build.multiply(nvfp4.linear.default, x, flat)  # type: ignore[arg-type]
    *lead, features = build.sizes(x)
    experts = static(shape(parts[0])[0], "experts")
    if build.site.contracts_rows:
        slots = emit(aten.permute.default, emit.reshape(x, [-1, experts, features // experts]), [1, 0, 2])
        y = build.multiply(nvfp4.batched.default, slots, parts)
        return emit.reshape(emit(aten.sum.dim_IntList, y, [0]), [*lead, shape(y)[-1]])
    rows = emit(aten.unsqueeze.default, emit.reshape(x, [-1, features]), 0)
    y = build.multiply(nvfp4.batched.default, emit(aten.expand.default, rows, [experts, -1, -1]), parts)
    return emit.reshape(emit(aten.permute.default, y, [1, 0, 2]), [*lead, experts * shape(y)[-1]])


def _crossed(build: _Builder, x: Node) -> Node:
    """As `_side`, the features ordered by row first."""
    emit, parts = build.emit, build.parts()
    experts, rows = (static(size, "rows") for size in shape(parts[0])[:2])
    flat = tuple(emit.view(p, [-1, *shape(p)[2:]]) for p in parts)

    def reordered(t: Node, sizes: list[int]) -> Node:
        *lead, features = build.sizes(t)
        apart = emit.reshape(t, [*lead, *sizes])
        rank = len(shape(apart))
        swapped = emit(aten.permute.default, apart, [*range(rank - 2), rank - 1, rank - 2])
        return emit.reshape(swapped, [*lead, features])

    if build.site.contracts_rows:
        return build.multiply(nvfp4.linear.default, reordered(x, [rows, experts]), flat)  # type: ignore[arg-type]
    y = build.multiply(nvfp4.linear.default, x, flat)  # type: ignore[arg-type]
    return reordered(y, [experts, rows])


def _indexed(build: _Builder, x: Node) -> Node:
    """Batch b of x [B, M, F] meets expert ids[b], or the rows of experts ids[b, :] side by side."""
    emit, parts = build.emit, build.parts()
    experts = static(shape(parts[0])[0], "experts")
    ids = ids_by_slot(emit, build.site, build.layout, experts)
    x3 = x if len(shape(x)) == 3 else emit(aten.unsqueeze.default, x, 0)
    if shape(ids)[0] == 1 and shape(ids)[1] == 1:
        y = _one_expert(build, x, ids, parts)
    else:
        y = _slots(build, x3, ids, parts)
    *lead, _ = build.sizes(x)
    return emit.reshape(y, [*lead, shape(y)[-1]])


def _slots(build: _Builder, x: Node, ids: Node, parts: Parts) -> Node:
    """x [B, M, F] and ids [B, A] or [1, A] -> [B, M, G]; over the rows, F is A times theirs and slots are summed up."""
    emit, chosen = build.emit, shape(ids)[1]
    batches, m, features = build.sizes(x)
    each = emit(aten.expand.default, emit(aten.unsqueeze.default, ids, 1), [batches, m, chosen])
    if build.site.contracts_rows:
        rows = emit.reshape(x, [-1, features // chosen])
    else:
        spread = emit(aten.expand.default, emit(aten.unsqueeze.default, x, 2), [batches, m, chosen, features])
        rows = emit.reshape(spread, [-1, features])
    y = build.multiply(nvfp4.indexed.default, rows, parts, ids=emit.reshape(each, [-1]))
    if build.site.contracts_rows and chosen > 1:
        y = emit(aten.sum.dim_IntList, emit.reshape(y, [-1, chosen, shape(y)[-1]]), [1])
        chosen = 1
    return emit.reshape(y, [batches, m, chosen * shape(y)[-1]])


def _one_expert(build: _Builder, x: Node, ids: Node, parts: Parts) -> Node:
    """All rows in the group of one expert, whose number is known when the graph runs; groups of others are empty."""
    emit = build.emit
    rows = emit.reshape(x, [-1, shape(x)[-1]])
    device = ids.meta["val"].device
    every = emit(
        prims.iota.default,
        shape(parts[0])[0],
        start=0,
        step=1,
        dtype=torch.int32,
        device=device,
        requires_grad=False,
    )
    begun = emit(aten.ge.Tensor, every, emit.reshape(ids, [1]))
    ends = emit(aten.mul.Tensor, begun, emit.size(rows, 0))
    offs = emit(prims.convert_element_type.default, ends, torch.int32)
    return build.multiply(nvfp4.grouped.default, rows, parts, offs=offs)


_BUILDERS: dict[str, Callable[[_Builder, Node], Node]] = {
    "linear": _linear,
    "batched": _batched,
    "grouped": _grouped,
    "folded": _folded,
    "side": _side,
    "crossed": _crossed,
    "indexed": _indexed,
}
