"""A benchmark as text."""

from __future__ import annotations

from ..report_table import table
from .measure import Row, Study

_HEADER = (
    "prompt",
    "way",
    "prefill ms",
    "least",
    "tokens/s",
    "decode ms",
    "least",
    "tokens/s",
    "first s",
    "weights GB",
)

_LEGEND = (
    "medians of the forward passes of generate() with a static cache; first: the first generation, which compiles;",
    "packed: nvfp4_emu; 16-bit: weights dequantised beforehand, in-graph: at each use; both compiled by Inductor, with",
    "activations that are not rounded",
)


def render_bench(study: Study) -> str:
    """The table with its legend."""
    rows = [_cells(study, row, first=i == 0) for group in _by_tokens(study) for i, row in enumerate(group)]
    batch, s = study.settings.batch, study.settings
    return "\n".join(
        [
            f"{study.model}, {batch} prompt{'s' * (batch != 1)} at a time, {s.new_tokens} new tokens, mode {s.mode}",
            *table([_HEADER, *rows]),
            *_LEGEND,
            f"measured on {study.device}, torch {study.torch}",
        ]
    )


def _by_tokens(study: Study) -> list[list[Row]]:
    lengths = dict.fromkeys(row.tokens for row in study.rows)
    return [[row for row in study.rows if row.tokens == tokens] for tokens in lengths]


def _cells(study: Study, row: Row, first: bool) -> tuple[str, ...]:
    batch = study.settings.batch
    return (
        f"{row.tokens} tokens" if first else "",
        row.way,
        f"{row.prefill * 1e3:.1f}",
        f"{row.prefill_least * 1e3:.1f}",
        f"{batch * row.tokens / row.prefill:,.0f}",
        f"{row.decode * 1e3:.2f}",
        f"{row.decode_least * 1e3:.2f}",
        f"{batch / row.decode:,.1f}",
        f"{row.first:.1f}",
        f"{row.size / 1e9:.3g}",
    )
