"""Runs the nodes that decide which expert sees which token, for expert ids and routing weights of our choice.

Before:  ids -> sort -> histc -> cumsum -> offs;  weights -> view -> index
After:   the values of any of these, at the sizes that tracing saw or that `nodes.assuming` gives
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from .found import Refused
from .nodes import Sizes, assumed, hint, is_size, is_tensor, shape_of

aten = torch.ops.aten

MAX_ELEMENTS = 1 << 25  # of one value that is computed, not viewed
POISON = -(1 << 20)  # an integer that nobody wrote: no expert, row or token

_EMPTY = {
    *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default),
    *(aten.empty_permuted.default, aten.new_empty_strided.default),
}
_VIEWS = {aten.expand.default, aten.view.default, aten.permute.default, aten.unsqueeze.default, aten.slice.Tensor}


class CannotTry(Refused):
    """A routing node does not take the values that were tried."""


class Routing:
    """Values of routing nodes, computed where asked for.

    Args:
        given: values of nodes from which all others must follow.
        tokens: nodes that hold what belongs to a token. Routing must not depend on them.
        sizes: what `nodes.assuming` is given; sizes that only running tells are added.
    """

    def __init__(self, given: Mapping[Node, Tensor], tokens: frozenset[Node], sizes: Sizes) -> None:
        self._values: dict[Node, Any] = dict(given)
        self._given = frozenset(given)
        self._tokens, self._sizes = tokens, sizes
        self._foreign: dict[Node, Node | None] = {}

    def replaced(self, given: Mapping[Node, Tensor]) -> Routing:
        """The same with other values of some of the given nodes; what does not depend on these stays."""
        changed: dict[Node, bool] = {node: node in given for node in self._given}
        for node in self._values:  # in the order of computation
            if node not in changed:
                changed[node] = any(changed.get(source, False) for source in node.all_input_nodes)
        kept = {node: value for node, value in self._values.items() if not changed[node]}
        other = Routing({**kept, **given}, self._tokens, self._sizes)
        other._given, other._foreign = self._given, self._foreign
        return other

    def foreign(self, node: Node) -> Node | None:
        """An input of the graph, or what belongs to a token, that a node depends on besides what is given."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._foreign or current in self._given:
                stack.pop()
                continue
            known = is_size(current) and _known_size(current) is not None
            if not known and (current in self._tokens or current.op == "placeholder" or _is_random(current)):
                self._foreign[current] = current
                continue
            inputs = [] if known else current.all_input_nodes
            found = next((f for n in inputs if (f := self._foreign.get(n)) is not None), None)
            rest = [n for n in inputs if n not in self._foreign and n not in self._given]
            if found is not None or not rest:
                self._foreign[current] = found
            else:
                stack.append(rest[0])
        return self._foreign.get(node)

    def value(self, node: Node) -> Any:
        """The value of a node; raises `Refused` if it does not follow from what is given."""
        if node not in self._values:
            if (found := self.foreign(node)) is not None:
                what = f"{node.name} depends on {found.name}, which neither expert ids nor routing weights determine"
                raise Refused(what, "route by top-k ids and their weights alone")
            with unset_fake_temporarily(), torch.no_grad():
                self._run_up_to(node)
        return self._values[node]

    def _run_up_to(self, node: Node) -> None:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._values:
                stack.pop()
                continue
            if is_size(current) and (size := _known_size(current)) is not None:
                self._values[current] = size
                continue
            missing = [n for n in current.all_input_nodes if n not in self._values]
            if missing:
                stack += missing
            else:
                self._values[current] = self._run(current)

    def _run(self, node: Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(node.graph.owning_module).detach().cpu()
        if is_tensor(node) and node.target not in _VIEWS and math.prod(shape_of(node)) > MAX_ELEMENTS:
            raise Refused(f"{node.name} {list(shape_of(node))} is too large to try routing with", "route by ids")
        if getattr(node.target, "namespace", "aten") not in ("aten", "prims"):
            raise Refused(
                f"routing goes through {node.target}, which is not run to try it", "route by PyTorch's own ops"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu)  # type: ignore[misc]
        if node.target in _EMPTY:
            dtype = node.meta["val"].dtype
            return torch.full(shape_of(node), math.nan if dtype.is_floating_point else POISON, dtype=dtype)
        try:
            result = _call(node, args, kwargs)
        except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
            raise CannotTry(
                f"{node.name} cannot be tried out: {str(error).splitlines()[0]}", "route by ops that a CPU has too"
            ) from error
        self._bind(node.meta.get("val"), result)
        return result

    def _bind(self, traced: Any, result: Any) -> None:
        """Note the sizes that only running tells."""
        if isinstance(traced, (tuple, list)):
            for one, value in zip(traced, result, strict=True):
                self._bind(one, value)
            return
        pairs = zip(traced.shape, result.shape, strict=True) if isinstance(traced, Tensor) else [(traced, result)]
        for symbolic, size in pairs:
            if isinstance(symbolic, torch.SymInt) and assumed(symbolic) is None and not symbolic.node.has_hint():
                self._sizes[symbolic.node.expr] = int(size)


def _known_size(node: Node) -> int | None:
    """A size that is known without running anything."""
    size = node.meta["val"]
    if isinstance(size, torch.SymInt):
        value = assumed(size)
        return hint(size) if value is None and size.node.has_hint() else value
    return size if isinstance(size, int) else None


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _call(node: Node, args: Any, kwargs: Any) -> Any:
    """What the node computes. A GPU counts integers (histc) that a CPU counts as floats only: exact in float64."""
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except NotImplementedError:
        if not is_tensor(node):
            raise
        args, kwargs = fx.node.map_aggregate((args, kwargs), _widened)  # type: ignore[misc]
        return node.target(*args, **kwargs).to(node.meta["val"].dtype)  # type: ignore[operator]


def _widened(argument: Any) -> Any:
    integers = isinstance(argument, Tensor) and not argument.is_floating_point() and argument.dtype != torch.bool
    return argument.double() if integers else argument


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
