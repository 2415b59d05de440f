"""Follows rows of a down product back to the tokens they are of: through the activation, the up products, the gather.

Before:  down.x[r, :] <- activation <- up[r', :] <- up.x[r', :] <- index <- x
After:   row r is token t's, for each row asked for; the activation; whether rows are weighted before the products
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .block import Candidate, Unit
from .coords import Coords, unravel
from .expert_products import ExpertProduct
from .expression import Tracer
from .found import Refused
from .gating import Gating, half, read_gating
from .leaves import mix
from .nodes import elements, flat_index, shape_of
from .probe import Read
from .routing import Routing
from .walk import Walk
from .worlds import World

NOWHERE, PADDING = -2, -1  # rows that nobody asked for, and rows of no token


@dataclass(frozen=True)
class Setting:
    """A candidate block in one world.

    nodes: those that hold what belongs to a token.
    routing: values of those that do not.
    share: [T, E] weights of experts for each token, 0 where not chosen; chosen: whether they are.
    """

    candidate: Candidate
    world: World
    nodes: frozenset[Node]
    routing: Routing
    share: Tensor
    chosen: Tensor
    generator: torch.Generator

    def locate(self, unit: Unit, product: ExpertProduct, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row of x, expert or -1, feature) of elements of a product's result."""
        row, expert, feature = product.locate(index, self.routing.value)
        return row, expert if unit.expert is None else torch.full_like(row, unit.expert), feature

    def experts_of(self, unit: Unit, product: ExpertProduct, row: Tensor) -> Tensor:
        """The expert, or -1, of rows of a product."""
        if unit.expert is not None:
            return torch.full_like(row, unit.expert)
        return product.experts_of(row, self.routing.value)


@dataclass(frozen=True)
class Rows:
    """token: of each row of a down product; NOWHERE for those not followed, PADDING for those of no token.

    weighted: "output" if rows are the tokens' as they are, "input" if weighted, "" if there were none; so for gating.
    """

    token: Tensor
    weighted: str
    gating: Gating | None


