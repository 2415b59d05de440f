"""The functions of the language: what PyTorch computes, their derivatives, and what Triton calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Function:
    """A function of the language.

    partials: the derivative by each argument, in the language itself over a, b, c; at ties and bounds as PyTorch's.
    triton: what Triton calls it; without a dot, a device function of :mod:`fx_nvfp4.kernels.activation`.
    """

    compute: Callable[..., Tensor]
    partials: tuple[str, ...]
    triton: str


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_GELU_TANH_SLOPE = (
    "0.5 * (1.0 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a))) + 0.3989422804014327 * a"
    " * (1.0 - pow(tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)), 2.0)) * (1.0 + 0.134145 * a * a)"
)
# Where a is at a bound, torch 2.14 gives half of the slope to each; before, a has it all.
_CLAMP_SLOPES = (
    (
        "where(b > c, 0.0, where(b == c, where(a == b, 1.0, 0.0), "
        "where(a < b, 0.0, where(a > c, 0.0, where(a == b, 0.5, where(a == c, 0.5, 1.0))))))",
        "where(b > c, 0.0, where(a < b, 1.0, where(a == b, where(b == c, 0.0, 0.5), 0.0)))",
        "where(b > c, 1.0, where(a > c, 1.0, where(a == c, where(b == c, 0.0, 0.5), 0.0)))",
    )
    if torch.__version__ >= "2.14"  # compared as versions are
    else (
        "where(a < b, 0.0, where(a > c, 0.0, 1.0))",
        "where(a < b, where(b < c, 1.0, 0.0), 0.0)",
        "where(maximum(a, b) > c, 1.0, 0.0)",
    )
)
FUNCTIONS = {
    "sigmoid": Function(torch.sigmoid, ("sigmoid(a) * (1.0 - sigmoid(a))",), "tl.sigmoid"),
    "tanh": Function(torch.tanh, ("1.0 - tanh(a) * tanh(a)",), "tanh"),
    "exp": Function(torch.exp, ("exp(a)",), "tl.exp"),
    "exp2": Function(torch.exp2, ("0.6931471805599453 * exp2(a)",), "tl.exp2"),
    "log": Function(torch.log, ("1.0 / a",), "tl.log"),
    "log1p": Function(torch.log1p, ("1.0 / (1.0 + a)",), "log1p"),
    "log2": Function(torch.log2, ("1.4426950408889634 / a",), "tl.log2"),
    "sqrt": Function(torch.sqrt, ("0.5 / sqrt(a)",), "tl.sqrt"),
    "rsqrt": Function(torch.rsqrt, ("-0.5 * rsqrt(a) / a",), "tl.rsqrt"),
    "erf": Function(torch.erf, ("1.1283791670955126 * exp(-a * a)",), "tl.erf"),
    "abs": Function(torch.abs, ("sign(a)",), "tl.abs"),
    "sign": Function(torch.sign, ("0.0",), "sign"),
    "minimum": Function(
        torch.minimum,
        ("where(a < b, 1.0, where(a > b, 0.0, 0.5))", "where(b < a, 1.0, where(b > a, 0.0, 0.5))"),
        "minimum",
    ),
    "maximum": Function(
        torch.maximum,
        ("where(a > b, 1.0, where(a < b, 0.0, 0.5))", "where(b > a, 1.0, where(b < a, 0.0, 0.5))"),
        "maximum",
    ),
    "clamp": Function(torch.clamp, _CLAMP_SLOPES, "clamp"),
    # The condition has no derivative.
    "where": Function(torch.where, ("0.0", "where(a, 1.0, 0.0)", "where(a, 0.0, 1.0)"), "tl.where"),
    "pow": Function(torch.pow, ("where(b == 0.0, 0.0, b * pow(a, b - 1.0))", "pow(a, b) * log(a)"), "power"),
    "relu": Function(functional.relu, ("where(a > 0.0, 1.0, 0.0)",), "relu"),
    "silu": Function(functional.silu, ("sigmoid(a) * (1.0 + a * (1.0 - sigmoid(a)))",), "silu"),
    "gelu": Function(
        functional.gelu,
        ("0.5 * (1.0 + erf(0.7071067811865476 * a)) + 0.3989422804014327 * a * exp(-0.5 * a * a)",),
        "gelu",
    ),
    "gelu_tanh": Function(_gelu_tanh, (_GELU_TANH_SLOPE,), "gelu_tanh"),
    "softplus": Function(functional.softplus, ("sigmoid(a)",), "softplus"),
}
