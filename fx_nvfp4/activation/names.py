"""Names of well-known activation functions, found by comparing values."""

from __future__ import annotations

import ast
import math
from functools import cache

import torch
from torch import Tensor

from .language import parse, tree_of, value_of

# Constants of the clamped SwiGLU are read off the expression that is to be named.
_MOST_LITERALS = 8
_KNOWN = (
    ("SwiGLU", "silu(g) * u"),
    ("GeGLU", "gelu(g) * u"),
    ("GeGLU (tanh)", "gelu_tanh(g) * u"),
    ("ReGLU", "relu(g) * u"),
    ("GLU", "sigmoid(g) * u"),
    ("gated ReLU squared", "relu(g) * relu(g) * u"),
    ("bilinear", "g * u"),
    ("SiLU", "silu(u)"),
    ("GELU", "gelu(u)"),
    ("GELU (tanh)", "gelu_tanh(u)"),
    ("ReLU", "relu(u)"),
    ("ReLU squared", "relu(u) * relu(u)"),
    ("sigmoid", "sigmoid(u)"),
    ("tanh", "tanh(u)"),
    ("softplus", "softplus(u)"),
    ("identity", "u"),
)
_KNOWN_WITH_LIMIT = (("clamped SwiGLU limit={limit:g}", "silu(minimum(g, {limit!r})) * clamp(u, {low!r}, {limit!r})"),)
_KNOWN_WITH_ALPHA = (
    ("quick GeGLU alpha={alpha:g}", "g * sigmoid({alpha!r} * g) * u"),
    ("quick GELU alpha={alpha:g}", "u * sigmoid({alpha!r} * u)"),
    (
        "clamped SwiGLU alpha={alpha:g} limit={limit:g}",
        "(clamp(u, {low!r}, {limit!r}) + 1.0) * (minimum(g, {limit!r}) * sigmoid({alpha!r} * minimum(g, {limit!r})))",
    ),
)


def describe(text: str) -> str:
    """A short name for people where the function is a known one ("SwiGLU"), else the expression itself."""
    known = _recognise(text)
    return known[0] if known else parse(text).text


def simplify(text: str) -> str:
    """The shortest known spelling of the same function: ``g / (1 + exp(-g)) * u`` becomes ``silu(g) * u``."""
    known = _recognise(text)
    return parse(known[1] if known else text).text


@cache
def _recognise(text: str) -> tuple[str, str] | None:
    """(name, spelling) of the known function that equals text on a grid which covers every number in text."""
    expression = parse(text)
    literals = sorted({
        float(f"{abs(n.value):.7g}")
        for n in ast.walk(tree_of(expression.text))
        if isinstance(n, ast.Constant) and isinstance(n.value, float) and 0 < abs(n.value) < math.inf
    })  # fmt: skip
    candidates = list(_KNOWN)
    for limit in literals[:_MOST_LITERALS]:
        values = {"limit": limit, "low": -limit}
        candidates += [(name.format(**values), spelling.format(**values)) for name, spelling in _KNOWN_WITH_LIMIT]
        for alpha in literals[:_MOST_LITERALS]:
            values["alpha"] = alpha
            candidates += [(name.format(**values), spelling.format(**values)) for name, spelling in _KNOWN_WITH_ALPHA]
    g, u = _grid(literals)
    found = torch.as_tensor(value_of(tree_of(expression.text), {"g": g, "u": u}))
    for name, spelling in candidates:
        known = parse(spelling)
        if known.names == expression.names:
            wanted = torch.as_tensor(value_of(tree_of(known.text), {"g": g, "u": u}))
            # What cancels in 1 + erf(x) is absolute in x, and grows with what it is multiplied by.
            noise = 1e-14 * (1 + g.abs()) * (1 + u.abs())
            if ((found - wanted).abs() <= 1e-6 * wanted.abs() + noise).all():
                return name, known.text
    return None


def _grid(literals: list[float]) -> tuple[Tensor, Tensor]:
    """Pairs (g, u) in float64: a fine range, huge and tiny magnitudes, and both sides of every number given."""
    around = [x * f for x in literals for f in (0.5, 0.999, 1.0, 1.001, 2.0)]
    positive = [i / 4 for i in range(1, 49)] + [1e-6, 1e-3, 20.5, 89.0, 1e3, 1e5, 1e7, 1e30, *around]
    axis = torch.tensor([0.0, *positive, *(-x for x in positive)], dtype=torch.float64)
    g, u = torch.meshgrid(axis, axis, indexing="ij")
    return g.flatten(), u.flatten()