def follow(s: Setting, unit: Unit, rows: Tensor) -> Rows:
    """What `rows` of the unit's down product are made of; raises `Refused` or `Unsupported`."""
    down, width = unit.down, unit.down.k
    if down.kind == "merged":
        raise Refused(
            f"{down.node.name} takes the same rows for all experts", "give each expert what its own up product makes"
        )
    if not len(rows):  # an expert without tokens
        return Rows(torch.full((elements(down.x) // width,), NOWHERE), "", None)
    row, column = _cross(s, rows, width)
    expert = s.experts_of(unit, down, row)
    ups = {up.node: up for up in unit.ups}

    def values(node: Node, at: Coords) -> Tensor | None:
        if node is s.candidate.x:
            raise Refused(f"the activation reads {node.name}", "let it be a function of the up products alone")
        if node in ups:
            return reals(flat_index(node, at.index)).to(node.meta["val"].dtype)
        is_input = node.op in ("placeholder", "get_attr") and node not in s.nodes
        return torch.zeros(len(at.sample), dtype=node.meta["val"].dtype) if is_input else None

    tracer = Tracer(s.nodes, s.routing, values)
    got = tracer.evaluate(down.x, coordinates(down.x, row, column, width))
    traced = tracer.traced(tuple(ups))
    halves, token, weighted = [], torch.full_like(row, NOWHERE), ""
    for operand in traced.operands:
        up = ups[operand.node]
        up_row, up_expert, feature = s.locate(unit, up, operand.at.index)
        if not torch.equal(up_expert, expert):
            raise Refused(f"{down.node.name} takes rows of other experts than {up.node.name}", "keep rows in order")
        operand_values = reals(flat_index(up.node, operand.at.index)).to(up.node.meta["val"].dtype)
        halves.append(half(operand, up, up_expert, feature, column, width, operand_values))
        of_row, weighted = _gather(s, unit, up, up_row)
        if bool(((token != of_row[up_row]) & (token != NOWHERE)).any()):
            raise Refused("gate and up are of different tokens", "multiply the same rows by both")
        token = of_row[up_row]
    of_row = torch.full((elements(down.x) // width,), NOWHERE)
    of_row[row] = token
    if not torch.equal(of_row[row], token):
        raise Refused(f"a row of {down.node.name} is made of several tokens'", "keep rows apart")
    return Rows(of_row, weighted, read_gating(traced, halves, width, got))


def _gather(s: Setting, unit: Unit, up: ExpertProduct, rows: Tensor) -> tuple[Tensor, str]:
    """(token of each row of an up product's x, whether rows are weighted: see `Rows`)."""
    x, k = s.candidate.x, s.candidate.k
    row, column = _cross(s, rows.unique(), k)

    def values(node: Node, at: Coords) -> Tensor | None:
        return reals(flat_index(node, at.index)).to(node.meta["val"].dtype) if node is x else None

    walk = Walk(s.nodes, s.routing, values)
    got = walk.evaluate(up.x, coordinates(up.x, row, column, k))
    read = Read.gather(x, walk.reads.get(x, ()), len(row))
    flat = flat_index(x, read.index)
    if not read.unique or not torch.equal(flat[read.seen] % k, column[read.seen]):
        raise Refused(f"rows of {up.node.name} are not rows of {x.name}", "gather whole rows of x")
    if not bool((got[~read.seen] == 0).all()):
        raise Refused(f"rows of {up.node.name} hold more than tokens and zeros", "gather whole rows of x")
    token = torch.where(read.seen, flat // k, PADDING)
    of_row = torch.full((elements(up.x) // k,), NOWHERE)
    of_row[row] = token
    if not torch.equal(of_row[row], token):
        raise Refused(f"a row of {up.node.name} is made of several tokens'", "gather whole rows of x")
    return of_row, _weighted(s, unit, up, row, token, got, reals(flat).to(x.meta["val"].dtype))


def _weighted(s: Setting, unit: Unit, up: ExpertProduct, row: Tensor, token: Tensor, got: Tensor, x: Tensor) -> str:
    """Whether elements `got` of an up product's x are the tokens' x as they are, or weighted, all of them."""
    seen = token >= 0
    if not bool(seen.any()):
        return ""
    if torch.equal(got[seen], x[seen].to(got.dtype)):
        return "output"
    expert = s.experts_of(unit, up, row)
    share = s.share[token.clamp(min=0), expert.clamp(min=0)]
    seen &= expert >= 0
    if up.kind != "merged" and x.dtype == got.dtype and s.candidate.weights is not None:
        product = (x.float() * share.to(s.candidate.weights.meta["val"].dtype).float()).to(got.dtype)
        if torch.equal(got[seen], product[seen]):
            return "input"
    raise Refused(
        f"the rows of {up.node.name} are neither those of {s.candidate.x.name} nor weighted by routing",
        "multiply them by the weights of the chosen experts, and by zero for others, or weight the results",
    )


def _cross(s: Setting, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(row, column) of samples: every row in some column and every column in some row."""
    column = torch.randint(0, width, (len(rows),), generator=s.generator)
    some = rows[torch.randint(0, len(rows), (width,), generator=s.generator)]
    return torch.cat((rows, some)), torch.cat((column, torch.arange(width)))


def coordinates(node: Node, row: Tensor, column: Tensor, width: int) -> Tensor:
    """Coordinates [S, rank] of elements of rows of `width` of a tensor."""
    return torch.stack(unravel(row * width + column, shape_of(node)), 1)


def reals(flat: Tensor) -> Tensor:
    """Values of elements numbered `flat`: from -8 to 8, or a few times as much, with all bits of a bfloat16."""
    bits = mix(flat[:, None], torch.zeros_like(flat), 3)
    return (bits % 4096 - 2047.5) / 256 * torch.tensor([1.0, 1.0, 0.25, 4.0])[bits // 4096 % 4]
