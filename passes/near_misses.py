"""Explains why an operand of packed codes and block scales does not have the values of an NVFP4 weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_nvfp4.format import E2M1_VALUES

from .found import Refused, UnknownScale
from .probe import Probe, Read
from .readings import Reading

_NF4: tuple[float, ...] = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
_NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
_E3M0 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def explain_values(
    probe: Probe, readings: Sequence[Reading], wrong: Tensor, finite: Tensor, k_dim: int, scale: Read
) -> Refused:
    """What kind of weight it is instead, judged by the table of codes that its values imply."""
    if scale.dtype == torch.uint8 and _is_exponent(probe, readings, scale):
        return Refused("scale is e8m0: MXFP4 codes in blocks of 16", "quantise to NVFP4 to have it emulated")
    tables = [_implied_table(probe.out, r, finite) for r in readings]
    agreement, table = max(tables, key=lambda t: t[0])
    known = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    off = (table - known).abs() > 0.004 * known.abs().clamp(min=0.25)
    share = float(wrong.sum() / finite.sum())
    error = min(_median_error(probe.out, r, finite) for r in readings)
    if agreement < 0.6 and error < 0.1:
        return _rounding_unknown(share, error)
    if agreement < 0.6:
        return UnknownScale(
            "values are not code * block scale * global scale, for any table of codes",
            "multiply codes by their scales and nothing else",
        )
    if not bool(off.any()):
        place = probe.where(wrong, k_dim)
        if share < 0.5 and not place.startswith("element"):
            return Refused(f"{place} differs from the rest", "apply what is special there after the matmul")
        return _rounding_unknown(share, error)
    if _factor(table, known) > 0 and _like(table, known * _factor(table, known)):
        text = f"values are {_factor(table, known):.3g} times those of NVFP4: put it in a global scale"
        return UnknownScale(text, "multiply by a global scale, a tensor of its own")
    return Refused(_name_table(table, off), "use the E2M1 table 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign in bit 3")


def _rounding_unknown(share: float, error: float) -> Refused:
    text = f"no known rounding: {100 * share:.2g}% of values differ (median relative error {error:.2g})"
    return UnknownScale(text, "round in float32, bfloat16 or float16")


def _median_error(out: Tensor, reading: Reading, finite: Tensor) -> float:
    g = reading.global_scale.double()
    exact = reading.code.double() * reading.scale.double() * (1 / g if reading.divide else g)
    measurable = finite & (exact != 0) & out.isfinite()
    return float((out.double() / exact - 1).abs()[measurable].median())


def _is_exponent(probe: Probe, readings: Sequence[Reading], scale: Read) -> bool:
    power = torch.exp2(probe.values(scale).double() - 127)
    for r in readings:
        expected = r.code.double() * power * (1 / r.global_scale.double() if r.divide else r.global_scale.double())
        usable = (expected.abs() > 1e-30) & (expected.abs() < 1e30)
        if bool(usable.any()) and bool(((probe.out.double() / expected)[usable] - 1).abs().max() < 0.02):
            return True
    return False


def _implied_table(out: Tensor, reading: Reading, finite: Tensor) -> tuple[float, Tensor]:
    """The value of each of the 16 codes that most samples imply, and the share of samples that do."""
    g = reading.global_scale.double()
    implied = out.double() / (reading.scale.double() * (1 / g if reading.divide else g))
    usable = finite & (reading.scale != 0) & implied.isfinite()
    table, agree = torch.zeros(16, dtype=torch.float64), 0
    for code in range(16):
        values = implied[usable & (reading.nibble == code)]
        if len(values):
            table[code] = values.median()
            agree += int(((values - table[code]).abs() <= 0.01 * table[code].abs() + 1e-3).sum())
    return agree / max(int(usable.sum()), 1), table


def _factor(table: Tensor, other: Tensor) -> float:
    """The number that other has to be multiplied with to come closest to table."""
    return float((table @ other) / (other @ other))


def _like(table: Tensor, other: Tensor) -> bool:
    return bool(((table - other).abs() <= 0.004 * other.abs() + 0.001 * table.abs().max()).all())


def _name_table(table: Tensor, off: Tensor) -> str:
    known = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    steps = torch.arange(16, dtype=torch.float64)

    def proportional(other: Tensor | Sequence[float]) -> bool:
        wanted = torch.as_tensor(other, dtype=torch.float64)
        return _factor(table, wanted) > 0 and _like(table, wanted * _factor(table, wanted))

    if proportional(torch.where(steps < 8, steps, steps - 16)):
        return "codes are int4 (two's complement), not E2M1"
    if _like(table, steps - 8):
        return "codes are unsigned int4 offset by 8, not E2M1"
    if proportional(_NF4):
        return "codes are NF4, not E2M1"
    if proportional((*_E3M0, *(-x for x in _E3M0))):
        return "codes are E3M0, not E2M1"
    for offset in range(1, 16):
        if proportional(known.roll(-offset)):
            return f"codes are offset by {offset}"
    if proportional(torch.cat((known[:8], known[8:].flip(0)))):
        return "the negative half of the table is in reverse order"
    entries = off.nonzero()[:, 0].tolist()
    shown = ", ".join(f"table entry {i} is {float(table[i]):.3g}, NVFP4 has {E2M1_VALUES[i]}" for i in entries[:3])
    return shown + (f" ({len(entries)} entries differ)" if len(entries) > 3 else "")
