"""What the metadata of a traced node says: sizes, tensors, arguments by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_nvfp4.layouts import weight_sizes

CASTS = {torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default}
UNKNOWN_SIZE = 8  # for sizes that only running the graph will tell

Sizes = MutableMapping[sympy.Symbol, int]
_assumed: ContextVar[Sizes | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(sizes: Sizes) -> Iterator[None]:
    """Inside, symbols have these sizes instead of those that tracing saw; more may be added on the way."""
    token = _assumed.set(sizes)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed(size: torch.SymInt) -> int | None:
    """The value of a size under `assuming`, None if that does not tell all of its symbols."""
    value = sympy.sympify(size.node.expr.xreplace(_assumed.get() or {}))
    return int(value) if value.is_number else None


def seen_sizes(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """The values that tracing saw of all symbols of a graph, those that only running tells left out."""
    environment = size.node.shape_env
    values = getattr(environment, "backed_var_to_val", None)  # called var_to_val in torch 2.11
    return {s: int(v) for s, v in (environment.var_to_val if values is None else values).items()}


def hint(size: Any) -> int:
    """The size that tracing saw (or a likely one) for an int, a SymInt, or a node that holds one."""
    if isinstance(size, Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        if _assumed.get() and (value := assumed(size)) is not None:
            return value
        symbolic = size.node
        if symbolic.has_hint():
            return int(symbolic.hint)
        guess = getattr(symbolic.shape_env, "optimization_hint", None)  # not in torch 2.11
        return int(guess(symbolic.expr, fallback=UNKNOWN_SIZE)) if guess else UNKNOWN_SIZE
    return size


def fix(size: Any) -> int:
    """The size that tracing saw of a size that is the model's and no call's; a guard holds it from now on."""
    return size.node.guard_int(__file__, 0) if isinstance(size, torch.SymInt) else size


def fixed(number: Any) -> Any:
    """The number itself, of a node too; None if it is a symbol, whose value may be another at the next call."""
    if isinstance(number, Node):
        number = number.meta["val"]
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = number.node.expr
        return number.node.pytype(expression) if expression.is_number else None
    return number


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal at every call, not just in what tracing saw."""
    return bool(statically_known_true(a == b))


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in node.meta["val"].shape)


def weight_shape(codes: Node) -> tuple[int, ...]:
    """Sizes [.., N, K] of the packed weight that has these codes, in either layout."""
    lead, n, k = weight_sizes(codes.meta["val"])
    return tuple(hint(size) for size in (*lead, n, k))


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def is_float(node: Any) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point()


def is_size(node: Node) -> bool:
    """Whether a node is a number, such as a size, and no tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def arguments(node: Node) -> SimpleNamespace:
    """A call's arguments by the names of its op's schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    values.update(zip((arg.name for arg in schema), node.args, strict=False))
    return SimpleNamespace(**{**values, **node.kwargs})


def put_arguments(node: Node, given: SimpleNamespace) -> None:
    """The inverse of :func:`arguments`: call a node's op with what is in the namespace."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    node.args, node.kwargs = tuple(getattr(given, arg.name) for arg in schema), {}


def between(first: Node, last: Node | None = None) -> Iterator[Node]:
    """Nodes in the graph's order from one to another, or to the end."""
    node = first
    while node is not last and node.op != "output":
        yield node
        node = node.next
    yield node


def below(node: Node, stop: Container[Node], within: Container[Node] | None = None) -> Iterator[Node]:
    """A node and the tensors that it is computed from, down to those in `stop` or not `within`."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or is_size(current):
            continue
        seen.add(current)
        yield current
        if current not in stop and (within is None or current in within):
            stack += reversed(current.all_input_nodes)


def elements(node: Node) -> int:
    """Number of elements of a tensor."""
    return math.prod(shape_of(node))


def flat_index(node: Node, index: Tensor) -> Tensor:
    """Numbers [S] of elements of a tensor at coordinates [S, rank], in row-major order."""
    flat = torch.zeros(len(index), dtype=torch.int64)
    for d, size in enumerate(shape_of(node)):
        flat = flat * size + index[:, d]
    return flat


def renamed(found: Any, names: Mapping[Node, Node]) -> Any:
    """What was found of some nodes, said of their counterparts in another part of the graph that is built alike."""
    if isinstance(found, Node):
        return names[found]
    if isinstance(found, (tuple, list)):
        return type(found)(renamed(f, names) for f in found)
    if isinstance(found, Mapping):
        return {renamed(k, names): v for k, v in found.items()}
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.replace(
            found, **{f.name: renamed(getattr(found, f.name), names) for f in dataclasses.fields(found)}
        )
    return found
