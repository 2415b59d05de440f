"""Replaces products that sum over a packed weight's output rows, as the gradient of x does.

Before:  w = dequantise(qdata, scales);  dx = mm(grad, w)
After:   dx = fx_nvfp4.input_grad(grad, qdata, block_scale, global_scale)

The backward pass of every product with a packed weight has this form. A forward pass may have it too (x @ w of a
weight stored [N, K]); it means the same and is served alike. Gradients of scales that a model trains need the dense
codes, stay in the graph, and are reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.fx import Node

from .emitter import CannotRewriteError, Emitter, shape
from .experts import Memo, Site
from .found import PackedWeight
from .rewrite import (
    CanonicalWeight,
    Layout,
    Rewritten,
    apply_to_rows,
    canonical,
    counted_from_zero,
    expert_ids,
    map_parts,
    restrict_rows,
    rows_used,
    static_size,
)

aten = torch.ops.aten
input_grad = torch.ops.fx_nvfp4.input_grad.default
_FALLBACK_BACKWARD = "transformers::grouped_mm_fallback_backward"


def rewrite_grad(graph: fx.Graph, site: Site) -> Rewritten:
    """Replace one product that contracts the weight's rows; the graph is unchanged if this raises.

    Raises:
        CannotRewriteError: the op does not compute this product.
    """
    layout = Layout.of(site)
    emit = Emitter(graph, site.product.node)
    try:
        with graph.inserting_before(site.product.node):
            weight = canonical(emit, site.weight)
            op, dx = _BUILDERS[layout.kind](emit, site, layout, weight)
            if site.product.bias is not None:
                dx = emit(aten.add.Tensor, dx, site.product.bias)
    except CannotRewriteError:
        emit.undo()
        raise
    site.product.node.replace_all_uses_with(dx)
    graph.erase_node(site.product.node)
    return Rewritten(op, weight.notes)


def spell_out_fallback(graph: fx.Graph, memo: Memo) -> None:
    """Make the gradient of x a product of its own where transformers' fp32 grouped product returns it with another.

    Before:  grouped_mm_fallback_backward(x, w, offs, grad)[0]
    After:   grouped_mm_fallback(grad, w.transpose(1, 2), offs)

    Done where w is packed and nobody reads its gradient, which the op computes all the same.
    """
    for node in list(graph.nodes):
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target.name() == _FALLBACK_BACKWARD):
            continue
        results = {user.args[1]: user for user in node.users}
        dx = results.get(0)
        _, w, offs, grad = node.args
        if dx is None or 1 in results or not isinstance(memo.recognise(w), PackedWeight):
            continue
        emit = Emitter(graph, dx)
        with graph.inserting_before(dx):
            transposed = emit(aten.permute.default, w, [0, 2, 1])
            product = emit(torch.ops.transformers.grouped_mm_fallback.default, grad, transposed, offs)
        dx.replace_all_uses_with(product)
        graph.erase_node(dx)
        graph.erase_node(node)


# One builder a layout: (op node, result in place of the product)


def _linear(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    parts = weight.parts()
    if layout.expert is not None:
        parts = map_parts(emit, parts, aten.select.int, 0, layout.expert.value)
    parts = restrict_rows(emit, site, layout, parts, 0)
    return apply_to_rows(emit, site, lambda grad: emit(input_grad, grad, *parts))


def _merged(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    """All experts' rows side by side are the rows of one weight."""
    parts = [emit.view(p, [-1, *shape(p)[2:]]) for p in weight.parts()]
    return apply_to_rows(emit, site, lambda grad: emit(input_grad, grad, *parts))


def _batched(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    parts = restrict_rows(emit, site, layout, weight.parts(), 1)
    return apply_to_rows(emit, site, lambda grad: emit(input_grad, grad, *parts))


def _grouped(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    op = emit(input_grad, site.x, *weight.parts(), offs=site.product.offs)
    return op, op


def _indexed(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    """Batch b of grad [B, M, N] meets expert ids[b]: M rows each."""
    assert layout.expert is not None
    parts = restrict_rows(emit, site, layout, weight.parts(), 1)
    ids = counted_from_zero(emit, emit.view(expert_ids(site, layout.expert), [-1]), weight)
    m = static_size(shape(site.product.node)[1 + site.on_left])
    ids = emit.view(emit(aten.expand.default, emit(aten.unsqueeze.default, ids, 1), [-1, m]), [-1])

    def product(grad: Node) -> tuple[Node, Node]:
        op = emit(input_grad, emit.view(grad, [-1, rows_used(site)]), *parts, ids=ids)
        return op, emit.view(op, [-1, m, shape(op)[-1]])

    return apply_to_rows(emit, site, product)


def _spread(emit: Emitter, site: Site, layout: Layout, weight: CanonicalWeight) -> tuple[Node, Node]:
    """Batch b of grad [B, M, A * N] meets the rows of experts ids[b, :] side by side: the sum of A products.

    Each of the A is rounded to grad's dtype, as in models that keep one row a chosen expert.
    """
    assert layout.expert is not None
    assert layout.expert.node is not None
    m, chosen = static_size(shape(site.product.node)[1 + site.on_left]), static_size(shape(layout.expert.node)[1])
    ids = counted_from_zero(emit, layout.expert.node, weight)
    every = emit.view(emit(aten.expand.default, emit(aten.unsqueeze.default, ids, 1), [-1, m, -1]), [-1])

    def product(grad: Node) -> tuple[Node, Node]:
        op = emit(input_grad, emit.view(grad, [-1, rows_used(site) // chosen]), *weight.parts(), ids=every)
        each = emit.view(op, [-1, m, chosen, shape(op)[-1]])
        return op, emit(aten.sum.dim_IntList, each, [2])

    return apply_to_rows(emit, site, product)


_BUILDERS: dict[str, Callable[[Emitter, Site, Layout, CanonicalWeight], tuple[Node, Node]]] = {
    "linear": _linear,
    "merged": _merged,
    "batched": _batched,
    "grouped": _grouped,
    "indexed": _indexed,
    "spread": _spread,
}
