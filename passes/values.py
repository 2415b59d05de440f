"""Finds the formula that reproduces an operand from its codes and scales, bit for bit in every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .formulas import SHORT, Formula, formulas
from .near_misses import explain_values
from .probe import Probe, Read
from .readings import Reading, read_values

_QUICK = 256


@dataclass(frozen=True)
class Matched:
    """How the values of an operand are made of what was read."""

    nibbles: tuple[int, ...]
    global_op: Literal["multiply", "divide"] | None
    factor: float
    formula: str


def match_values(
    probe: Probe, qdata: Read, scale: Read, global_scale: Read | None, k_dim: int, factors: Sequence[float]
) -> Matched:
    """The reading and the formula that reproduce every sample; raises `Refused` if none does."""
    readings = list(read_values(probe, qdata, scale, global_scale, k_dim, factors))
    finite = readings[0].scale.isfinite()  # raw bytes may spell NaN, which no block scale is
    quick = finite.nonzero()[:: max(1, int(finite.sum()) // _QUICK), 0]
    tried: list[tuple[float, Formula, Reading]] = []
    for reading in readings:
        few = reading.take(quick)
        ways = formulas(reading.divide, probe.out.dtype, few.global_scale.dtype)
        for formula in ways[:1] if _is_far(probe.out[quick], few) else ways:
            share = float(_matches(probe.out[quick], formula, few).float().mean())
            if share == 1 and bool(_matches(probe.out, formula, reading)[finite].all()):
                return _matched(formula, reading, probe.out.dtype, global_scale is not None)
            tried.append((share, formula, reading))
    nearest = sorted(tried, key=lambda t: -t[0])[:16]
    wrong = min((finite & ~_matches(probe.out, f, r) for _, f, r in nearest), key=lambda mask: int(mask.sum()))
    plain = [r for r in readings if r.factor is None]
    raise explain_values(probe, plain, wrong, finite, k_dim, scale)


def _matched(formula: Formula, reading: Reading, dtype: torch.dtype, scaled: bool) -> Matched:
    if scaled:
        return Matched(reading.nibbles, "divide" if reading.divide else "multiply", 1.0, formula.name(dtype))
    if reading.factor is None:
        return Matched(reading.nibbles, None, 1.0, f"{SHORT[dtype]}(v * s)")
    factor = 1 / reading.factor if reading.divide else reading.factor
    return Matched(reading.nibbles, None, factor, f"{formula.name(dtype)}, g = {reading.factor:.6g}")


def _is_far(out: Tensor, reading: Reading) -> bool:
    """Whether no rounding explains the distance from the exact product: most samples are off by a quarter or more."""
    g = reading.global_scale.double()
    exact = reading.code.double() * reading.scale.double() * (1 / g if reading.divide else g)
    usable = (exact != 0) & out.isfinite()
    return bool(usable.any()) and float((out[usable].double() / exact[usable] - 1).abs().median()) > 0.25


def _matches(out: Tensor, formula: Formula, reading: Reading) -> Tensor:
    """Samples in which a formula gives the operand bit for bit; zeros and NaNs of any sign."""
    expected = formula(reading.code, reading.scale, reading.global_scale).to(out.dtype)
    return (out == expected) | (out.isnan() & expected.isnan())
