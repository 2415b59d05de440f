"""Follows an up product's x back to the tokens whose rows it may hold; nothing is proven here.

Before:  tokens -> expand -> view -> index -> where(mask) -> up.x
After:   the nodes on the way, of which the last may be the tokens
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from .cone import GATHERING
from .nodes import CASTS, arguments, elements, is_float, is_tensor
from .sample import MOVES

aten = torch.ops.aten

_PARTS = {aten.slice.Tensor, aten.select.int, aten.slice_scatter.default, aten.select_scatter.default}


def ways(node: Node) -> Iterator[list[Node]]:
    """Ways from an up product's x back to nodes that may be the tokens, the likeliest first."""
    yield way(node)
    yield way(node, through_products=True)
    if gathered := _gathered(node):
        yield gathered


def way(node: Node, through_products: bool = False) -> list[Node]:
    """Nodes from an up product's x back to the tokens: moves, and casts and weights where that leads to fewer rows.

    through_products: also products, by which rows may be chosen.
    """
    path = [node]
    while node.op == "call_function" and is_tensor(node):
        source = _moved(node)
        if source is None:
            inner = _computed(node, through_products)
            beyond = [node] if inner is None else way(inner, through_products)
            return path + beyond if elements(beyond[-1]) < elements(node) else path
        path.append(source)
        node = source
    return path


def _gathered(node: Node) -> list[Node] | None:
    """Like `way` for tokens of one expert each: rows that are gathered, then masked, are no fewer before."""
    path = [node]
    while node.op == "call_function" and is_tensor(node):
        source = _moved(node) or _computed(node, False)
        if source is None:
            return None
        if node.target in GATHERING:
            return path + way(source)
        path.append(source)
        node = source
    return None


def _moved(node: Node) -> Node | None:
    """What a node holds rows of, as they are."""
    if node.target is aten.cat.default:
        return max(arguments(node).tensors, key=elements)
    if MOVES.of(node) is not None and node.target not in _PARTS:
        source = node.all_input_nodes[0]
        return source if is_float(source) else None
    return None


def _computed(node: Node, through_products: bool) -> Node | None:
    """What a node holds rows of, cast, masked, put in places or multiplied by a number for each."""
    if node.target in CASTS:
        return node.all_input_nodes[0]
    if node.target is aten.index_put.default:
        return arguments(node).values
    if node.target in (aten.index_copy.default, aten.scatter.src, aten.slice_scatter.default):
        return getattr(arguments(node), "source", None) or arguments(node).src
    if through_products and node.target in (aten.bmm.default, aten.mm.default):
        return node.args[1]  # type: ignore[return-value]
    sides = [n for n in node.args if is_float(n)]
    if node.target is aten.mul.Tensor or node.target is aten.where.self:
        return max(sides, key=elements, default=None)  # type: ignore[arg-type,return-value]
    return None
