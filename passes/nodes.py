"""What the metadata of a traced node says: sizes, tensors, arguments by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

UNKNOWN_SIZE = 8  # for sizes that only running the graph will tell


def hint(size: Any) -> int:
    """The size that tracing saw (or a likely one) for an int, a SymInt, or a node that holds one."""
    if isinstance(size, Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        symbolic = size.node
        if symbolic.has_hint():
            return int(symbolic.hint)
        guess = getattr(symbolic.shape_env, "optimization_hint", None)  # not in torch 2.11
        return int(guess(symbolic.expr, fallback=UNKNOWN_SIZE)) if guess else UNKNOWN_SIZE
    return size


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


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def arguments(node: Node) -> SimpleNamespace:
    """A call's arguments by the names of its op's schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    values.update(zip((arg.name for arg in schema), node.args, strict=False))
    return SimpleNamespace(**{**values, **node.kwargs})
