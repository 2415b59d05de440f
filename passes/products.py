"""Finds the matrix products of a graph, whatever op spells them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """alpha * (left @ right) + beta * bias, rows grouped by offs where it is a grouped product.

    right of a matrix times a vector has one dimension.
    """

    node: Node
    left: Node
    right: Node
    bias: Node | None = None
    offs: Node | None = None
    alpha: float = 1
    beta: float = 1


def find_products(graph: fx.Graph) -> Iterator[Product]:
    """Every matrix product of the graph whose arithmetic the ops reproduce."""
    for node in graph.nodes:
        product = parse_product(node)
        if product is not None:
            yield product


def parse_product(node: Node) -> Product | None:
    """What a node multiplies, or None if it is no product or has arithmetic of another kind."""
    parse = _PRODUCTS.get(node.target) or _transformers_product(node)
    return parse(node) if parse else None


def _plain(node: Node) -> Product | None:
    left, right = node.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return Product(node, left, right)


def _with_bias(node: Node) -> Product | None:
    bias, left, right = node.args[:3]
    assert isinstance(bias, Node)
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None  # symbols
    return Product(node, left, right, bias if beta else None, alpha=alpha, beta=beta)


def _grouped(node: Node) -> Product | None:
    args = [*node.args, *(None,) * (5 - len(node.args))]
    left, right, offs, bias, out_dtype = args[:5]
    offs, bias = node.kwargs.get("offs", offs), node.kwargs.get("bias", bias)
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    if bias is not None or node.kwargs.get("out_dtype", out_dtype) not in (None, left.meta["val"].dtype):
        return None
    return Product(node, left, right, offs=offs if isinstance(offs, Node) else None)


_PRODUCTS: dict[Any, Callable[[Node], Product | None]] = {
    aten.mm.default: _plain,
    aten.bmm.default: _plain,
    aten.mv.default: _plain,
    aten.addmm.default: _with_bias,
    aten.addmv.default: _with_bias,
    aten.baddbmm.default: _with_bias,
    aten._grouped_mm.default: _grouped,
}


def _transformers_product(node: Node) -> Callable[[Node], Product | None] | None:
    """transformers spells the grouped product of fp32 and fp16 models as an op of its own."""
    target = node.target
    known = isinstance(target, torch._ops.OpOverload) and target.name() == "transformers::grouped_mm_fallback"
    return _grouped if known else None
