"""Finds, in a recording with stubs for experts, what each expert was given and where its result goes.

Stubs answer one row at a time with a unit vector, so that the value of a later node tells the weight with which each
(token, expert) entered it. The node sought is one through which every expert's result passes on its way to the
output, and whose rows are the weighted sums of the experts' rows of that token:

    combined[t] = base[t] + sum over e of weights[t, e] * expert_e(x[t])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..tensor import NVFP4Weight
from .linear import check_sum, rows_from
from .record import Unsuited
from .recorder import Recording, descendants, record


@dataclass(frozen=True)
class Combine:
    """How the experts' results enter the output.

    Attributes:
        recording: of the module, with experts that answer zero.
        tokens: node whose rows [T, K] experts are given.
        node: the weighted sum, [.., H]; everything of the experts that reaches the output goes through it.
        base: node of the same numel that the sum started from, None if from zero.
        weights: float64 [T, E], zero where an expert does not take part.
        weighted: "output", or "input" where x is multiplied before the expert.
        only_chosen: whether experts are given just the tokens that choose them.
    """

    recording: Recording
    tokens: Node
    node: Node
    base: Node | None
    weights: Tensor
    weighted: str
    only_chosen: bool


def find_combines(module: nn.Module, experts: list[nn.Module], x: Tensor, hidden: int) -> Iterator[Combine]:
    """Every node that may be the weighted sum, in the order of the forward.

    Args:
        module: whose forward calls the experts.
        x: its input; rows should differ.
        hidden: H, width of what an expert gives.

    Raises:
        Unsuited: the module does something else with its experts; the reason says what.
    """
    silent = record(module, experts, x, lambda _, rows: rows.new_zeros(len(rows), hidden))
    if not silent.calls:
        raise Unsuited("its forward does not call its experts", "call each expert as a module")
    token_of, scale_of, tokens = _match_rows(silent, x)
    slots = [(call.expert, row) for call in silent.calls for row in range(len(call.rows))]
    nodes = [n for n in _cuts(silent) if _could_be_sum(n, len(token_of_rows(tokens)), hidden)]
    if not nodes:
        raise Unsuited("the experts' results reach the output in more than one way", "add them up before anything else")
    values = _responses(module, experts, x, silent, nodes, len(slots), hidden)
    expert_of = torch.tensor([e for e, _ in slots])
    found = False
    for node in nodes:
        response = values[node]  # [slots, T]
        own = response.gather(1, token_of.unsqueeze(1)).squeeze(1)
        if not torch.equal(response.scatter(1, token_of.unsqueeze(1), 0.0), torch.zeros_like(response)):
            continue  # rows of one token reach another: not yet, or no longer, a row a token
        base_value = node.meta["value"]
        base = None if not base_value.any() else _equal_node(silent, node)
        if base_value.any() and base is None:
            continue
        weights = torch.zeros(response.shape[1], len(experts), dtype=torch.float64)
        weighted = "output" if scale_of is None else "input"
        if scale_of is not None:
            if not torch.equal(own, torch.ones_like(own)):
                continue
            own = scale_of
        try:
            check_sum(silent, module, node)
        except Unsuited:
            if found:
                return  # what follows a sum that was found stays in the forward
            raise
        found = True
        weights.index_put_((token_of, expert_of), own, accumulate=True)
        only_chosen = len(slots) == int((weights != 0).sum())
        yield Combine(silent, tokens, node, base, weights, weighted, only_chosen)


def token_of_rows(tokens: Node) -> Tensor:
    """Value of a node as rows [T, K]."""
    value = tokens.meta["value"]
    return value.reshape(-1, value.shape[-1])


def _match_rows(recording: Recording, x: Tensor) -> tuple[Tensor, Tensor | None, Node]:
    """(token of every row given to an expert [slots], its factor [slots] or None, node that holds the tokens)."""
    rows = torch.cat([call.rows for call in recording.calls])
    count = x.shape[:-1].numel()
    origins = rows_from(recording, rows.shape[-1])
    candidates = [
        n
        for n in before_experts(recording)[::-1]
        if n in origins
        and n.meta["value"].is_floating_point()
        and n.meta["value"].shape[-1:] == rows.shape[-1:]
        and token_of_rows(n).shape[0] == count
    ]
    # Those that are rows already come first, of these the last, to which everything was done that the experts see.
    candidates.sort(key=lambda n: n.meta["value"].dim() != 2)
    for node in candidates:
        known = token_of_rows(node)
        if known.dtype != rows.dtype:
            continue
        same = (rows.unsqueeze(1) == known).all(dim=-1)
        if bool((same.sum(dim=1) == 1).all()):
            return same.int().argmax(dim=1), None, node
    for node in candidates:
        known = token_of_rows(node).double()
        factor = rows.double() @ known.T / (known * known).sum(dim=1)  # [slots, T]
        distance = (rows.double().unsqueeze(1) - factor.unsqueeze(-1) * known).abs().amax(dim=-1)
        token = distance.argmin(dim=1)
        near = distance.gather(1, token.unsqueeze(1)).squeeze(1)
        if bool((near <= torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1)).all()) and bool(rows.any(dim=1).all()):
            return token, factor.gather(1, token.unsqueeze(1)).squeeze(1), node
    raise Unsuited(
        "rows given to an expert are no tokens of its input", "give experts rows of the hidden states, none masked to 0"
    )


def before_experts(recording: Recording) -> list[Node]:
    """Nodes with a tensor value, of what is computed before the first expert is called."""
    first = recording.order[recording.calls[0].node]
    values = [(n, n.meta["value"]) for n in recording.graph.nodes if recording.order[n] < first]
    return [n for n, value in values if isinstance(value, Tensor) and not isinstance(value, NVFP4Weight)]


def _could_be_sum(node: Node, tokens: int, hidden: int) -> bool:
    value = node.meta["value"]
    return isinstance(value, Tensor) and value.shape[-1:] == (hidden,) and value.numel() == tokens * hidden


def _cuts(recording: Recording) -> list[Node]:
    """Nodes through which every path from an expert's result to the output goes, in order."""
    nodes = list(recording.graph.nodes)
    bit = {node: 1 << i for i, node in enumerate(nodes)}
    reached = {recording.output: bit[recording.output]}
    for node in reversed(nodes):
        if node not in reached:
            continue
        for dep in node.meta["deps"]:
            through = bit[dep] | reached[node]
            reached[dep] = reached[dep] & through | bit[dep] if dep in reached else through
    common = -1
    for call in recording.calls:
        common &= reached.get(call.node, -1)
    return [n for n in nodes if common & bit[n] and n.op != "output"] if common != -1 else []


