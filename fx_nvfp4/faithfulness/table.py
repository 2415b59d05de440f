"""A study as text."""

from __future__ import annotations

from ..report_table import table
from .measure import FLOOR, Study

_HEADER = ("case", "way", "fp32 error", "x random order", "worst row", "bf16 error", "bf16 as exact")
_LEGEND = (
    "error: median over rows of |y - exact| / |exact|, exact being the float64 sum of exact products;",
    f'"{FLOOR}": the same products added in fp32 one by one, the median of five orders.',
)


def render_study(study: Study) -> str:
    """The table with its legend."""
    rows = [
        (
            row.case if i == 0 or study.rows[i - 1].case != row.case else "",
            row.way,
            f"{row.fp32:.2e}",
            _multiple(study.to_floor(row)),
            f"{row.fp32_worst:.2e}",
            f"{row.bf16:.2e}",
            f"{row.bf16_equal:.2%}",
        )
        for i, row in enumerate(study.rows)
    ]
    return "\n".join([*table([_HEADER, *rows]), *_LEGEND, f"measured on {study.device}, torch {study.torch}"])


def _multiple(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"
