"""The ops between a matmul operand and its leaves: which leaves are packed, which choose experts, and equal cones."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from .nodes import fixed
from .sample import Sampler, arguments, inputs_of, is_supported, is_tensor, shape_of

aten = torch.ops.aten
prims = torch.ops.prims

BYTES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)  # dtypes that packed codes come in
WORDS = (torch.int64, torch.int32, torch.uint32, torch.int16, torch.uint16)  # and those that ids and places come in too

_CODED = (torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e5m2)
_MAX_CONE = 4000
_MAX_INNER, _MAX_FACTORS = 4, 4
_MAX_REDUCED = 64  # elements that a weight may be summed over, as one-hot codes are
_REDUCING = (
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
    aten.amax.default,
    aten.amin.default,
)
_LAYOUT_ONLY = {
    *(aten.clone.default, aten.alias.default, aten.detach.default, aten.expand.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view.default, aten.reshape.default),
    *(prims.convert_element_type.default, aten._to_copy.default, aten._unsafe_view.default),
}
GATHERING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.embedding.default),
    *(aten.index_select.default, aten.gather.default),
}
_UNPACKING = {
    *(aten.bitwise_and, aten.bitwise_right_shift, aten.__rshift__, aten.remainder, aten.div, aten.floor_divide),
    *(aten.__and__, aten.view, aten.bitwise_left_shift, aten.__lshift__, aten.bitwise_xor, aten.fmod),
}


@dataclass(frozen=True)
class Cone:
    """The nodes between an operand and its leaves, found without evaluating anything."""

    operand: Node
    nodes: tuple[Node, ...]
    packed: frozenset[Node]

    @staticmethod
    def above(operand: Node) -> Cone | None:
        """The cone of an operand, or None if there are no leaves of packed integers in it."""
        nodes: dict[Node, None] = {}
        stack, packed = [operand], []
        while stack:
            node = stack.pop()
            if node in nodes:
                continue
            nodes[node] = None
            if len(nodes) > _MAX_CONE:
                return None
            if is_supported(node):
                stack += inputs_of(node)
            elif _may_be_packed(node):
                packed.append(node)
        packed = [n for n in packed if n.meta["val"].dtype in BYTES or _is_unpacked(n, nodes)]
        packed = [n for n in packed if n.meta["val"].dim() > 0]
        return Cone(operand, tuple(nodes), frozenset(packed)) if packed else None

    @cached_property
    def index_leaves(self) -> dict[Node, tuple[Node, int]]:
        """Integer nodes that choose experts or rows -> (the one that stands for all equal ones, bound of its values).

        They do not depend on packed data, and are taken as they are: routing lies behind them. Symbolic numbers that
        select one expert are among them.
        """
        sources = Sampler(lambda node, at: None).sources
        found: dict[Node, tuple[Node, int]] = {}
        for node in self.nodes:
            if not is_supported(node):
                continue
            if place := _symbolic_place(node):
                found[place[0]] = place
            for index, size in _indices(node):
                root = _without_broadcast(index)
                below = sources(root)
                if not below or below & self.packed:
                    continue
                equal = next((n for n, _ in found.values() if _same_value(n, root)), root)
                bound = min(size, found[equal][1]) if equal in found else size
                found[equal] = found[root] = (equal, bound)
        return found

    def computed_from(self, leaves: set[Node], constants: set[Node]) -> list[Node]:
        """The first few nodes that are computed from all of `leaves`, and otherwise from `constants` alone."""
        sources = Sampler(lambda node, at: None).sources
        inner = [
            n for n in self.nodes if is_supported(n) and _is_float(n) and leaves <= sources(n) <= leaves | constants
        ]
        return sorted(inner)[:_MAX_INNER] if leaves else []

    def factors(self) -> list[float]:
        """Numbers written in the program that something is multiplied with or divided by."""
        found: dict[float, None] = {}
        for node in self.nodes:
            if getattr(node.target, "overloadpacket", None) not in (aten.mul, aten.div):
                continue
            for arg in node.args:
                if isinstance(arg, Node) and arg.target is aten.full.default:
                    arg = arg.args[1]
                if isinstance(arg, (int, float)) and arg not in (0, 1):
                    found[float(arg)] = None
        return list(found)[:_MAX_FACTORS]


def _is_float(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return dtype.is_floating_point and dtype.itemsize > 1


def holds_codes(cone: Cone) -> bool:
    """Whether anything is done to the packed leaves that takes codes apart, or a block scale is among the leaves.

    Without either they are plain bytes, such as those of an image, in whatever order they are read.
    """
    inside, stack = set(cone.nodes), list(cone.packed)
    if any(n.meta["val"].dtype in _CODED for n in inside if not is_supported(n)):
        return True
    seen = set(stack)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in inside or user in seen:
                continue
            if _takes_codes_apart(user, node):
                return True
            seen.add(user)
            stack.append(user)
    return False


class Reach:
    """Which nodes of a graph depend on leaves that may be packed, found once for each node.

    What is summed over many elements is no weight any more, and depends on none.
    """

    def __init__(self) -> None:
        self._known: dict[Node, bool] = {}

    def __call__(self, node: Node) -> bool:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            if not is_supported(current):
                self._known[current] = _may_be_packed(current)
                continue
            sources = inputs_of(current)
            if missing := [source for source in sources if source not in self._known]:
                stack += missing
            else:
                self._known[current] = any(self._known[s] for s in sources) and not _sums_many(current)
        return self._known[node]


def _sums_many(node: Node) -> bool:
    if node.target not in _REDUCING:
        return False
    return math.prod(shape_of(inputs_of(node)[0])) > _MAX_REDUCED * math.prod(shape_of(node))


def _may_be_packed(leaf: Node) -> bool:
    """Whether codes come in a leaf's dtype.

    int64 is that of places too, and of ids, with which a model begins: words of codes are stored in two dims, and taken
    apart.
    """
    value = leaf.meta["val"]
    if value.dtype == torch.int64:
        return leaf.op in ("placeholder", "get_attr") and value.dim() > 1 and _is_unpacked(leaf)
    return value.dtype in (*BYTES, *WORDS)


def _takes_codes_apart(user: Node, node: Node) -> bool:
    packet = getattr(user.target, "overloadpacket", None)
    if packet in (aten.div, aten.mul, aten.floor_divide):
        return any(arg in (16, 1 / 16) for arg in user.args[1:] if isinstance(arg, (int, float)))
    if user.target in GATHERING:
        return any(index is node for index, _ in _indices(user))
    return user.target is aten.view.dtype or (packet in _UNPACKING and packet is not aten.view)


def _is_unpacked(leaf: Node, cone: Mapping[Node, None] | None = None) -> bool:
    """Whether a leaf of words is taken apart bit by bit, in a cone or anywhere, as packed codes are and ids are not."""
    stack = [leaf]
    while stack:
        node = stack.pop()
        for user in node.users:
            inside = cone is None or user in cone
            if not inside or user.op != "call_function" or user.args[0] is not node:
                continue
            if user.target is aten.view.dtype:
                return True
            if user.target in _LAYOUT_ONLY or user.target in (aten.permute.default, *GATHERING, aten.slice.Tensor):
                stack.append(user)
            elif getattr(user.target, "overloadpacket", None) in _UNPACKING:
                return True
    return False


def _same_value(a: Any, b: Any, known: dict[tuple[Node, Node], bool] | None = None) -> bool:
    """Whether two arguments are spelled the same from the same nodes; known: pairs that were compared already."""
    known = {} if known is None else known
    if isinstance(a, Node) and isinstance(b, Node):
        if a is b:
            return True
        if not is_tensor(a) or not is_tensor(b):  # sizes
            return str(a.meta.get("val", a)) == str(b.meta.get("val", b))
        if (a, b) not in known:
            calls = a.op == b.op == "call_function" and a.target == b.target and a.kwargs == b.kwargs
            known[a, b] = calls and is_supported(a) and _same_value(a.args, b.args, known)
        return known[a, b]
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same_value(x, y, known) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _indices(node: Node) -> list[tuple[Node, int]]:
    """(index tensor, size of the dimension that it indexes) of a gathering op."""
    if node.target not in GATHERING:
        return []
    a = arguments(node)
    if node.target is aten.embedding.default:
        return [(a.indices, shape_of(a.weight)[0])]
    shape = shape_of(a.self)
    if node.target in (aten.index_select.default, aten.gather.default):
        return [(a.index, shape[a.dim])] if shape else []
    return [(index, size) for index, size in zip(a.indices, shape, strict=False) if index is not None]


def _symbolic_place(node: Node) -> tuple[Node, int] | None:
    """(the symbolic number that it selects at, size of the dimension)."""
    if node.target is not aten.select.int:
        return None
    a = arguments(node)
    return (a.index, shape_of(a.self)[a.dim]) if isinstance(a.index, Node) and fixed(a.index) is None else None


def _without_broadcast(index: Node) -> Node:
    """What an index tensor is a broadcast or cast copy of."""
    while index.op == "call_function" and index.target in _LAYOUT_ONLY:
        source = index.args[0]
        assert isinstance(source, Node)
        val = source.meta["val"]
        expanded = index.target is aten.expand.default
        if (
            val.dtype == torch.bool
            or val.is_floating_point()
            or not (expanded or _squeezed(source) == _squeezed(index))
        ):
            break
        index = source
    return index


def _squeezed(node: Node) -> list[int]:
    return [size for size in shape_of(node) if size != 1]


def cone_key(node: Node) -> Hashable:
    """Equal for operands that are spelled the same from leaves of the same kinds, such as 128 experts' weights.

    Nodes are numbered in the order in which a walk from the operand meets them, and so are those of `cone_nodes`: the
    result for one operand, its nodes replaced by their counterparts, is that for every other with an equal key, if the
    `constants` named in its `tables` have equal values too.
    """
    return structure(cone_nodes(node))


def structure(nodes: Sequence[Node]) -> Hashable:
    """How nodes are computed from one another, and of what kind is what they are computed from besides."""
    numbers = {n: i for i, n in enumerate(nodes)}

    def plain(arg: Any) -> Hashable:
        if isinstance(arg, (list, tuple)):
            return tuple(map(plain, arg))
        if not isinstance(arg, Node):
            return type(arg).__name__, str(arg)
        if arg in numbers:
            return "node", numbers[arg]
        if isinstance(arg.meta.get("val"), (list, tuple)):  # split and its like, which only getitem refers to
            return call(arg)
        return "value", str(arg.meta.get("val"))

    def call(n: Node) -> Hashable:
        return str(n.target), plain(n.args), tuple((k, plain(v)) for k, v in sorted(n.kwargs.items()))

    def entry(n: Node) -> Hashable:
        val = n.meta["val"]
        return (call(n) if is_supported(n) else n.op), str(val.dtype), *map(str, val.shape)

    return tuple(map(entry, numbers))


def cone_nodes(node: Node) -> tuple[Node, ...]:
    """The nodes of an operand's cone, in an order that depends on its structure alone."""
    nodes: dict[Node, None] = {}
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in nodes:
            nodes[n] = None
            stack += inputs_of(n) if is_supported(n) else ()
    return tuple(nodes)