def _responses(
    module: nn.Module,
    experts: list[nn.Module],
    x: Tensor,
    silent: Recording,
    nodes: list[Node],
    slots: int,
    hidden: int,
) -> dict[Node, Tensor]:
    """For each node, how much each slot's result counts in each token's row: float64 [slots, T]."""
    index = {node: silent.order[node] for node in nodes}
    found = {node: torch.zeros(slots, token_of_rows(node).shape[0], dtype=torch.float64) for node in nodes}
    for first in range(0, slots, hidden):
        answered = record(module, experts, x, _unit_vectors(first, hidden))
        steps = list(answered.graph.nodes)
        if len(steps) != len(silent.order) or any(a.op != b.op for a, b in zip(steps, silent.order, strict=True)):
            raise Unsuited("its routing differs from call to call", "prepare() needs a deterministic forward")
        count = min(hidden, slots - first)
        for node in nodes:
            change = token_of_rows(steps[index[node]]).double() - token_of_rows(node).double()
            found[node][first : first + count] = change.T[:count].cpu()
    return found


class _unit_vectors:  # noqa: N801 - used as a function with a counter
    """Stub that answers the slots from ``first`` on with unit vectors and the others with zero."""

    def __init__(self, first: int, hidden: int) -> None:
        self._first, self._hidden, self._seen = first, hidden, 0

    def __call__(self, expert: int, rows: Tensor) -> Tensor:
        y = rows.new_zeros(len(rows), self._hidden)
        slots = torch.arange(self._seen, self._seen + len(rows)) - self._first
        self._seen += len(rows)
        shown = (slots >= 0) & (slots < self._hidden)
        y[shown.nonzero().squeeze(1), slots[shown]] = 1.0
        return y


def _equal_node(recording: Recording, node: Node) -> Node | None:
    """A node of the same value that does not depend on the experts."""
    depends = descendants(recording, {call.node for call in recording.calls})
    value = node.meta["value"]
    for other in recording.graph.nodes:
        known = other.meta["value"]
        if isinstance(known, Tensor) and other not in depends and known.numel() == value.numel():
            same = known.dtype == value.dtype and torch.equal(known.reshape(value.shape), value)
            if same:
                return other
    return None
