# mypy: allow-untyped-defs
"""Activation functions as Triton device functions, and the one that calls them, compiled from its text.

All take and give float32. Numbers may stand for any argument but the first of those that have several.
"""

import linecache
from functools import cache

import triton
import triton.language as tl


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    return minimum(maximum(x, low), high)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def tanh(x):
    """Odd polynomial near zero, where 1 - exp would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -magnitude, magnitude))


@triton.jit
def log1p(x):
    """The rounding error of 1 + x cancels in log(y) * x / (y - 1)."""
    y = 1.0 + x
    nothing_lost = (y == 1.0) | (y == float("inf"))
    return tl.where(y == 1.0, x, tl.log(y) * tl.where(nothing_lost, 1.0, x / tl.where(nothing_lost, 1.0, y - 1.0)))


@triton.jit
def power(a, b):
    """a ** b by its logarithm, with the sign of odd powers of negative numbers."""
    either = a == b
    a = tl.where(either, a, a)  # numbers become tensors
    b = tl.where(either, b, b)
    size = tl.abs(a)
    magnitude = tl.where((b == 0.0) | (size == 1.0), 1.0, tl.exp2(b * tl.log2(size)))
    odd = tl.floor(b * 0.5) * 2.0 != b
    # The sign bit, as -0.0 counts; fractional powers of finite negative numbers are NaN.
    negative = a.to(tl.int32, bitcast=True) < 0
    signed = tl.where(negative & odd & (tl.floor(b) == b), -magnitude, magnitude)
    return tl.where((a < 0.0) & (size < float("inf")) & (tl.floor(b) != b), float("nan"), signed)


@triton.jit
def relu(x):
    return maximum(x, 0.0)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def softplus(x):
    return maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@cache
def compile_activation(source: str):
    """The Triton function ``activation(g, u)`` that source defines over the names of this module.

    Triton reads a function's source through its file name, so the text is filed under one that nothing else has.
    """
    name = f"<fx_nvfp4 activation {source!r}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(globals())
    exec(compile(source, name, "exec"), namespace)
    return namespace["activation"]
