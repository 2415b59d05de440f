"""Finds where blocks may lie: products of experts in pairs, and the nodes that may be x, ids, weights and out.

Before:  a graph with fx_nvfp4 ops
After:   candidates, the likeliest first; `proof` tells which of them is a block
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .block import Candidate, Unit
from .expert_products import ExpertProduct, expert_product
from .found import Refused
from .gathering import way, ways
from .nodes import CASTS, arguments, between, elements, is_float, is_size, is_tensor, shape_of
from .routing import Routing
from .sample import MOVES

aten = torch.ops.aten

_MOST_NODES = 4000  # of routing, or between two products
_MOST_SLOTS = 64
_MOST_STEPS = 16  # between an expert's product and the sum
_MOST_JOINS = 8  # steps after all of a block has come together, at which it may end
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten._grouped_mm.default}
_CHOOSING = {
    *(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable),
    *(aten.argmax.default, aten.max.dim),
}
_SAME_INTEGERS = {
    *(aten.view.default, aten.reshape.default, aten.clone.default, aten.slice.Tensor, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, torch.ops.prims.convert_element_type.default, aten.detach.default),
}
_SAME_ORDER = {
    *(aten.view.default, aten.reshape.default, aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
}


def find_units(graph: fx.Graph) -> list[tuple[Unit, ...]]:
    """Groups of units that may make up one block each."""
    products = {n: p for n in graph.nodes if (p := expert_product(n)) is not None}
    whole: list[tuple[Unit, ...]] = []
    apart: dict[Any, list[Unit]] = {}
    for down in products.values():
        ups = _ups(down, products)
        if ups is None:
            continue
        if down.kind != "linear":
            whole.append((Unit(ups, down),))
        elif (source := _routing_source(Unit(ups, down))) is not None:
            key = source, [_kind(p) for p in (*ups, down)]
            apart.setdefault(str(key), []).append(Unit(ups, down))
    numbered = [tuple(_numbered(units)) for units in apart.values()]
    return whole + [units for units in numbered if len(units) > 1]


def _kind(product: ExpertProduct) -> tuple[Any, ...]:
    """What products of one block have in common, expert by expert."""
    whole = (product.parts, product.act_scale) if product.experts else None
    return product.rows, product.k, product.first, product.activations, product.dialect, whole


def _numbered(units: list[Unit]) -> Iterator[Unit]:
    """Units of one expert each with its number: which of the weight's experts it is, or which unit."""
    for number, unit in enumerate(units):
        yield Unit(unit.ups, unit.down, number if unit.down.expert is None else unit.down.expert)


def _ups(down: ExpertProduct, products: dict[Node, ExpertProduct]) -> tuple[ExpertProduct, ...] | None:
    """The products that a down product's x is made of by pointwise ops and moves, if they fit it."""
    found: dict[Node, ExpertProduct] = {}
    stack, seen = [down.x], {down.x}
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node in products:
            found[node] = products[node]
            continue
        if node.op != "call_function" or not _is_stepwise(node):
            # A layer's own weight that takes rows from elsewhere too, a residual say, is no expert's.
            if node is down.x or (not down.experts and elements(node) >= elements(down.x)):
                return None
            continue
        new = [n for n in node.all_input_nodes if n not in seen and is_float(n)]
        new += [n for n in node.all_input_nodes if n not in seen and isinstance(n.meta.get("val"), (tuple, list))]
        stack += new
        seen.update(new)
    ups = tuple(sorted(found.values(), key=lambda p: p.node))
    fit = 1 <= len(ups) <= 2 and all(up.experts == down.experts and up.expert == down.expert for up in ups)
    return ups if fit and all(up.rows in (down.k, 2 * down.k) for up in ups) else None


def _is_stepwise(node: Node) -> bool:
    if isinstance(node.meta.get("val"), (tuple, list)):
        return node.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
    cast = node.target in CASTS or node.target is aten.clamp.default
    return MOVES.of(node) is not None or cast or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _routing_source(unit: Unit) -> Node | None:
    """The node that expert ids first appear in, if what surrounds the products of one expert depends on any."""
    beside: list[Node] = []
    node = unit.down.node
    for _ in range(_MOST_STEPS):  # up to where it is added to what other experts give
        if len(node.users) != 1:
            break
        user = next(iter(node.users))
        beyond = [n for n in user.all_input_nodes if n is not node]
        if user.target is aten.add.Tensor and not any(elements(n) < elements(node) for n in beyond):
            break  # no bias
        beside += beyond
        if user.target in (aten.index_add.default, aten.index_put.default):
            break
        node = user
    for up in unit.ups:
        node = up.x
        while node.op == "call_function" and MOVES.of(node) is not None and is_tensor(node):
            beside += node.all_input_nodes[1:]
            node = node.all_input_nodes[0]
    return next(iter(integer_sources(beside)), None)


