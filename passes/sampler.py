"""Evaluates a node of a functional ATen graph at sampled coordinates, walking backwards to its leaves.

Every handler maps coordinates of an op's result to coordinates of its inputs, so nothing of the size of a weight is
ever materialised: the cost depends on the number of samples and of ops, not on shapes. What a leaf holds is up to the
caller's function `leaf(node, coords)`, and which coordinates of which leaf a sample read is recorded. This module is
the walk alone; `sample` is the walk with the handlers of ATen's ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Coords, Edge
from .nodes import arguments, fixed, is_tensor, shape_of

MAX_VISITS = 5000


class Unsupported(Exception):  # noqa: N818 - the state of a node, as in torch._dynamo.exc
    """A node cannot be evaluated at sampled coordinates."""

    def __init__(self, node: Node, reason: str) -> None:
        op = node.target if node.op == "call_function" else node.op
        super().__init__(f"{node.name} ({op}): {reason}")
        self.node, self.reason = node, reason


class SymbolicPosition(Unsupported):
    """A symbol chooses which element is read: what holds for the value that tracing saw may not hold for the next."""

    def __init__(self, node: Node) -> None:
        super().__init__(node, "it reads at a symbolic place")


class OutOfRange(Unsupported):
    """An index points outside of what it indexes."""


def number(node: Node, value: Any) -> Any:
    """A number among the arguments of `node` that decides what is read or computed; raises `SymbolicPosition`."""
    known = fixed(value)
    if known is None:
        raise SymbolicPosition(node)
    return known


Leaf = Callable[[Node, Coords], "Tensor | None"]
Handler = Callable[["Sampler", Node, SimpleNamespace, Coords], Tensor]
Condition = Callable[[SimpleNamespace], bool]


@dataclass(frozen=True)
class _Rule:
    """A handler, and the condition on a call's arguments under which it applies."""

    handler: Handler
    when: Condition | None


class Rules:
    """Handlers by op, and all those of the rules that it `includes`: what a `Sampler` can walk through."""

    def __init__(self, *includes: Rules) -> None:
        self._includes = includes
        self._ops: dict[Any, _Rule] = {}
        self._items: dict[Any, _Rule] = {}

    def handles(self, *ops: Any, when: Condition | None = None) -> Callable[[Handler], Handler]:
        """Registers a handler of ops: (sampler, node, arguments by name, coordinates of the result) -> values [S].

        A `torch.Tag` stands for all ops that carry it and have no handler of their own. `when` says by a call's
        arguments whether the call is supported.
        """

        def register(handler: Handler) -> Handler:
            self._ops.update(dict.fromkeys(ops, _Rule(handler, when)))
            return handler

        return register

    def handles_item(self, *ops: Any, when: Condition | None = None) -> Callable[[Handler], Handler]:
        """The same for `getitem` of ops that return several tensors; `arguments.item` is which."""

        def register(handler: Handler) -> Handler:
            self._items.update(dict.fromkeys(ops, _Rule(handler, when)))
            return handler

        return register

    def of(self, node: Node) -> _Rule | None:
        """The rule for a node."""
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            return self._find("_items", getattr(node.args[0], "target", None))
        if rule := self._find("_ops", node.target):
            return rule
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return None
        return next((rule for tag in tags if (rule := self._find("_ops", tag))), None)

    def _find(self, table: str, key: Any) -> _Rule | None:
        own = getattr(self, table).get(key)
        return own or next((rule for rules in self._includes if (rule := rules._find(table, key))), None)


MOVES = Rules()  # results are elements of inputs
ATEN = Rules(MOVES)


def inputs_of(node: Node) -> list[Node]:
    """The tensors that a supported node is computed from; a `getitem` stands for the op it takes a result of."""
    return [n for n in _source(node).all_input_nodes if is_tensor(n)]


