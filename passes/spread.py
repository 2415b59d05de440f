"""Whether routing weights are moved, scaled and added on their way into a block, and nothing else.

Before:  weights -> scatter -> mul(mask) -> the results of the products
After:   the same, or the node that does something else, such as a clamp of what was scattered

Worlds try a few weights. What is linear in them is known by these; a clamp at 2, or NaN made zero, may change none.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .block import Candidate
from .found import Almost
from .nodes import CASTS, below, between, is_float
from .sample import MOVES

aten = torch.ops.aten

# Linear in all of their floating-point tensors at once.
_SUMS = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.sum.dim_IntList, aten.sum.default, aten.mean.dim),
    *(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_put.default, aten.index_add.default),
    *(aten.index_copy.default, aten.masked_fill.Scalar, aten.cumsum.default),
}
# Linear in any one of them, if the others do not follow from the weights.
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
# Do not look at values.
_LIKE = {
    *(aten.zeros_like.default, aten.empty_like.default, aten.full_like.default, aten.ones_like.default),
    *(aten.new_zeros.default, aten.new_empty.default, aten.new_full.default, aten.new_ones.default),
}
_IS_ZERO = {aten.eq.Scalar, aten.ne.Scalar}


def check_linear(c: Candidate, tokens: frozenset[Node]) -> None:
    """Raise `Almost` unless all routing of a candidate outside of `tokens` is linear in its weights."""
    if c.weights is None:
        return
    used = set(below(c.out, {c.x, c.ids, c.weights}))
    follows = {c.weights}
    for node in between(c.weights, c.out):
        weights = [n for n in node.all_input_nodes if n in follows]
        if not weights or node in tokens or node not in used or node.target in _LIKE:
            continue
        if not _is_linear(node, weights):
            raise Almost(
                f"{node.name} ({node.target}) changes {c.weights.name} inside of the block",
                "change the weights of each token's slots, before they are spread over experts or rows",
            )
        if is_float(node) or _is_several(node):
            follows.add(node)


def _is_linear(node: Node, weights: list[Node]) -> bool:
    if node.target in _IS_ZERO:  # a mask of slots that weigh nothing
        return bool(node.args[1] == 0)
    if node.target is aten.nonzero.default:
        return True
    if node.target in _PRODUCTS:
        return len(weights) == 1 and node.args.count(weights[0]) == 1
    if node.target is aten.div.Tensor:
        return node.args[1] not in weights
    if node.target in CASTS or node.target is aten.where.self or node.target in _SUMS:
        return is_float(node)
    return MOVES.of(node) is not None or node.target in _SPLITS


def _is_several(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))