def integer_sources(nodes: Iterable[Node]) -> list[Node]:
    """Integers that nodes are computed from and that are computed from no others, the nearest first.

    Products of floating-point tensors, such as a router's, are not looked behind.
    """
    seen = {n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    queue, found = list(seen), []
    while queue and len(seen) < _MOST_NODES:
        node = queue.pop(0)
        if is_tensor(node) and not node.meta["val"].is_floating_point():
            inputs = _tensors_below(node)
            if inputs and not any(not n.meta["val"].is_floating_point() for n in inputs):
                found.append(node)
                continue
            if not inputs and node.op == "placeholder":
                found.append(node)
        elif node.target in _PRODUCTS or expert_product(node) is not None:
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        queue += new
    return found


def _tensors_below(node: Node) -> list[Node]:
    """Tensors that a node is computed from; what returns several tensors is looked through."""
    nodes = node.all_input_nodes
    several = [n for n in nodes if isinstance(n.meta.get("val"), (tuple, list))]
    return [n for n in (*nodes, *(m for s in several for m in s.all_input_nodes)) if is_tensor(n)]


def joins(units: tuple[Unit, ...]) -> Iterator[Node]:
    """Nodes that everything computed from the up products passes through: where a block may end."""
    first = {p.node for unit in units for p in unit.products}
    downs = {unit.down.node for unit in units}
    waiting: dict[Node, int] = {}  # how many users of each node are still to come
    unfinished, started, found = 0, 0, 0
    for node in between(min(first)):
        inside = node in first or any(n in waiting for n in node.all_input_nodes)
        if not inside or is_size(node):
            continue
        if node.op == "output" or found == _MOST_JOINS or len(waiting) > _MOST_NODES:
            return
        for source in node.all_input_nodes:
            if source in waiting:
                waiting[source] -= 1
                unfinished -= not waiting[source]
        started += node in downs
        if not unfinished and started == len(downs) and node not in downs and is_float(node):
            found += MOVES.of(node) is None
            yield node
        waiting[node] = sum(not is_size(user) for user in node.users)
        unfinished += waiting[node] > 0


def candidates(units: tuple[Unit, ...]) -> Iterator[Candidate]:
    """Where the block of some units may lie, the likeliest first."""
    ends = list(joins(units))
    for x in dict.fromkeys(path[-1] for path in ways(units[0].ups[0].x)):
        yield from _with_tokens(units, x, ends)


def _with_tokens(units: tuple[Unit, ...], x: Node, ends: list[Node]) -> Iterator[Candidate]:
    """Candidates with rows x."""
    k, features = units[0].ups[0].k, units[0].down.rows
    tokens, experts = elements(x) // k, units[0].down.experts or len(units)
    for out in ends:
        if not tokens or elements(out) * k != elements(x) * features:
            continue
        inside = _inside(units, out, x)
        outside = _outside(units, inside) - {x}
        cone = _routing_cone(outside, x)
        for ids in _ids(cone, outside, inside, tokens):
            choices, choosers = _choices(ids)
            distinct = tokens in (choosers, elements(ids))
            bounded = choices is not None
            for weights, per_expert in _weights(cone, outside, inside, ids, tokens * experts):
                for wraps in (False,) if bounded else (False, True):
                    yield Candidate(
                        units, x, ids, weights, per_expert, choices or experts, out, distinct, bounded, wraps
                    )


def why_none(units: tuple[Unit, ...]) -> Refused:
    """Why there is no candidate."""
    ends = list(joins(units))
    if not ends:
        return Refused("its intermediate values are used outside of it", "use only the sum of the experts' results")
    x = way(units[0].ups[0].x)[-1]
    if not any(elements(out) * units[0].ups[0].k == elements(x) * units[0].down.rows for out in ends):
        return Refused(f"there is no sum of what the experts give for each row of {x.name}", "sum over the slots")
    return Refused("no integers say which experts a token takes", "route by the ids of the top-k experts")


def why_trained(units: tuple[Unit, ...]) -> Refused | None:
    """The reason of a block whose values, up to what is summed, the backward pass reads."""
    inside = _inside(units, units[-1].down.node)
    stack = [unit.down.node for unit in units]
    while stack:  # as a trained router reads the results that its weights multiply
        new = [n for n in stack.pop().users if n not in inside and (n.target in CASTS or MOVES.of(n) is not None)]
        inside.update(new)
        stack += new
    readers = (user for node in inside for user in node.users)
    if any(user.meta.get("partitioner_tag") == "is_backward" for user in readers):
        what = "its intermediate values are needed for gradients, of its input or of its routing weights"
        return Refused(what, "freeze both, or run under torch.no_grad(); its products run as ops, there and back")
    return None


def _outside(units: tuple[Unit, ...], inside: set[Node]) -> set[Node]:
    """What nodes inside are computed from besides each other and packed weights."""
    products = {p.node: p for unit in units for p in unit.products}
    below = (products[n].inputs if n in products else n.all_input_nodes for n in inside)
    return {n for nodes in below for n in nodes if n not in inside}


def _ids(cone: list[Node], outside: set[Node], inside: set[Node], tokens: int) -> Iterator[Node]:
    """Integers of a few for each token, from which all others in the block follow, the earliest first."""
    integers = [n for n in outside if not is_size(n) and is_tensor(n) and not n.meta["val"].is_floating_point()]
    for node in reversed(cone):
        fits = node.meta["val"].dtype in (torch.int64, torch.int32) and elements(node) and not elements(node) % tokens
        if not fits or node.target in _SAME_ORDER or elements(node) // tokens > _MOST_SLOTS:
            continue
        if not _follow([node], (), inside) and _follow(integers, (node,), inside):
            yield node


def _weights(
    cone: list[Node], outside: set[Node], inside: set[Node], ids: Node, spread: int
) -> Iterator[tuple[Node | None, bool]]:
    """Nodes that may hold the routing weights: of slots, the latest first, then of all experts, then none.

    All routing in the block must follow from them and the ids.
    """
    routing = [n for n in outside if is_tensor(n) and not _is_parameter(n)]
    if _follow(routing, (ids,), inside):
        yield None, False
    last = sorted(cone, key=lambda node: not _apart(ids, node))  # a permutation of weights follows from ids
    for per_expert, size in ((False, elements(ids)), (True, spread)):
        for node in last:
            fits = node.meta["val"].is_floating_point() and elements(node) == size and node.target not in _SAME_ORDER
            if fits and _follow(routing, (ids, node), inside) and not (per_expert and _apart(ids, node)):
                yield node, per_expert


def _apart(ids: Node, weights: Node) -> bool:
    """Whether weights are computed without ids."""
    stack, seen = [weights], {weights}
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in seen]
        if ids in new:
            return False
        seen.update(n for n in new if n.target not in _PRODUCTS)
        stack += [n for n in new if n.target not in _PRODUCTS]
    return True


