"""Numbers in a block that its count of tokens may come to pass, such as a capacity written in the program.

Before:  tokens -> cumsum of one-hot -> lt(64) -> the slots that find room
After:   64, so that more tokens than these are tried
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from .found import Refused
from .nodes import CASTS, arguments, fixed, is_tensor
from .sample import MOVES

aten = torch.ops.aten

_LARGEST = 1 << 13  # tokens in a routing that is tried
_ENDLESS = (1 << 31) - 1  # no number of tokens
_COMPARING = {
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.clamp, aten.clamp_max, aten.clamp_min),
    *(aten.minimum, aten.maximum, aten.remainder, aten.fmod, aten.floor_divide),
    *(aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor),
}
_SHIFTING = {aten.bitwise_right_shift, aten.bitwise_left_shift, aten.__rshift__, aten.__lshift__}  # by powers of two
_DIVIDING = {aten.div.Tensor_mode, aten.div.Scalar_mode}
# What a comparison may see its numbers through.
_SCALED = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    *_DIVIDING,
}


def largest(nodes: Iterable[Node]) -> int:
    """The largest number that any of the nodes is compared with; raises `Refused` if there are too many to try."""
    most = 0
    for node in nodes:
        if _compares(node):
            found = max((n for n in _numbers(node) if n < _ENDLESS), default=0)
            if found > _LARGEST:
                raise Refused(
                    f"{node.name} compares with {found}, and how many tokens there will be is a symbol",
                    f"compile for one number of tokens, or compare with at most {_LARGEST}",
                )
            most = max(most, found)
    return most


def _compares(node: Node) -> bool:
    """Whether an op tells numbers below some number from those above, in one step or in several."""
    packet = getattr(node.target, "overloadpacket", None)
    rounds = node.target in _DIVIDING and arguments(node).rounding_mode is not None
    return packet in _COMPARING or packet in _SHIFTING or rounds


def _numbers(node: Node) -> Iterator[int]:
    """Magnitudes of what a comparison compares with."""
    stack: list[Any] = [*node.args, *node.kwargs.values()]
    if getattr(node.target, "overloadpacket", None) in _SHIFTING:
        by = fixed(node.args[1])
        stack = [2 ** min(abs(int(by)), 31)] if isinstance(by, (int, float)) else stack
    while stack:
        value = stack.pop()
        number = None if is_tensor(value) else fixed(value)
        if isinstance(number, (int, float)) and number == number:
            yield int(min(abs(number), _ENDLESS))
        elif is_tensor(value):
            yield from _constant(value)
            if value.target in _SCALED:
                stack += value.args
            elif MOVES.of(value) is not None or value.target in CASTS:
                stack += value.all_input_nodes


def _constant(node: Node) -> Iterator[int]:
    """The largest magnitude in a tensor that the program writes."""
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value: Any = fixed(node.args[-1])
    elif node.target is torch.ops.prims.iota.default:
        value = fixed(node.args[0])
    elif node.op == "get_attr":
        held = operator.attrgetter(str(node.target))(node.graph.owning_module)
        value = float(held.detach().abs().max()) if held.numel() else None
    else:
        value = None
    if isinstance(value, (int, float)) and value == value:
        yield int(min(abs(value), _ENDLESS))
