"""Proves that the nodes of a candidate compute what the moe op does, by trying routings.

Before:  nodes x, ids, weights and out, and the products between them
After:   the block's activation, layout and biases, or why it is none
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from fx_nvfp4.activation import parse

from .block import Block, Candidate
from .combine import Combine
from .found import Almost, Refused
from .limits import largest
from .nodes import Sizes, assuming, below, between, elements, fix, hint, is_size, is_tensor, shape_of
from .rounding import check_inside
from .routing import CannotTry, Routing
from .rows import Rows, Setting, follow
from .sample import OutOfRange
from .spread import check_linear
from .worlds import KINDS, World, make_world, sizes_to_try


def prove(candidate: Candidate) -> Block:
    """The block; raises `Refused` or `Unsupported` with what does not hold."""
    _fix_sizes(candidate)
    nodes = _token_nodes(candidate)
    block: Block | None = None
    with unset_fake_temporarily(), torch.no_grad():
        for sizes, kind in _worlds(candidate, nodes):
            try:
                with assuming(sizes):
                    found = _try(candidate, nodes, kind, sizes)
            except (CannotTry, OutOfRange):
                if kind not in ("past", "negative"):
                    raise
                continue  # ids that eager does not take either
            block = found if block is None else _both(block, found)
    assert block is not None
    if None in block.gatings:
        raise Refused("not all experts are used", "give every expert its rows")
    if any(not g.same_as(block.gating) for g in block.gatings if g is not None):
        raise Refused("experts have different activations", "give all experts of a block the same")
    check_linear(candidate, nodes)
    ups = [up.bias for g in block.gatings if g is not None for up in g.ups if up.bias is not None]
    check_inside(candidate, nodes, dict.fromkeys((*ups, *block.down_biases)))
    return block


def _fix_sizes(c: Candidate) -> None:
    """Under dynamic=True every size of every input is a symbol of its own; guards hold what all calls have in common.

    The columns of x and the slots of a token stay as they are, and x, ids and weights are of the same tokens.
    """
    routing = [node for node in (c.ids, c.weights) if node is not None]
    for node, size in ((c.x, c.k), *((node, c.slots) for node in routing)):
        last = node.meta["val"].shape[-1:]
        if node.meta["val"].dim() > 1 and hint(last[0]) == size:
            fix(last[0])
    tokens = c.x.meta["val"].shape[:-1]
    for node in routing:
        shape = node.meta["val"].shape[:-1]
        if len(shape) == len(tokens) and list(map(hint, shape)) == list(map(hint, tokens)):
            for one, other in zip(tokens, shape, strict=True):
                bool(one == other)


def _worlds(c: Candidate, tokens: frozenset[Node]) -> Iterator[tuple[Sizes, str]]:
    """Sizes and kinds of routing to try: each size with random experts and all tokens on the same."""
    first, *others = sizes_to_try(_limit(c, tokens), c.x, c.ids)
    kinds = ["random", "first"]
    if not c.distinct:
        kinds += ["repeated"]
    if not c.bounded:
        # Sorted rows of ids below zero would be those of other experts: no model has any.
        kinds += ["past"] if any(p.kind == "grouped" for u in c.units for p in u.products) else ["past", "negative"]
    for kind in kinds:
        yield dict(first), kind
    for sizes in others:
        yield dict(sizes), "random"
    for sizes in others or [first]:
        yield dict(sizes), "last"


def _limit(c: Candidate, tokens: frozenset[Node]) -> int:
    """The largest number in the routing that a symbolic count of tokens may pass; 0 where it is none."""
    if not any(isinstance(size, torch.SymInt) for node in (c.x, c.ids) for size in node.meta["val"].shape):
        return 0
    ends = [c.x, c.ids, *(part for unit in c.units for p in unit.products for part in p.parts)]
    ends += [] if c.weights is None else [c.weights]
    return largest(n for n in below(c.out, set(ends)) if n not in tokens)


def _try(c: Candidate, nodes: frozenset[Node], kind: str, sizes: Sizes) -> Block:
    """The block as one world shows it."""
    if c.tokens * c.slots != elements(c.ids) or c.tokens * c.features != elements(c.out):
        raise Refused(
            f"{c.ids.name} and {c.out.name} have other numbers of tokens than {c.x.name}",
            "keep the tokens' dims through the whole block",
        )
    dtype = torch.float32 if c.weights is None else c.weights.meta["val"].dtype
    world = make_world(c.tokens, c.slots, c.choices, dtype, kind)
    if c.weights is None:
        world = World(world.ids, torch.ones_like(world.arbitrary), torch.ones_like(world.exact))
    given_ids = world.ids
    if c.wraps:
        world = dataclasses.replace(world, ids=torch.where(world.ids < 0, world.ids + c.experts, world.ids))
    given = {c.ids: given_ids.reshape(shape_of(c.ids)).to(c.ids.meta["val"].dtype)}
    if c.weights is not None:
        weights = world.spread(world.arbitrary, c.experts) if c.per_expert else world.arbitrary
        given[c.weights] = weights.reshape(shape_of(c.weights))
    share = world.spread(world.arbitrary.double(), c.experts)
    chosen = world.spread(torch.ones(world.ids.shape), c.experts) > 0
    if c.per_expert:
        _check_zero_elsewhere(c, given[c.ids], world, sizes)
    routing = Routing(given, nodes, sizes)
    setting = Setting(c, world, nodes, routing, share, chosen, torch.Generator().manual_seed(KINDS.index(kind)))
    combine = Combine(setting)
    rows = {
        unit.down.node: follow(setting, unit, read) for unit, read in zip(c.units, combine.rows_read(), strict=True)
    }
    weighted = {r.weighted for r in rows.values()} - {""}
    if len(weighted) != 1:
        raise Refused("some rows are weighted before the products and others after", "weight all of them alike")
    gatings = tuple(r.gating for r in rows.values())
    block = Block(c, gatings, weighted.pop(), tuple(combine.biases), _is_dense(setting, rows))
    if any(p.activations == "dynamic" for unit in c.units for p in unit.products):
        _check_all_rows_are_slots(setting)
    if block.dense and block.weighted == "input":
        _check_zero_slots(block)
    combine.check(rows, block.weighted)
    return block


def following(first: Node, last: Node) -> set[Node]:
    """Nodes between two that are computed from the first."""
    found = {first}
    for node in between(first, last):
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def spreading(c: Candidate) -> set[Node]:
    """Nodes below the weights of all experts that follow from ids, or from constants, such as masks' minus infinity."""
    assert c.weights is not None
    found = following(c.ids, c.weights)
    constant = Routing({}, frozenset(), {})
    stack = [source for node in found if node is not c.ids for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and not is_size(node) and constant.foreign(node) is None:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _check_zero_elsewhere(c: Candidate, ids: Tensor, world: World, sizes: Sizes) -> None:
    """Weights of all experts must be zero where ids say so, whatever else they are computed from but constants."""
    assert c.weights is not None
    if not c.distinct:
        raise Refused(
            f"{c.weights.name} are weights of all experts, and {c.ids.name} may name one twice, and count twice",
            "choose experts by topk, or weight each slot",
        )
    follows = spreading(c)
    if c.weights not in follows:
        raise Refused(
            f"{c.weights.name} are weights of all experts, not of those chosen by {c.ids.name}",
            "scatter the weights of the chosen experts into zeros",
        )
    roots, stack, seen = {c.ids: ids}, [c.weights], {c.weights}
    generator = torch.Generator().manual_seed(len(ids))
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen or source is c.ids or is_size(source):
                continue
            seen.add(source)
            if source in follows:
                stack.append(source)
            elif is_tensor(source) and source.meta["val"].is_floating_point():
                value = torch.randn(shape_of(source), generator=generator)
                roots[source] = value.to(source.meta["val"].dtype)
    share = Routing(roots, frozenset(), sizes).value(c.weights).reshape(-1, c.experts)
    chosen = world.spread(torch.ones(world.ids.shape), c.experts) > 0
    if not bool((share[~chosen] == 0).all()):
        raise Refused(
            f"{c.weights.name} are not zero for experts that {c.ids.name} did not choose",
            "mask them to zero, or their scores to minus infinity before a sigmoid or softmax",
        )


def _is_dense(s: Setting, rows: dict[Node, Rows]) -> bool:
    """Whether any row is of an expert that its token did not choose."""
    for unit in s.candidate.units:
        token = rows[unit.down.node].token
        row = (token >= 0).nonzero()[:, 0]
        expert = s.experts_of(unit, unit.down, row)
        if not bool(s.chosen[token[row], expert].all()):
            return True
    return False


def _both(a: Block, b: Block) -> Block:
    """What two worlds say, of which one may have had no tokens for some experts."""
    gatings = []
    for one, other in zip(a.gatings, b.gatings, strict=True):
        if one is not None and other is not None and not one.same_as(other):
            raise Refused("the activation depends on the routing", "use the same for all tokens")
        gatings.append(one or other)
    if a.weighted != b.weighted:
        raise Refused("where weights are applied depends on the routing", "apply them at one place")
    biases = tuple(dict.fromkeys((*a.down_biases, *b.down_biases)))
    return Block(a.candidate, tuple(gatings), a.weighted, biases, a.dense or b.dense)


def _check_all_rows_are_slots(s: Setting) -> None:
    """Dynamic activation scales depend on all rows that an expert's weight multiplies."""
    slots = int(((s.world.ids >= 0) & (s.world.ids < s.candidate.experts)).sum())
    for number in range(len(s.candidate.units[0].products)):
        rows = 0
        for unit in s.candidate.units:
            product = unit.products[number]
            if product.kind == "merged":
                raise Almost("dynamic activation scales are taken over all experts at once", "use static scales")
            expert = s.experts_of(unit, product, torch.arange(elements(product.x) // product.k))
            rows += int((expert >= 0).sum())
        if rows != slots:
            what = f"dynamic activation scales are taken over {rows} rows, of which {slots} are slots of tokens"
            raise Almost(what, "use static scales, or multiply each expert by its own tokens alone")


def _check_zero_slots(block: Block) -> None:
    """Experts that see tokens which did not choose them, times a weight of zero, must give zero."""
    gatings, zero = [g for g in block.gatings if g is not None], torch.zeros(1)
    at_zero = [parse(g.activation).evaluate(None if g.layout == "plain" else zero, zero) for g in gatings]
    if (
        any(bool(h != 0) for h in at_zero)
        or block.down_biases
        or any(u.bias is not None for g in gatings for u in g.ups)
    ):
        what = "tokens that did not choose an expert enter it as zeros, and do not leave it as zeros"
        raise Almost(what, "weight the output, or use no bias and an activation that keeps zeros")


def _token_nodes(c: Candidate) -> frozenset[Node]:
    """Nodes between x and out that hold what belongs to tokens: what follows from x or a product, routing apart."""
    found = {c.x, *(p.node for unit in c.units for p in unit.products)}
    for node in between(min(found), c.out):
        if node not in (c.ids, c.weights) and not is_size(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return frozenset(found)