def _follow(nodes: Iterable[Node], given: tuple[Node, ...], inside: set[Node]) -> bool:
    """Whether nodes are computed from what is given alone."""
    routing = Routing({node: torch.empty(0) for node in given}, frozenset(inside), {})
    return all(routing.foreign(node) is None for node in nodes)


def _is_parameter(node: Node) -> bool:
    """Whether a node is a float input of the graph, or a view or cast of one, such as a bias."""
    while node.op == "call_function" and (MOVES.of(node) is not None or node.target in CASTS) and is_tensor(node):
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr") and is_float(node)


def _inside(units: tuple[Unit, ...], last: Node, x: Node | None = None) -> set[Node]:
    """Nodes computed from the products up to `last`, and those by which their rows are gathered from x."""
    found = {p.node for unit in units for p in unit.products}
    for node in between(min(found), last):
        if not is_size(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    for unit in units:
        for up in unit.ups:
            found.update(next((path[: path.index(x)] for path in ways(up.x) if x in path), ()))
    return found


def _routing_cone(outside: set[Node], x: Node) -> list[Node]:
    """Nodes that routing is computed by, the latest first; products of floating-point tensors end it."""
    seen, stack = set(outside), list(outside)
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node is x or node.op == "placeholder" or node.target in _PRODUCTS or expert_product(node) is not None:
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        stack += new
    return sorted((n for n in seen if is_tensor(n)), reverse=True)


def _choices(ids: Node) -> tuple[int | None, int]:
    """How many experts ids choose from, and how many rows of an op that gives each row different ones; (None, 0) if
    they come from no such op. A token whose ids come from several rows, as those of two routers, may have one twice."""
    while ids.target in _SAME_INTEGERS and is_tensor(ids.args[0]):
        ids = ids.args[0]  # type: ignore[assignment]
    call = ids.args[0] if ids.target is operator.getitem and ids.args[1] == 1 else ids
    if isinstance(call, Node) and call.target in _CHOOSING:
        a = arguments(call)
        if a.dim % len(shape_of(a.self)) == len(shape_of(a.self)) - 1 and not isinstance(
            a.self.meta["val"].shape[-1], torch.SymInt
        ):
            choices = shape_of(a.self)[-1]
            return choices, elements(a.self) // choices
    return None, 0
