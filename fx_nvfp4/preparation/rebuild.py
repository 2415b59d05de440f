"""The module's forward anew, as source text: its own routing and all that follows, one call in place of the loop.

Before:  for e, expert in enumerate(self.experts):
             rows, slot = torch.where(ids == e)
             out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
After:   out = self.experts(x, ids, weights)

Two recordings, of inputs of different sizes, tell sizes that depend on the input from constants.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .combine import Combine
from .record import Unsuited
from .recorder import CONSTANT, descendants
from .routing import Routing

aten = torch.ops.aten

_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Found:
    """What was found in one recording."""

    combine: Combine
    routing: Routing

    def kept(self) -> list[Node]:
        """The nodes that the new forward needs, in order; those between routing and weighted sum are gone."""
        recording, combine = self.combine.recording, self.combine
        roots = [combine.tokens, self.routing.ids, self.routing.weights, combine.base, recording.output]
        kept: set[Node] = set()
        waiting = [n for n in roots if n is not None]
        while waiting:
            node = waiting.pop()
            if node in kept:
                continue
            kept.add(node)
            waiting += [d for d in node.meta["deps"] if d not in self.gone]
        ordered = sorted(kept, key=recording.order.__getitem__)
        for node in ordered:
            _check_step(node)
        return ordered

    @cached_property
    def gone(self) -> set[Node]:
        """Everything that depends on the experts up to, and with, the weighted sum."""
        recording = self.combine.recording
        depends = descendants(recording, {call.node for call in recording.calls})
        return depends - (self.after - {self.combine.node})

    @cached_property
    def after(self) -> set[Node]:
        """The weighted sum and everything that depends on it."""
        return descendants(self.combine.recording, {self.combine.node})

    def replaced(self, reader: Node, argument: Node) -> bool:
        """Whether what reader sees in argument is the weighted sum, or another view of its memory."""
        if argument is self.combine.node:
            return True
        return argument not in self.after and reader.meta["writers"].get(argument) is self.combine.node


def rebuild(first: Found, second: Found, experts_path: str) -> fx.Graph:
    """The new forward as a graph over (x) with modules and parameters by their paths.

    Raises:
        Unsuited: the recordings differ in more than sizes, or a step cannot be repeated for other inputs.
    """
    return _Rebuilder(first, second, experts_path).run()


def _check_step(node: Node) -> None:
    if isinstance(node.target, torch._ops.OpOverload) and _DATA_DEPENDENT & set(node.target.tags):
        raise Unsuited(
            f"{node.target} before or after its experts gives a result whose size depends on data",
            "compute routing and output with sizes that do not",
        )


class _Rebuilder:
    def __init__(self, first: Found, second: Found, experts_path: str) -> None:
        self._first, self._second, self._experts_path = first, second, experts_path
        self._graph = fx.Graph()
        self._new: dict[Node, Any] = {}
        self._sizes: list[Node] = []
        self._x: Node
        self._combined: Node

    def run(self) -> fx.Graph:
        combine, routing = self._first.combine, self._first.routing
        order = combine.recording.order
        needed = [n for n in (combine.tokens, routing.ids, routing.weights) if n is not None]
        call_after = max(needed, key=order.__getitem__)
        events = sorted([*self._pairs(), (combine.node, None)], key=lambda pair: order[pair[0]])
        for node, other in events:
            if other is None:
                self._finish()
                continue
            self._step(node, other)
            if node is call_after:
                self._call()
        self._graph.eliminate_dead_code(is_impure_node=_writes)
        self._graph.lint()
        return self._graph

    def _pairs(self) -> list[tuple[Node, Node]]:
        first, second = self._first.kept(), self._second.kept()
        if [(n.op, n.target) for n in first] != [(n.op, n.target) for n in second]:
            raise Unsuited(
                "its routing takes other steps for inputs of other sizes", "compute all sizes with the same operations"
            )
        return list(zip(first, second, strict=True))

    def _step(self, node: Node, other: Node) -> None:
        if node.op == "placeholder":
            self._x = self._new[node] = self._graph.placeholder("x")
            sizes = range(node.meta["value"].dim() - 1)
            self._sizes = [self._graph.call_method("size", (self._x, d)) for d in sizes]
            return
        if node.op == "get_attr" and str(node.target).startswith(CONSTANT):
            self._new[node] = self._constant(node.meta["value"], other.meta["value"])
            return
        args = self._arguments(node, node.args, other, other.args)
        kwargs = self._arguments(node, node.kwargs, other, other.kwargs)
        if node.op == "output":
            self._graph.output(args[0])
        else:
            self._new[node] = self._graph.create_node(node.op, node.target, args, kwargs)

    def _constant(self, value: Tensor, other: Tensor) -> Node:
        if value.numel() > 64 or value.shape != other.shape or not torch.equal(value, other):
            raise Unsuited("its routing uses a tensor that it makes from Python numbers", "register it as a buffer")
        make: dict[str, Any] = {"dtype": value.dtype, "device": self._device()}
        return self._graph.call_function(torch.tensor, (value.tolist(),), make)

    def _device(self) -> Node:
        return self._graph.call_function(getattr, (self._x, "device"))

    def _arguments(self, node: Node, arg: Any, other_node: Node, other: Any) -> Any:
        """arg with nodes of the new graph for those of the old, and sizes computed from x."""
        if isinstance(arg, Node):
            if self._first.replaced(node, arg) != self._second.replaced(other_node, other):
                raise Unsuited("its output is put together in another way for inputs of other sizes")
            return self._sum_as(arg, other) if self._first.replaced(node, arg) else self._new[arg]
        if isinstance(arg, (list, tuple)):
            if len(arg) != len(other):
                raise Unsuited("its output is put together in another way for inputs of other sizes")
            return type(arg)(self._arguments(node, a, other_node, o) for a, o in zip(arg, other, strict=True))
        if isinstance(arg, dict):
            return {k: self._arguments(node, a, other_node, other[k]) for k, a in arg.items()}
        if isinstance(arg, torch.device):
            return self._device()
        if arg == other:
            return arg
        if isinstance(arg, int) and isinstance(other, int) and not isinstance(arg, bool):
            return self._size(arg, other)
        raise Unsuited(f"{node.target} takes {arg} or {other} depending on the input", "compute with tensors instead")

    def _size(self, value: int, other: int) -> Node:
        """A node that computes the size which was value in one recording and other in the other."""
        sizes = [list(r.combine.recording.x.meta["value"].shape[:-1]) for r in (self._first, self._second)]
        for dims in _subsets(len(self._sizes)):
            units = [math.prod(s[d] for d in dims) for s in sizes]
            factor = value // units[0]
            if factor and (factor * units[0], factor * units[1]) == (value, other):
                node: Any = self._sizes[dims[0]]
                for d in dims[1:]:
                    node = self._graph.call_function(operator.mul, (node, self._sizes[d]))
                return node if factor == 1 else self._graph.call_function(operator.mul, (node, factor))
        raise Unsuited(f"a size is {value} or {other} for inputs {sizes}", "derive sizes by multiplication only")

    def _sum_as(self, argument: Node, other: Node) -> Node:
        """The weighted sum in the shape of argument, a view of all its memory."""
        value, whole = argument.meta["value"], self._first.combine.node.meta["value"]
        if value.numel() != whole.numel() or value.dtype != whole.dtype:
            raise Unsuited("its output reads a part of the weighted sum", "use all of it")
        return self._combined if value.shape == whole.shape else self._shaped(self._combined, argument, other)

    def _shaped(self, node: Node, like: Node, other: Node) -> Node:
        """node viewed in the shape of like, which in the second recording is other."""
        shape = self._arguments(like, list(like.meta["value"].shape), other, list(other.meta["value"].shape))
        return self._graph.call_function(aten.view.default, (node, shape))

    def _call(self) -> None:
        """The experts, all at once, on rows [T, K] with ids and weights [T, A]."""
        routing, graph = self._first.routing, self._graph
        tokens = self._rows(self._first.combine.tokens)
        weights = None if routing.weights is None else self._routing(routing.weights, routing)
        if routing.ids is None:
            assert weights is not None
            top = graph.call_function(aten.topk.default, (weights, routing.top_k))
            weights, ids = (graph.call_function(operator.getitem, (top, i)) for i in range(2))
        else:
            ids = self._slots(routing.ids, routing)
            if weights is None:
                weights = graph.call_function(torch.ones_like, (ids,), {"dtype": self._dtype()})
            elif routing.dense:
                weights = graph.call_function(aten.gather.default, (weights, 1, ids))
        self._combined = graph.call_module(self._experts_path, (tokens, ids, weights))

    def _routing(self, node: Node, routing: Routing) -> Node:
        return self._rows(node) if routing.dense else self._slots(node, routing)

    def _slots(self, node: Node, routing: Routing) -> Node:
        """A node of the routing as [T, A]."""
        if routing.ids_first:
            return self._graph.call_function(aten.t.default, (self._new[node],))
        if node.meta["value"].dim() == 2:
            return self._new[node]
        return self._graph.call_function(aten.reshape.default, (self._new[node], [-1, routing.top_k]))

    def _rows(self, node: Node) -> Node:
        value = node.meta["value"]
        if value.dim() == 2:
            return self._new[node]
        return self._graph.call_function(aten.reshape.default, (self._new[node], [-1, value.shape[-1]]))

    def _dtype(self) -> torch.dtype:
        return self._first.combine.tokens.meta["value"].dtype

    def _finish(self) -> None:
        """The weighted sum as the forward had it: dtype, shape, and what it started from."""
        combine, graph = self._first.combine, self._graph
        whole = combine.node.meta["value"]
        if whole.dtype != self._dtype():
            self._combined = graph.call_method("to", (self._combined, whole.dtype))
        if whole.dim() != 2:
            self._combined = self._shaped(self._combined, combine.node, self._second.combine.node)
        if combine.base is not None:
            base = self._new[combine.base]
            if combine.base.meta["value"].shape != whole.shape:
                base = graph.call_method("view_as", (base, self._combined))
            self._combined = graph.call_function(operator.add, (base, self._combined))


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema is not None and schema.is_mutable)


def _subsets(count: int) -> Iterator[Sequence[int]]:
    """Non-empty subsets of range(count), small ones first."""
    masks = sorted(range(1, 1 << count), key=int.bit_count)
    return ([d for d in range(count) if mask >> d & 1] for mask in masks)
