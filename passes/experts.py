"""Finds which matrix products of a graph have a packed weight, recognising each structure once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from .cone import Reach, cone_key, cone_nodes
from .found import PackedWeight, Refusal
from .nodes import renamed, shape_of
from .products import Product, find_products
from .weights import recognise_weight

__all__ = ["Memo", "Product", "Site", "find_products", "find_sites"]


@dataclass(frozen=True)
class Site:
    """A product of which one operand is a recognised packed weight and the other is x."""

    product: Product
    weight: PackedWeight
    on_left: bool

    @property
    def x(self) -> Node:
        return self.product.right if self.on_left else self.product.left

    @property
    def contracts_rows(self) -> bool:
        """Whether the product sums over the weight's output rows, as the gradient of x does, and not over K."""
        return self.weight.k_dim == len(shape_of(self.weight.operand)) - (2 if self.on_left else 1)


def find_sites(graph: fx.Graph, memo: Memo) -> tuple[list[Site], list[Refusal]]:
    """Products with a packed weight, and operands that are made of packed integers but are not NVFP4.

    Args:
        graph: functional ATen graph; ``meta["val"]`` set on every node.
        memo: recognises operands.
    """
    sites: list[Site] = []
    refusals: dict[Node, Refusal] = {}
    for product in find_products(graph):
        for operand, on_left in ((product.right, False), (product.left, True)):
            found = memo.recognise(operand)
            if isinstance(found, PackedWeight):
                sites.append(Site(product, found, on_left))
                break
            if found is not None:
                refusals.setdefault(operand, found)
    return sites, list(refusals.values())


class Memo:
    """Recognises each structure once: the experts of one model are spelled alike."""

    def __init__(self, constants: Mapping[Node, Tensor]) -> None:
        self._constants = constants
        self._results: dict[Hashable, tuple[tuple[Node, ...], PackedWeight | Refusal | None]] = {}
        self._by_node: dict[Node, PackedWeight | Refusal | None] = {}
        self._may_be_packed = Reach()

    def recognise(self, node: Node) -> PackedWeight | Refusal | None:
        if node not in self._by_node:
            self._by_node[node] = self._recognise(node) if self._may_be_packed(node) else None
        return self._by_node[node]

    def _recognise(self, node: Node) -> PackedWeight | Refusal | None:
        nodes = cone_nodes(node)
        key = cone_key(node), tuple(fingerprint(self._constants.get(n)) for n in nodes)
        if key not in self._results:
            self._results[key] = nodes, recognise_weight(node, self._constants)
            return self._results[key][1]
        known, result = self._results[key]
        return renamed(result, dict(zip(known, nodes, strict=True)))


def fingerprint(constant: Tensor | None) -> bytes | None:
    """The values of a constant, to be part of a key."""
    with unset_fake_temporarily():
        return None if constant is None else constant.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
