"""A benchmark as text."""

from __future__ import annotations

from ..report_table import table
from .loading import Loading
from .measure import Row, Settings, Study

_HEADER = (
    "prompts",
    "way",
    "prefill ms",
    "least",
    "tokens/s",
    "decode ms",
    "least",
    "tokens/s",
    "first s",
    "weights GB",
    "peak GB",
)

_LEGEND = (
    "medians of the forward passes of generate() with a static cache; first: the first generation, which compiles;",
    "packed: nvfp4_emu; 16-bit: weights dequantised beforehand, in-graph: at each use; these compiled by Inductor,",
    "with activations that are not rounded and experts by grouped_mm; bmm: experts as generate() on a GPU takes them",
    "for decoding, by a batched product on copies of their weights; peak: most memory that was allocated on the",
    "device, caches included",
)


_ACTIVATIONS = {"checkpoint": "activations as the checkpoint says", "none": "activations not rounded"}


def render_bench(study: Study) -> str:
    """The table with its legend."""
    rows = [
        _cells(row, first=i == 0)
        for prompts in study.prompts
        for i, row in enumerate(r for r in study.rows if (r.batch, r.tokens) == prompts)
    ]
    s = study.settings
    return "\n".join(
        [
            f"{study.model}, {s.new_tokens} new tokens, {_ACTIVATIONS[s.activations]}, {render_how(s)}",
            *table([_HEADER, *rows]),
            *_LEGEND,
            _loading(study.loading),
            f"measured on {study.device}, torch {study.torch}",
        ]
    )


def render_how(settings: Settings) -> str:
    """What was compiled, and how the model attends."""
    whole = "layers compiled" if settings.by_layer else "compiled as a whole"
    recorded = {"": "", "steps": ", steps recorded as CUDA graphs", "all": ", all passes recorded as CUDA graphs"}
    attention = f", attention by {settings.attention}" if settings.attention else ""
    return f"{whole}, mode {settings.mode}{recorded[settings.record]}{attention}"


def _loading(loading: Loading) -> str:
    text = f"loading: {loading.checkpoint / 1e9:.3g} GB in {loading.seconds:.1f} s"
    for place, peak in (("host", loading.host_peak), ("device", loading.device_peak)):
        if peak is not None:
            text += f", at most {peak / 1e9:.3g} GB on the {place}"
    return text


def prompts_text(batch: int, tokens: int) -> str:
    """Such as "16 x 512 tokens"."""
    return f"{batch} x {tokens} tokens"


def _cells(row: Row, first: bool) -> tuple[str, ...]:
    return (
        prompts_text(row.batch, row.tokens) if first else "",
        row.way,
        f"{row.prefill * 1e3:.1f}",
        f"{row.prefill_least * 1e3:.1f}",
        f"{row.batch * row.tokens / row.prefill:,.0f}",
        f"{row.decode * 1e3:.2f}",
        f"{row.decode_least * 1e3:.2f}",
        f"{row.batch / row.decode:,.1f}",
        f"{row.first:.1f}",
        f"{row.size / 1e9:.3g}",
        f"{row.peak / 1e9:.3g}" if row.peak else "-",
    )
