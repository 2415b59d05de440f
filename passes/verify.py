"""Nothing packed is left unexplained: finds weights that a graph still dequantises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_nvfp4.report import Refusal

from .cone import BYTES
from .found import PackedWeight
from .place import users_of_views, where
from .sample import inputs_of, is_supported, is_tensor


def find_dequantized(graph: fx.Graph) -> Iterator[Refusal]:
    """Packed tensors that the graph makes dense by a call of theirs."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.fx_nvfp4.dequantize.default):
        shape = list(node.meta["val"].shape)
        users = ", ".join(sorted({_name(user) for user in users_of_views(node)}))
        yield Refusal(
            where(node),
            node.name,
            f"the packed weight {shape} is dequantised for {users or 'an output'}",
            "use it in a matrix product, or drop the call of dequantize()",
        )


def notes_on_unpacked(graph: fx.Graph) -> list[str]:
    """Where weights are taken out of their tiles, which costs a pass over them at each call."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.fx_nvfp4.unpack_tiles.default)
    return [
        f"{where(n)}: a weight is taken out of its tiles at each call, for a view that cuts them; slice rows by "
        'multiples of 16 and K by multiples of 64, or keep the canonical layout with options={"prepack": False}'
        for n in nodes
    ]


def find_spelled(graph: fx.Graph, recognise: Callable[[Node], object], known: set[Node]) -> Iterator[Refusal]:
    """Weights that the graph still dequantises by ops of its own, for anything but the operands in `known`.

    Walks backwards from where values that depend on packed bytes leave the ops that can be followed (an op that is
    unknown, a product, an output), and stops at the first NVFP4 weight on each way.
    """
    below = _dependent(graph)
    exposed: dict[Node, set[str]] = {}
    for node in reversed(below):
        if node in known or not node.meta["val"].is_floating_point():
            continue
        readers = [user for user in _readers(node) if not is_supported(user) and not _is_empty(user)]
        uses = exposed.get(node, set()) | {_name(user) for user in readers}
        if not uses:
            continue
        if isinstance(recognise(node), PackedWeight):
            yield Refusal(
                where(node),
                node.name,
                f"an NVFP4 weight is dequantised for {', '.join(sorted(uses))}",
                "use it in mm, bmm, addmm without alpha and beta, or a grouped product",
            )
            continue
        for source in inputs_of(node):
            exposed.setdefault(source, set()).add(_name(node))


def _dependent(graph: fx.Graph) -> list[Node]:
    """Nodes computed from packed bytes by ops that can be followed, in the graph's order."""
    found: dict[Node, None] = {}
    leaves = set()
    for node in graph.nodes:
        if not is_tensor(node):
            continue
        if not is_supported(node):
            if node.meta["val"].dtype in BYTES:
                leaves.add(node)
        elif any(source in found or source in leaves for source in inputs_of(node)):
            found[node] = None
    return list(found)


def _readers(node: Node) -> Iterator[Node]:
    """Users of a node, where one that returns several tensors stands for its results."""
    for user in node.users:
        results = [u for u in user.users if is_supported(u)] if isinstance(user.meta.get("val"), (tuple, list)) else []
        yield from results or [user]


def _is_empty(user: Node) -> bool:
    """Whether a user has no element at any call, as what is gathered for no token: it makes nothing dense."""
    return is_tensor(user) and bool(statically_known_true(user.meta["val"].numel() == 0))


def _name(user: Node) -> str:
    return "an output of the graph" if user.op == "output" else str(user.target)
