"""Routings to try a block with: which experts each token takes, and what the slots weigh.

A world has its own sizes too where these are symbols, so that nothing holds by the coincidence of two sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from .nodes import Sizes, seen_sizes

# Experts at random; all tokens on the same ones, the first or the last, so that others have none and these have many;
# slots of one token on the same expert; slots of no expert, by ids past the last one or below zero.
KINDS = ("random", "first", "last", "repeated", "past", "negative")

_LARGE = 64  # a hint from here on is halved for another size, below it is tripled


@dataclass(frozen=True)
class World:
    """ids: [T, A] experts; arbitrary, exact: [T, A] weights, any values, and such that sums are exact in 8 bits."""

    ids: Tensor
    arbitrary: Tensor
    exact: Tensor

    @property
    def slots(self) -> int:
        return self.ids.shape[1]

    def spread(self, weights: Tensor, experts: int) -> Tensor:
        """Weights [T, A] as [T, E], zero for experts that a token did not choose."""
        inside = (self.ids >= 0) & (self.ids < experts)
        share = torch.zeros(len(weights), experts, dtype=weights.dtype)
        return share.scatter_add(1, torch.where(inside, self.ids, 0), torch.where(inside, weights, 0))


def make_world(tokens: int, slots: int, choices: int, dtype: torch.dtype, kind: str) -> World:
    """A world of one of KINDS.

    Args:
        choices: how many experts there are to choose from.
        dtype: of the weights.
    """
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    crowd = (torch.arange(slots) + torch.arange(tokens)[:, None]) % slots
    if kind == "random":
        ids = torch.rand(tokens, choices, generator=generator).topk(slots, dim=1).indices
        # Few tokens may come out in the order of their experts, in which sorting them would not show.
        ids[:1], ids[-1:] = choices - 1 - crowd[:1], crowd[-1:]
    elif kind in ("repeated", "past", "negative"):
        low, high = -choices if kind == "negative" else 0, choices + (kind == "past")
        ids = torch.randint(low, high, (tokens, slots), generator=generator)
    else:
        ids = crowd if kind == "first" else choices - 1 - crowd
    sign = torch.randint(0, 2, (tokens, slots), generator=generator) * 2 - 1
    arbitrary = (torch.rand(tokens, slots, generator=generator) + 0.05) * sign
    exact = torch.exp2(-torch.randint(0, 2, (tokens, slots), generator=generator).double()) * sign.roll(1, 0)
    return World(ids, arbitrary.to(dtype), exact.to(dtype))


def sizes_to_try(limit: int, *nodes: Node) -> Iterator[Sizes]:
    """The sizes that tracing saw, and others if those of `nodes` are symbols, of which each is once past a limit."""
    symbols: dict[sympy.Symbol, int] = {}
    for node in nodes:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                symbols.update({s: v for s, v in seen_sizes(size).items() if s in size.node.expr.free_symbols})
    yield dict(symbols)
    other = {s: value // 2 if value >= _LARGE and value % 2 == 0 else 3 * value for s, value in symbols.items()}
    grown = {s: value * (limit // value + 1) for s, value in symbols.items()}
    beyond = [s for s in symbols if max(symbols[s], other[s]) <= limit]
    for symbol in beyond:
        yield {**other, symbol: grown[symbol]}
    if symbols and not beyond:
        yield other
