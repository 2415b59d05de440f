"""Checked expressions, their values and derivatives, and their Triton source."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .functions import FUNCTIONS

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_ALLOWED = (
    "allowed are the names g (gate) and u, numbers, + - * /, unary -, one comparison as first argument of where(), "
    f"and the functions {', '.join(sorted(FUNCTIONS))}"
)
Number = float | Tensor
_Partials = dict[str, Number]


@dataclass(frozen=True)
class Expression:
    """A checked activation function.

    text: the expression with constants folded and spaces normalised; equal texts are equal functions.
    names: which of "g" and "u" occur.
    """

    text: str
    names: frozenset[str]

    def evaluate(self, g: Tensor | None, u: Tensor) -> Tensor:
        """The function in fp32; g is None where there is no gate. ValueError if the expression needs g then."""
        value = value_of(tree_of(self.text), self._operands(g, u))
        assert isinstance(value, Tensor)
        return value

    def partials(self, g: Tensor | None, u: Tensor) -> tuple[Number, Number]:
        """Derivatives by g and by u in fp32, each a tensor or the number it is everywhere."""
        found = _differentiate(tree_of(self.text), self._operands(g, u))[1]
        return found.get("g", 0.0), found.get("u", 0.0)

    def to_triton(self) -> str:
        """Source of the same as a Triton function ``activation(g, u)``, for the names in kernels/activation.py."""
        return _triton_source(self.text)

    def _operands(self, g: Tensor | None, u: Tensor) -> dict[str, Tensor]:
        if g is None and "g" in self.names:
            raise ValueError(f"activation {self.text!r} uses g, but there is no gate; write it over u alone")
        return {"u": u.float()} if g is None else {"g": g.float(), "u": u.float()}


@cache
def parse(text: str) -> Expression:
    """Check an expression; raises ValueError that names what is wrong and what is allowed."""
    tree = _checked(text, ("g", "u"))
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)) & {"g", "u"}
    if not names:
        raise ValueError(f"activation {text!r}: expected an expression over g and u, found a constant")
    return Expression(ast.unparse(tree), names)


@cache
def tree_of(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@cache
def _triton_source(text: str) -> str:
    body = ast.unparse(_ToTriton().visit(ast.parse(text, mode="eval")))
    return f"@triton.jit\ndef activation(g, u):\n    return {body}\n"


def _checked(text: str, names: tuple[str, ...]) -> ast.expr:
    """The tree of text with its constants folded."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _Check(text, names).visit(tree)
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"activation {text!r}: cannot be parsed ({error}); {_ALLOWED}") from None


class _Check(ast.NodeVisitor):
    """Returns the tree of an expression with constants folded, or raises for what is not in the language."""

    def __init__(self, text: str, names: tuple[str, ...]) -> None:
        self.text = text
        self.names = names

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"activation {self.text!r}: {what}; {_ALLOWED}")

    def generic_visit(self, node: ast.AST) -> ast.expr:
        raise self.refuse(f"{type(node).__name__} {ast.unparse(node)!r} is not allowed here")

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.names:
            raise self.refuse(f"unknown name {node.id!r}")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self.refuse(f"{node.value!r} is no number")
        return ast.Constant(float(node.value))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if not isinstance(node.op, ast.USub):
            return self.generic_visit(node)
        return self._fold(ast.UnaryOp(node.op, self.visit(node.operand)))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if not isinstance(node.op, _ARITHMETIC):
            return self.generic_visit(node)
        return self._fold(ast.BinOp(self.visit(node.left), node.op, self.visit(node.right)))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS:
            raise self.refuse(f"unknown function {name!r}")
        arity = len(FUNCTIONS[name].partials)
        if node.keywords or len(node.args) != arity or any(isinstance(a, ast.Starred) for a in node.args):
            raise self.refuse(f"{name} takes {arity} positional arguments, found {ast.unparse(node)!r}")
        first = self._condition(node.args[0]) if name == "where" else self.visit(node.args[0])
        return self._fold(ast.Call(node.func, [first, *map(self.visit, node.args[1:])], []))

    def _condition(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name) and node.id in self.names and node.id not in ("g", "u"):
            return node  # in the partial derivative of where() itself
        if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in _OPERATORS:
            raise self.refuse(f"the first argument of where() must be one comparison, found {ast.unparse(node)!r}")
        sides = self.visit(node.left), self.visit(node.comparators[0])
        if all(isinstance(side, ast.Constant) for side in sides):
            raise self.refuse(f"{ast.unparse(node)!r} compares constants")
        return ast.Compare(sides[0], node.ops, [sides[1]])

    def _fold(self, node: ast.expr) -> ast.expr:
        if any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node)):
            return node
        try:
            value = float(value_of(node, {}))
        except ZeroDivisionError:
            value = math.nan
        if math.isnan(value):
            raise self.refuse(f"{ast.unparse(node)!r} is no number")
        return ast.Constant(value)


