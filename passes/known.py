"""Proves each structure of a block once: the layers of a model are alike.

Before:  48 candidates that differ in nothing but the nodes they are made of
After:   one proof, and 48 blocks
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from .block import Block, Candidate
from .found import Refused
from .nodes import below, is_size, renamed
from .proof import prove, spreading
from .sample import Unsupported


class Known:
    """Proofs by the structure of what lies between a candidate's ends."""

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[list[Node], Block | Refused]] = {}

    def prove(self, candidate: Candidate) -> Block | Refused:
        """What :func:`proof.prove` says of the candidate, or has said of one that is spelled the same."""
        nodes, key = _structure(candidate)
        if key in self._results:
            known, result = self._results[key]
            return renamed(result, dict(zip(known, nodes, strict=True)))
        try:
            block: Block | Refused = prove(candidate)
        except Refused as refused:
            block = refused
        except Unsupported as error:
            block = Refused(str(error), "spell the block without it")
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Nothing is replaced that is not proven, so a graph that no one has thought of costs speed alone.
            block = Refused(f"trying it raised {type(error).__name__}: {error}", "please report this graph")
        self._results[key] = nodes, block
        return block


def _structure(c: Candidate) -> tuple[list[Node], Hashable]:
    """Nodes of a candidate in an order that depends on its structure alone, and a key equal for equal structures."""
    numbers: dict[Node, int] = {}
    ends = [n for n in (c.x, c.ids, c.weights) if n is not None]
    parts = [n for unit in c.units for p in unit.products for n in (*p.parts, p.act_scale) if n is not None]
    for node in (*ends, *parts, *below(c.out, {*ends, *parts})):
        numbers.setdefault(node, len(numbers))
    if c.per_expert and c.weights is not None:
        for node in below(c.weights, {c.ids}, spreading(c)):
            numbers.setdefault(node, len(numbers))

    def plain(arg: Any) -> Hashable:
        if isinstance(arg, (list, tuple)):
            return tuple(map(plain, arg))
        if isinstance(arg, Node):
            return ("node", numbers[arg]) if arg in numbers else ("size", str(arg.meta.get("val")))
        return type(arg).__name__, str(arg)

    leaves = {*ends, *parts} if not c.per_expert else {c.x, c.ids, *parts}

    def entry(node: Node) -> Hashable:
        val = node.meta.get("val")
        about = (str(val.dtype), *map(str, val.shape)) if isinstance(val, torch.Tensor) else str(type(val))
        known = all(n in numbers or is_size(n) for n in node.all_input_nodes)
        if node in leaves:
            return "leaf", about
        if node.op != "call_function" or not known:
            return node.op, str(node.target) if node.op == "get_attr" else "", about  # constants may differ
        return str(node.target), plain(node.args), tuple((k, plain(v)) for k, v in sorted(node.kwargs.items())), about

    units = [(unit.expert, [(p.kind, p.expert, p.first, p.rows) for p in unit.products]) for unit in c.units]
    flags = c.per_expert, c.choices, c.distinct, c.bounded, c.wraps, c.weights is None
    made = [plain([p.node, p.x, p.routing, *p.parts, p.act_scale]) for unit in c.units for p in unit.products]
    owners = tuple((numbers.get(n), e) for n, e in c.bias_owners.items())
    key = tuple(map(entry, numbers)), str(units), flags, tuple(made), plain(c.out), owners
    return list(numbers), key
