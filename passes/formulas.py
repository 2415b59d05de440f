"""The ways to round code * block_scale * global_scale that producers and models spell."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)
_Pair = Literal["code scale", "scale global", "code global"]


@dataclass(frozen=True)
class Formula:
    """A way to round code * scale ∘ global: which two are combined first, and what each step is rounded to.

    Arithmetic on bf16 and fp16 is arithmetic in fp32 rounded afterwards, as everywhere in PyTorch.
    """

    first: _Pair
    divide: bool
    global_dtype: torch.dtype
    reciprocal: torch.dtype | None  # multiply by 1 / global, rounded to this
    inner: torch.dtype
    outer: torch.dtype
    compute: torch.dtype

    def __call__(self, code: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
        """Values [S] of the weight, in `compute`."""

        def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x if dtype == torch.float32 else x.to(dtype).to(self.compute)

        def apply(x: Tensor) -> Tensor:
            g = rounded(global_scale.to(self.compute), self.global_dtype)
            if self.reciprocal is not None:
                return x * rounded(1 / g, self.reciprocal)
            return x / g if self.divide else x * g

        code, scale = code.to(self.compute), scale.to(self.compute)
        if self.first == "code scale":
            return rounded(apply(rounded(code * scale, self.inner)), self.outer)
        if self.first == "scale global":
            return rounded(code * rounded(apply(scale), self.inner), self.outer)
        return rounded(rounded(apply(code), self.inner) * scale, self.outer)

    def name(self, dtype: torch.dtype) -> str:
        """The formula as text, its result rounded to `dtype`: v is the code's value, s block and g global scale."""

        def rounded(text: str, to: torch.dtype) -> str:
            return f"({text})" if to == torch.float32 else f"{SHORT[to]}({text})"

        g = "g" if self.global_dtype == torch.float32 else rounded("g", self.global_dtype)
        if self.reciprocal is not None:
            g = f"{SHORT[self.reciprocal]}(1 / {g})"
        op = "/" if self.divide and self.reciprocal is None else "*"
        if self.first == "code scale":
            text = f"{rounded('v * s', self.inner)} {op} {g}"
        elif self.first == "scale global":
            text = f"v * {rounded(f's {op} {g}', self.inner)}"
        else:
            text = f"{rounded(f'v {op} {g}', self.inner)} * s"
        text = text if self.outer == torch.float32 else f"{SHORT[self.outer]}({text})"
        text = f"{SHORT[dtype]}({text})"
        return text if self.compute == torch.float32 else f"{text} in fp64"


@lru_cache
def formulas(divide: bool, dtype: torch.dtype, global_dtype: torch.dtype) -> tuple[Formula, ...]:
    """All ways to round to `dtype`, the plainest first.

    Arithmetic in float64 gives what float32 gives with one rounding, unless the global scale itself is float64.
    """
    firsts: tuple[_Pair, ...] = ("code scale", "scale global", "code global")
    reciprocals = (None, *_ROUNDINGS) if divide else (None,)
    outers = [r for r in _ROUNDINGS if r == torch.float32 or r != dtype]
    computes = (torch.float32, torch.float64)[: 1 + (global_dtype == torch.float64)]
    choices = itertools.product(firsts, reciprocals, _ROUNDINGS, _ROUNDINGS, outers, computes)
    ways = [Formula(first, divide, g, r, inner, outer, c) for first, r, g, inner, outer, c in choices]

    def steps(f: Formula) -> int:
        shorter = sum(r in (torch.bfloat16, torch.float16) for r in (f.global_dtype, f.inner, f.outer, f.reciprocal))
        return shorter + (f.reciprocal is not None) + 2 * (f.compute == torch.float64)

    return tuple(sorted(ways, key=steps))
