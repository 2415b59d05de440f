"""Repairs bfloat16 in Triton's interpreter, which stores it as uint16 and then computes on the bit patterns.

Covered is what the kernels do with bfloat16: conversions (the interpreter truncates where hardware rounds to nearest
even), arithmetic, comparison and dot products. Reductions and fused operations stay wrong: kernels do them in float32.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> np.ndarray:
    """The values as numpy can compute on them."""
    if not _is_bf16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """float32 -> bfloat16, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


_ORIGINAL = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot")}


class _Repaired:
    """The methods that replace the builder's own, which they call for every other dtype."""

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        target = dst_type.scalar
        if _is_bf16(src) == (target == tl.bfloat16):
            return _ORIGINAL["cast_impl"](self, src, dst_type)
        if target == tl.bfloat16:
            return _narrow(src.data.astype(np.float32))
        return TensorHandle(_widen(src).astype(_get_np_dtype(target)), target)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(lhs):
            return _ORIGINAL["binary_op"](self, lhs, rhs, op)
        values = op(_widen(lhs), _widen(rhs))
        return TensorHandle(values, tl.int1) if values.dtype == np.bool_ else _narrow(values)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(arg):
            return _ORIGINAL["unary_op"](self, arg, op)
        return _narrow(op(_widen(arg)))

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        if not (_is_bf16(a) or _is_bf16(b)):
            return _ORIGINAL["create_dot"](self, a, b, d, *options)
        total = np.matmul(_widen(a), _widen(b)) + d.data
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def repair() -> None:
    """Install the repair; a second call changes nothing."""
    for name in _ORIGINAL:
        setattr(InterpreterBuilder, name, getattr(_Repaired, name))
