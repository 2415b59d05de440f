"""What lies between an expert's products, read by the same proof that lifts whole blocks.

Before:  x -> linear, linear -> silu, mul -> linear, twice in one graph, as two experts that a top-1 chooses between
After:   activation "silu(g) * u", layout "separate", the up ops (gate first), the down op, and their biases
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import Node

from ..passes.block import Block, Unit
from ..passes.found import Refused
from ..passes.proof import prove
from ..passes.sample import Unsupported
from ..passes.search import candidates, find_units
from .record import Unsuited

LINEAR = torch.ops.fx_nvfp4.linear.default
_ADVICE = "an expert is down(activation(up(x))), with or without a gate and biases"


@dataclass(frozen=True)
class Middle:
    """The ops of one expert, in the graph that :func:`chosen` gave.

    Attributes:
        up: one product, or gate and up; up_bias: of each.
        activation, layout: as ``torch.ops.fx_nvfp4.moe`` takes them.
    """

    up: tuple[Node, ...]
    up_bias: tuple[Node | None, ...]
    down: Node
    down_bias: Node | None
    activation: str
    layout: str


def chosen(expert: Callable[[int, Tensor], Tensor], x: Tensor, logits: Tensor) -> Tensor:
    """A mixture of two experts, to be traced: expert(e, x [T, K]) -> [T, H], logits [T, 2]."""
    weights, ids = logits.topk(1, dim=-1)
    shares = [((ids == e) * weights).sum(dim=-1, keepdim=True) for e in range(2)]
    return expert(0, x) * shares[0] + expert(1, x) * shares[1]


def find_middle(graph: fx.Graph) -> Middle:
    """The first of the two experts of a graph that was traced from :func:`chosen`.

    Raises:
        Unsuited: it is no down(activation(up(x))).
    """
    products = [n for n in graph.nodes if n.target is LINEAR]
    if len(products) not in (4, 6):
        raise Unsuited(f"its experts have {len(products) / 2:g} packed products", _ADVICE)
    # How activations are rounded is no part of the function that is read here.
    arguments = [(n, n.args, n.kwargs) for n in products]
    for n in products:
        n.args, n.kwargs = n.args[:4], {k: v for k, v in n.kwargs.items() if k == "global_scale"}
    try:
        block = _prove(graph)
    finally:
        for n, args, kwargs in arguments:
            n.args, n.kwargs = args, kwargs
    return _middle(block)


def _prove(graph: fx.Graph) -> Block:
    reasons: list[str] = []
    for units in find_units(graph):
        for candidate in candidates(units):
            try:
                return prove(dataclasses.replace(candidate, bias_owners=_down_biases(units)))
            except (Refused, Unsupported) as reason:
                reasons.append(str(reason))
    raise Unsuited(f"in its experts, {reasons[0]}" if reasons else "its experts do more than two products", _ADVICE)


def _down_biases(units: Sequence[Unit]) -> dict[Node, int]:
    """Parameters that are added to what a down product gives -> the expert."""
    return {
        node: expert
        for expert, unit in enumerate(units)
        for user in unit.down.node.users
        if user.target is torch.ops.aten.add.Tensor
        for node in user.all_input_nodes
        if node is not unit.down.node and list(node.meta["val"].shape) == [unit.down.rows]
    }


def _middle(block: Block) -> Middle:
    unit, gating = block.candidate.units[0], block.gating
    return Middle(
        tuple(up.product.node for up in gating.ups),
        tuple(up.bias for up in gating.ups),
        unit.down.node,
        block.down_biases[0] if block.down_biases else None,
        gating.activation,
        gating.layout,
    )