def value_of(node: ast.expr, names: Mapping[str, Tensor]) -> Number:
    """The value of a checked tree, in the dtype of the tensors that the names stand for."""
    match node:
        case ast.Constant():
            return node.value  # type: ignore[return-value]
        case ast.Name():
            return names[node.id]
        case ast.UnaryOp():
            return -value_of(node.operand, names)
        case ast.BinOp():
            return _OPERATORS[type(node.op)](value_of(node.left, names), value_of(node.right, names))
        case ast.Compare():
            return _OPERATORS[type(node.ops[0])](value_of(node.left, names), value_of(node.comparators[0], names))
        case ast.Call(func=ast.Name(id=name)):
            return _call(name, [value_of(arg, names) for arg in node.args], names)
    raise AssertionError(f"{ast.dump(node)} has passed the check")


def _call(name: str, arguments: Sequence[Number], names: Mapping[str, Tensor]) -> Tensor:
    return FUNCTIONS[name].compute(*_tensors(arguments, names))


def _tensors(values: Sequence[Number], names: Mapping[str, Tensor]) -> list[Tensor]:
    """Numbers as tensors beside those that the names stand for; torch.tensor would copy from the host."""
    like = next(iter(names.values()), torch.empty((), dtype=torch.float64))
    return [v if isinstance(v, Tensor) else torch.full((), v, dtype=like.dtype, device=like.device) for v in values]


def _differentiate(node: ast.expr, names: Mapping[str, Tensor]) -> tuple[Number, _Partials]:
    """(value, derivative by each name that it depends on) of a checked tree, in one walk."""
    match node:
        case ast.Name():
            return names[node.id], {node.id: 1.0}
        case ast.UnaryOp():
            value, slope = _differentiate(node.operand, names)
            return -value, {name: -d for name, d in slope.items()}
        case ast.BinOp():
            (a, da), (b, db) = _differentiate(node.left, names), _differentiate(node.right, names)
            value = _OPERATORS[type(node.op)](a, b)
            match node.op:
                case ast.Add():
                    return value, _chain((1.0, da), (1.0, db))
                case ast.Sub():
                    return value, _chain((1.0, da), (-1.0, db))
                case ast.Mult():
                    return value, _chain((b, da), (a, db))
            return value, _chain((1.0 / b, da), (-value / b, db))
        case ast.Call(func=ast.Name(id=function)):
            values, slopes = zip(*(_differentiate(arg, names) for arg in node.args), strict=True)
            bound = dict(zip("abc", _tensors(values, names), strict=False))
            terms = [(value_of(p, bound), d) for p, d in zip(_partial_trees(function), slopes, strict=True) if d]
            return _call(function, values, names), _chain(*terms)
    return value_of(node, names), {}


def _chain(*terms: tuple[Number, _Partials]) -> _Partials:
    """The sum of factor * derivative over the terms, name by name."""
    total: _Partials = {}
    for factor, slope in terms:
        for name, d in slope.items():
            total[name] = total[name] + factor * d if name in total else factor * d
    return total


@cache
def _partial_trees(function: str) -> list[ast.expr]:
    return [_checked(text, ("a", "b", "c")) for text in FUNCTIONS[function].partials]


class _ToTriton(ast.NodeTransformer):
    """Functions by their names in Triton."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        name = ast.parse(FUNCTIONS[node.func.id].triton, mode="eval").body
        return ast.Call(name, [self.visit(arg) for arg in node.args], [])