def _source(node: Node) -> Node:
    """The call that computes a node: itself, or for a `getitem` the op that returns several tensors."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, Node)
    return source


def is_supported(node: Node) -> bool:
    """Whether `Sampler` can walk through a node. What it cannot is where a cone of ops ends."""
    rule = ATEN.of(node)
    if rule is None or not is_tensor(node):
        return False
    return rule.when is None or rule.when(arguments(_source(node)))


class Sampler:
    """Evaluates nodes at sampled coordinates.

    `leaf(node, coords)` returns the values [S] of a node that is not to be walked through, or None; `symbols` are the
    symbolic numbers that it knows too, which choose what is read. After `evaluate`, `reads` tells what each leaf was
    asked for and `edges` where the way through the graph depends on coordinates.
    """

    rules = ATEN

    def __init__(self, leaf: Leaf, symbols: Container[Node] = ()) -> None:
        self.reads: dict[Node, list[Coords]] = {}
        self.edges: dict[tuple[Node, int, int], Edge] = {}
        self._leaf, self._symbols = leaf, symbols
        # Coordinates are kept with what was computed from them, so that an id names one object only.
        self._values: dict[tuple[Node, int], tuple[Tensor, Coords]] = {}
        self._broadcast: dict[tuple[int, tuple[int, ...]], tuple[Coords, Coords]] = {}
        self._sources: dict[Node, frozenset[Node]] = {}

    def evaluate(self, node: Node, index: Tensor) -> Tensor:
        """Values [S] of `node` at coordinates `index` [S, rank]; raises `Unsupported`."""
        return self.value(node, Coords(index, torch.arange(len(index))))

    def value(self, node: Node, at: Coords) -> Tensor:
        key = (node, id(at))
        if key not in self._values:
            if len(self._values) > MAX_VISITS:
                raise Unsupported(node, f"the cone takes more than {MAX_VISITS} steps")
            values = self._leaf(node, at)
            if values is None:
                values = self._compute(node, at)
            else:
                self.reads.setdefault(node, []).append(at)
            self._values[key] = values, at
        return self._values[key][0]

    def _compute(self, node: Node, at: Coords) -> Tensor:
        rule = self.rules.of(node)
        if rule is None or not is_tensor(node):
            raise Unsupported(node, "no rule to evaluate it at sampled coordinates")
        source = _source(node)
        args = arguments(source)
        args.item = node.args[1] if source is not node else None
        try:
            return rule.handler(self, node, args, at).to(node.meta["val"].dtype)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            raise Unsupported(node, str(error).split("\n")[0]) from error

    def place(self, node: Node, index: Any, at: Coords) -> Any:
        """A number among the arguments of `node` that decides what is read; values [S] of a symbol that is a leaf."""
        if index not in self._symbols:
            return number(node, index)
        everywhere = at.moved(at.index[:, :0])
        values = self._leaf(index, everywhere)
        self.reads.setdefault(index, []).append(everywhere)
        return values

    def operand(self, value: Any, at: Coords, shape: Sequence[int]) -> Any:
        """An argument of an op that broadcasts its tensors to `shape`: values [S] of a tensor, or the number itself."""
        if not isinstance(value, Node):
            return value
        if not is_tensor(value):
            return number(value, value)
        return self.value(value, self._broadcast_to(at, shape, shape_of(value)))

    def _broadcast_to(self, at: Coords, shape: Sequence[int], inner: tuple[int, ...]) -> Coords:
        if tuple(shape) == inner:
            return at
        key = (id(at), inner)
        if key not in self._broadcast:
            index = at.index[:, len(shape) - len(inner) :].clone()
            index[:, [d for d, size in enumerate(inner) if size == 1]] = 0
            self._broadcast[key] = at.moved(index), at
        return self._broadcast[key][0]

    def sources(self, node: Node) -> frozenset[Node]:
        """The leaves of the graph below a node: placeholders, attributes and what cannot be walked through."""
        if node not in self._sources:
            seen, stack, found = {node}, [node], []
            while stack:
                current = stack.pop()
                below = inputs_of(current) if is_supported(current) else None
                if below is None:
                    found.append(current)
                else:
                    stack += [n for n in below if n not in seen]
                    seen.update(below)
            self._sources[node] = frozenset(found)
        return self._sources[node]

    def chosen(self, index: Node, at: Coords, shape: Sequence[int], size: int) -> Tensor:
        """Values [S] of an index tensor, as coordinates in a dimension of `size`."""
        values = self.operand(index, at, shape)
        if values.dtype == torch.bool:
            raise Unsupported(index, "indexing with a mask")
        values = values.to(torch.int64)
        values = torch.where(values < 0, values + size, values)
        if bool(((values < 0) | (values >= size)).any()):
            raise OutOfRange(index, f"it indexes outside a dimension of {size}")
        return values

    def edge(self, node: Node, column: Tensor, at: Coords, bounds: Iterable[int], dim: int = 0) -> None:
        for bound in bounds:
            edge = self.edges.setdefault((node, dim, bound), Edge(bound))
            edge.column.append(column)
            edge.sample.append(at.sample)
