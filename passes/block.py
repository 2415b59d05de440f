"""What is said about a mixture-of-experts block: the nodes it runs between, and what it computes.

Before:  x, ids, weights -> sort -> gather -> grouped -> activation -> grouped -> scatter -> weighted sum -> out
After:   out[t] = sum over a of weights[t, a] * down(activation(up(x[t]))), by expert ids[t, a]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from .expert_products import ExpertProduct
from .gating import Gating
from .nodes import elements


@dataclass(frozen=True)
class Unit:
    """The products of all experts, or of one: one or two up products, whose results make the down product's x.

    expert: of a unit that is one expert's.
    """

    ups: tuple[ExpertProduct, ...]
    down: ExpertProduct
    expert: int | None = None

    @property
    def products(self) -> tuple[ExpertProduct, ...]:
        return *self.ups, self.down


@dataclass(frozen=True)
class Candidate:
    """Nodes between which a block may lie.

    weights: [T, A] or, where `per_expert`, [T, E], zero for experts that a token did not choose; None for no weights.
    choices: how many experts the ids choose from; those from `experts` on have no weights here.
    distinct, bounded: whether the experts of one token are different ones, and none but those there are to choose from,
        by the op that makes the ids.
    wraps: whether ids below zero count experts from the end.
    bias_owners: parameters that are the down bias of one expert -> the expert.
    """

    units: tuple[Unit, ...]
    x: Node
    ids: Node
    weights: Node | None
    per_expert: bool
    choices: int
    out: Node
    distinct: bool
    bounded: bool
    wraps: bool
    bias_owners: Mapping[Node, int] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return self.units[0].down.experts or len(self.units)

    @property
    def k(self) -> int:
        return self.units[0].ups[0].k

    @property
    def features(self) -> int:
        """Output features, H."""
        return self.units[0].down.rows

    @property
    def tokens(self) -> int:
        return elements(self.x) // self.k

    @property
    def slots(self) -> int:
        """Experts a token chooses, A."""
        return elements(self.ids) // max(self.tokens, 1)


@dataclass(frozen=True)
class Block:
    """A block that is proven to compute what the module docstring says.

    gatings: of each unit; they differ in nothing but weights and biases (None only while it is tried).
    weighted: whether weights multiply the "output" or the "input" of the experts.
    down_biases: [E, H], or one [H] for each unit where each expert has its own.
    dense: whether experts also see tokens that did not choose them.
    """

    candidate: Candidate
    gatings: tuple[Gating | None, ...]
    weighted: str
    down_biases: tuple[Node, ...]
    dense: bool

    @property
    def gating(self) -> Gating:
        """That of the first unit, which the others share but for weights."""
        assert self.gatings[0] is not None
        return self.gatings[0]
