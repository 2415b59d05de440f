"""Finds the nodes that hold the routing: which experts each token chooses, and with what weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .combine import Combine, before_experts
from .record import Unsuited


@dataclass(frozen=True)
class Routing:
    """Nodes that hold the routing of a :class:`Combine`.

    Attributes:
        top_k: A, how many experts a token chooses.
        ids: node of the ids, [.., A] or, ``ids_first``, [A, T]; None: the A largest of dense weights.
        weights: node of the weights, laid out as ids, or [.., E] where ``dense``; None: all are 1.
    """

    top_k: int
    ids: Node | None
    ids_first: bool
    weights: Node | None
    dense: bool


def find_routing(combine: Combine) -> Routing:
    """See :class:`Routing`.

    Raises:
        Unsuited: no node holds it.
    """
    chosen = combine.weights != 0
    counts = chosen.sum(dim=1)
    top_k = int(counts[0])
    if not top_k or not bool((counts == top_k).all()):
        raise Unsuited(
            f"tokens choose between {int(counts.min())} and {int(counts.max())} experts",
            "choose the same number for every token (an expert's capacity drops tokens)",
        )
    if combine.recording.calls[0].node.meta["value"] is None:
        raise Unsuited("its experts give no tensor")
    nodes = before_experts(combine.recording)[::-1]  # the last that fits is what the experts' loop uses
    members = chosen.nonzero()[:, 1].view(-1, top_k)
    for node in nodes:
        for ids_first in (False, True):
            ids = _as_slots(node, combine.weights.shape[0], top_k, ids_first)
            if ids is None or ids.is_floating_point() or ids.dtype == torch.bool:
                continue
            if not torch.equal(ids.long().sort(dim=1).values, members):
                continue
            found = _weights(combine, nodes, ids.long(), top_k, ids_first)
            if found is not None:
                return Routing(top_k, node, ids_first, *found)
    dense = _dense(combine, nodes)
    if dense is not None:
        return Routing(top_k, None, False, dense, True)
    raise Unsuited(
        "no tensor of its forward holds the chosen experts and their weights",
        "compute ids [T, top_k] and weights [T, top_k] before the experts are called",
    )


def _weights(
    combine: Combine, nodes: list[Node], ids: Tensor, top_k: int, ids_first: bool
) -> tuple[Node | None, bool] | None:
    """(node or None for all 1, whether it is dense), or None where no node holds them."""
    expected = combine.weights.gather(1, ids)
    best: tuple[float, Node, bool] | None = None
    for node in nodes:
        for dense, value in (
            (False, _as_slots(node, len(ids), top_k, ids_first)),
            (True, _as_dense(node, combine.weights)),
        ):
            if value is None or not value.is_floating_point():
                continue
            error = _error(value.double().gather(1, ids) if dense else value.double(), expected)
            if error <= _tolerance(combine, value) and (best is None or error < best[0]):
                best = error, node, dense
    if best is None:
        return (None, False) if torch.equal(expected, torch.ones_like(expected)) else None
    return best[1], best[2]


def _dense(combine: Combine, nodes: list[Node]) -> Node | None:
    for node in nodes:
        value = _as_dense(node, combine.weights)
        if value is not None and value.is_floating_point():
            zeros = torch.equal(value.cpu() != 0, combine.weights != 0)
            if zeros and _error(value.double(), combine.weights) <= _tolerance(combine, value):
                return node
    return None


def _as_slots(node: Node, tokens: int, top_k: int, ids_first: bool) -> Tensor | None:
    """Value as [T, A] on the CPU, if it has that many elements in that order."""
    value = node.meta["value"]
    if value.numel() != tokens * top_k:
        return None
    if ids_first:
        return value.T.cpu() if top_k > 1 and value.shape == (top_k, tokens) else None
    return value.reshape(tokens, top_k).cpu() if top_k == 1 or value.shape[-1:] == (top_k,) else None


def _as_dense(node: Node, weights: Tensor) -> Tensor | None:
    value = node.meta["value"]
    fits = value.numel() == weights.numel() and value.shape[-1] == weights.shape[1]
    return value.reshape(weights.shape).cpu() if fits else None


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value.cpu() - expected).abs().max())


def _tolerance(combine: Combine, value: Tensor) -> float:
    """What the rounding of the coarsest dtype may change, where weights were added to the base as well."""
    combined = combine.node.meta["value"]
    dtypes = [combined.dtype, value.dtype, combine.tokens.meta["value"].dtype]
    size = max(float(combine.weights.abs().max()), float(combined.abs().max()))
    return max(torch.finfo(d).eps for d in dtypes) * size
