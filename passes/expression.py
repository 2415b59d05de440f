"""Reads the activation function between two products off the graph, as text over g (gate) and u (up).

Before:  split -> convert -> neg -> exp -> add(1) -> div -> convert -> mul
After:   "g / (exp(-g) + 1.0) * u"

The walk is that of samples, so views, splits and interleaved rows need no rule of their own: an up product's result is
g or u by the row of the weight that a sample read. Rounding between the steps is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .coords import Coords
from .found import Refused
from .nodes import CASTS, arguments, is_tensor
from .sample import ATEN, MOVES
from .walk import Walk

aten = torch.ops.aten

_Key = tuple[Node, int]
_ADVICE = "use a pointwise function of gate and up between the products"
_LONGEST = 200  # calls of an expression


@dataclass(frozen=True)
class Operand:
    """An up product's result as the samples read it: at coordinates `at`, plus a parameter read at `bias_at`."""

    node: Node
    at: Coords
    bias: Node | None = None
    bias_at: Coords | None = None


@dataclass
class Traced:
    """An expression before its operands have names."""

    root: Any
    operands: list[Operand] = field(default_factory=list)

    def text(self, names: Mapping[int, str]) -> str:
        """The expression, operands called by what `names` says of their number."""
        return _text(self.root, names)


class Tracer(Walk):
    """A walk that keeps what each value was computed from."""

    rules = ATEN

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._inputs: dict[_Key, list[_Key]] = {}
        self._open: list[list[_Key]] = [[]]
        self._terms: dict[_Key, Any] = {}

    def value(self, node: Node, at: Coords) -> Tensor:
        self._open[-1].append((node, id(at)))
        return super().value(node, at)

    def _compute(self, node: Node, at: Coords) -> Tensor:
        self._open.append([])
        try:
            return super()._compute(node, at)
        finally:
            self._inputs[node, id(at)] = self._open.pop()

    def traced(self, ups: Sequence[Node]) -> Traced:
        """The expression of what was evaluated first; raises `Refused` for what no expression says."""
        found = Traced(None)
        term = self._term(self._open[0][0], ups, found)
        if (length := _length(term, {})) > _LONGEST:
            raise Refused(
                f"the activation is {length} calls long, written out with each value that it uses again",
                f"up to {_LONGEST} are read; use a pointwise function of fewer steps",
            )
        found.root = _numbered(term, found)
        return found

    def _term(self, key: _Key, ups: Sequence[Node], found: Traced) -> Any:
        if key not in self._terms:
            self._terms[key] = self._make_term(key, ups, found)
        return self._terms[key]

    def _make_term(self, key: _Key, ups: Sequence[Node], found: Traced) -> Any:
        node, at = key[0], self._values[key][1]
        if node in ups:
            return Operand(node, at)
        if key not in self._inputs:
            return _Parameter(node, at) if self.routing.foreign(node) is not None else _Routed(node)
        if node.target is aten.where.self and self._inputs[key]:
            condition = self._inputs[key][0]
            if not self.belongs_to_tokens(condition[0]):
                return self._term(self._side(node, key, condition), ups, found)
        inputs = self._inputs[key]
        if MOVES.of(node):  # indices are followed, and no values
            inputs = [k for k in inputs if self.belongs_to_tokens(k[0])]
        terms = [self._term(k, ups, found) for k in inputs]
        if node.target in CASTS and node.meta["val"].is_floating_point() and node.meta["val"].dtype.itemsize == 1:
            raise Refused(f"the activation rounds to {node.meta['val'].dtype} in {node.name}", _ADVICE)
        if MOVES.of(node) or node.target in CASTS:
            if len(terms) != 1:
                raise Refused(f"the activation puts {node.name} together from several parts", _ADVICE)
            if node.meta["val"].is_floating_point():
                return _as_number(terms[0])
            if MOVES.of(node) and node.meta["val"].dtype == inputs[0][0].meta["val"].dtype:
                return terms[0]
            raise Refused(f"the activation rounds to integers in {node.name}", _ADVICE)
        return _call(node, terms)

    def _side(self, node: Node, key: _Key, condition: _Key) -> _Key:
        """Which side of a choice by routing all samples take."""
        chosen = self._values[condition][0]
        first = bool(chosen[0])
        if not bool((chosen == first).all()):
            raise Refused(f"the activation depends on the routing in {node.name}", _ADVICE)
        sides = [n for n in node.args[1:] if is_tensor(n)]
        wanted = node.args[1 if first else 2]
        return self._inputs[key][1 + sides.index(wanted)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Parameter:
    node: Node
    at: Coords


@dataclass(frozen=True)
class _Routed:
    node: Node


# Terms: Operand, number, or (template, *terms)


def _length(term: Any, known: dict[int, int]) -> int:
    """Calls in a term as text, which repeats what is used again: twice as long for each square of a square."""
    if not isinstance(term, tuple):
        return 0
    if id(term) not in known:
        known[id(term)] = 1 + sum(_length(t, known) for t in term[1:])
    return known[id(term)]


def _numbered(term: Any, found: Traced) -> Any:
    """A term with its operands replaced by their numbers."""
    if isinstance(term, Operand):
        same = next((i for i, o in enumerate(found.operands) if _same(o, term)), None)
        if same is None:
            found.operands.append(term)
            same = len(found.operands) - 1
        return SimpleNamespace(number=same)
    if isinstance(term, (_Parameter, _Routed)):
        raise Refused(f"the activation reads {term.node.name}, which is no result of the up products", _ADVICE)
    if isinstance(term, tuple):
        return (term[0], *(_numbered(t, found) for t in term[1:]))
    return term


def _same(a: Operand, b: Operand) -> bool:
    """Whether two operands read the same elements, with or without the same bias."""
    biases = a.bias is b.bias and (a.bias_at is b.bias_at or torch.equal(a.bias_at.index, b.bias_at.index))  # type: ignore[union-attr]
    return a.node is b.node and torch.equal(a.at.index, b.at.index) and biases


def _text(term: Any, names: Mapping[int, str]) -> str:
    if isinstance(term, SimpleNamespace):
        return names[term.number]
    if isinstance(term, tuple):
        return term[0].format(*(_text(t, names) for t in term[1:]))
    return repr(float(term))


def _as_number(term: Any) -> Any:
    """A comparison as 1 or 0; anything else as it is."""
    is_comparison = isinstance(term, tuple) and term[0] in _COMPARISONS.values()
    return ("where({}, 1.0, 0.0)", term) if is_comparison else term


_PLACEMENT = {"dtype", "layout", "device", "pin_memory", "memory_format", "size"}
_COMPARISONS = {
    **{"lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}", "eq": "{} == {}", "ne": "{} != {}"}
}
_TEMPLATES = {
    **_COMPARISONS,
    **{"mul": "({} * {})", "neg": "(-{})", "reciprocal": "(1.0 / {})", "square": "({0} * {0})", "pow": "pow({}, {})"},
    **{f: f + "({})" for f in ("sigmoid", "tanh", "exp", "exp2", "log", "log1p", "log2", "sqrt", "rsqrt", "erf")},
    **{"abs": "abs({})", "sgn": "sign({})", "sign": "sign({})", "relu": "relu({})", "silu": "silu({})"},
    **{"expm1": "(exp({}) - 1.0)", "minimum": "minimum({}, {})", "maximum": "maximum({}, {})"},
    **{"clamp_min": "maximum({}, {})", "clamp_max": "minimum({}, {})", "where": "where({}, {}, {})"},
}


def _call(node: Node, terms: list[Any]) -> Any:
    """The term of a pointwise call of `terms`, which stand for its tensors in order."""
    given, rest = vars(arguments(node)), iter(terms)
    names = [arg.name for arg in node.target._schema.arguments if arg.name in given]  # type: ignore[union-attr]
    values = {k: next(rest) if is_tensor(given[k]) else given[k] for k in names if k not in _PLACEMENT}
    a = SimpleNamespace(**values)
    packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    if not terms and (number := getattr(a, "fill_value", getattr(a, "s", None))) is not None:
        return number
    if special := _SPECIAL.get(packet):
        return special(node, a)
    if packet not in _TEMPLATES:
        raise Refused(f"no expression says what {node.target} computes ({node.name})", _ADVICE)
    operands = list(values.values())
    if packet == "where":
        return _TEMPLATES[packet], operands[0], *map(_as_number, operands[1:])
    return _TEMPLATES[packet], *map(_as_number, operands)


def _added(sign: str) -> Callable[[Node, SimpleNamespace], Any]:
    def term(node: Node, a: SimpleNamespace) -> Any:
        left, right = _as_number(a.self), _as_number(a.other)
        if a.alpha != 1:
            right = ("({} * {})", right, a.alpha)
        if sign == "+" and (biased := _biased(left, right) or _biased(right, left)):
            return biased
        return f"({{}} {sign} {{}})", left, right

    return term


def _biased(product: Any, bias: Any) -> Operand | None:
    if isinstance(product, Operand) and product.bias is None and isinstance(bias, _Parameter):
        return Operand(product.node, product.at, bias.node, bias.at)
    return None


def _divided(node: Node, a: SimpleNamespace) -> Any:
    if getattr(a, "rounding_mode", None) is not None:
        raise Refused(f"the activation rounds a quotient in {node.name}", _ADVICE)
    return "({} / {})", _as_number(a.self), _as_number(a.other)


def _gelu(node: Node, a: SimpleNamespace) -> Any:
    return "gelu_tanh({})" if a.approximate == "tanh" else "gelu({})", a.self


def _clamp(node: Node, a: SimpleNamespace) -> Any:
    term = a.self
    low, high = getattr(a, "min", getattr(a, "min_val", None)), getattr(a, "max", getattr(a, "max_val", None))
    if low is not None:
        term = "maximum({}, {})", term, low
    return term if high is None else ("minimum({}, {})", term, high)


def _softplus(node: Node, a: SimpleNamespace) -> Any:
    if a.beta != 1 or a.threshold != 20:
        raise Refused(f"softplus with beta {a.beta} and threshold {a.threshold} in {node.name}", _ADVICE)
    return "softplus({})", a.self


_SPECIAL: dict[str, Callable[[Node, SimpleNamespace], Any]] = {
    **{"add": _added("+"), "sub": _added("-"), "div": _divided, "gelu": _gelu, "softplus": _softplus},
    **{"clamp": _clamp, "hardtanh": _clamp},
}
