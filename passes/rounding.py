"""Whether a block rounds wherever the moe op does: products, and their sums with a bias, to one dtype; then the result.

Before:  bf16 products -> float32 sum over the slots -> cast to bf16
After:   the op, whose result is bf16, or float32 where the sum is used as it is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from .block import Candidate
from .emitter import CannotRewriteError
from .found import Almost, Refused
from .nodes import CASTS, is_size, is_tensor
from .sample import MOVES


def check_inside(c: Candidate, tokens: frozenset[Node], biases: Iterable[Node]) -> None:
    """Raise `Refused` unless all products, and the sums with biases among `tokens`, have one dtype."""
    dtypes = sorted({_name(p.x) for unit in c.units for p in unit.products})
    if len(dtypes) > 1:
        raise Refused(f"products of one block are in {' and '.join(dtypes)}", "multiply all of them in one dtype")
    for bias in biases:
        wide = next((n for n in _readers(bias, tokens, c.out) if _name(n) != dtypes[0]), None)
        if wide is not None:
            raise Almost(
                f"{bias.name} is added in {_name(wide)} ({wide.name}) to products in {dtypes[0]}",
                f"add biases in {dtypes[0]}, to which the op rounds the sum",
            )


def result_dtype(c: Candidate) -> torch.dtype | None:
    """What the op is to round its result to, if that is read with digits that the products' dtype lacks."""
    result, dtype = c.out.meta["val"].dtype, c.units[0].ups[0].x.meta["val"].dtype
    if torch.promote_types(result, dtype) == dtype or _is_rounded(c.out, dtype):
        return None
    wide = torch.promote_types(result, dtype)
    if wide == torch.float64:
        raise CannotRewriteError("the sum over the slots is float64 and used as such", "sum in float32, as the op does")
    return wide


def _is_rounded(node: Node, dtype: torch.dtype) -> bool:
    """Whether all that reads a node, or a view of it, casts it to a dtype."""
    users = [user for user in node.users if not is_size(user)]
    return bool(users) and all(_rounds(user, dtype) for user in users)


def _rounds(user: Node, dtype: torch.dtype) -> bool:
    if user.target in CASTS:
        return bool(user.meta["val"].dtype == dtype)
    return user.op == "call_function" and MOVES.of(user) is not None and _is_rounded(user, dtype)


def _readers(bias: Node, tokens: frozenset[Node], last: Node) -> Iterator[Node]:
    """Nodes among `tokens` that read a bias, a view of it, or what is gathered from it."""
    stack, seen = [bias], {bias}
    while stack:
        for user in stack.pop().users:
            if user in tokens and is_tensor(user):
                yield user
            elif user not in seen and user < last and not is_size(user):
                seen.add(user)
                stack.append(user)


def _name(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")
