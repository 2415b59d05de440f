"""Finds the formula that reproduces an operand from its codes and scales, bit for bit in every sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .formulas import SHORT, Formula, formulas
from .near_misses import explain_values
from .probe import Probe, Read
from .readings import Reading, read_values

_QUICK = 256


def match_values(
    probe: Probe, qdata: Read, scale: Read, global_scale: Read | None, k_dim: int
) -> tuple[tuple[int, ...], Literal["multiply", "divide"] | None, str]:
    """Order of the nibbles, direction of the global scale and name of the formula that reproduces every sample."""
    readings = list(read_values(probe, qdata, scale, global_scale, k_dim))
    finite = readings[0].scale.isfinite()  # raw bytes may spell NaN, which no block scale is
    quick = finite.nonzero()[:: max(1, int(finite.sum()) // _QUICK), 0]
    tried: list[tuple[float, Formula, Reading]] = []
    for reading in readings:
        few = reading.take(quick)
        for formula in formulas(reading.divide, probe.out.dtype, few.global_scale.dtype):
            share = float(_matches(probe.out[quick], formula, few).float().mean())
            if share == 1 and bool(_matches(probe.out, formula, reading)[finite].all()):
                name = formula.name(probe.out.dtype) if global_scale else f"{SHORT[probe.out.dtype]}(v * s)"
                op: Literal["multiply", "divide"] = "divide" if reading.divide else "multiply"
                return reading.nibbles, op if global_scale else None, name
            tried.append((share, formula, reading))
    nearest = sorted(tried, key=lambda t: -t[0])[:16]
    wrong = min((finite & ~_matches(probe.out, f, r) for _, f, r in nearest), key=lambda mask: int(mask.sum()))
    raise explain_values(probe, readings, wrong, finite, k_dim, scale)


def _matches(out: Tensor, formula: Formula, reading: Reading) -> Tensor:
    """Samples in which a formula gives the operand bit for bit; zeros and NaNs of any sign."""
    expected = formula(reading.code, reading.scale, reading.global_scale).to(out.dtype)
    return (out == expected) | (out.isnan() & expected.isnan())
