"""An inspected checkpoint as text."""

from __future__ import annotations

from collections.abc import Sequence

from .checkpoints.inspect import Inspection, PackedWeight, Pair
from .checkpoints.names import layer_index
from .report_table import grouped, table

_HEADER = ("weight", "count", "shape", "format", "global scale", "input scale", "MB")
_PROBLEMS = 20  # how many are shown

LEVELS = ("all", "layer", "weight")  # what shares a line: equal weights of all layers, those of one layer, none


def render_inspection(found: Inspection, level: str = "all") -> str:
    """The text of an inspection; `level` is one of :data:`LEVELS`."""
    lines = [f"{found.folder}: {found.model}, {found.producer}, {found.activations}", _sizes(found)]
    if found.packed:
        lines += table([_HEADER, *_weights(found.packed, level)])
    if found.pairs:
        lines += _pairs(found.pairs, level)
    lines += [f"problem: {text}" for text in found.problems[:_PROBLEMS]]
    if len(found.problems) > _PROBLEMS:
        lines.append(f"problem: ... {len(found.problems)} in all")
    return "\n".join(lines + [f"note: {text}" for text in found.notes])


def _sizes(found: Inspection) -> str:
    saved = found.dense_bytes / max(found.packed_bytes, 1)
    plain = ", ".join(f"{count} tensors {dtype} {_mb(size)} MB" for dtype, count, size in found.plain) or "nothing"
    packed = f"{len(found.packed)} packed weights {_mb(found.packed_bytes)} MB"
    return f"{packed}, {saved:.2f} times smaller than in bfloat16; not packed: {plain}"


def _weights(packed: Sequence[PackedWeight], level: str) -> list[tuple[str, ...]]:
    if level == "weight":
        return [(w.name, *_cells([w])) for w in packed]
    # A number that no layer has keeps weights of different layers on different lines.
    groups = grouped(packed, lambda w: (w.shape, w.activations, _line(w.name, level)), lambda w: w.name)
    return [(name, *_cells(weights)) for name, _, weights in groups]


def _cells(weights: Sequence[PackedWeight]) -> tuple[str, ...]:
    first = weights[0]
    return (
        str(len(weights)),
        " x ".join(map(str, first.shape)),
        first.activations,
        _range([w.global_scale for w in weights]),
        _range([w.input_scale for w in weights]),
        _mb(sum(w.size for w in weights)),
    )


def _pairs(pairs: Sequence[Pair], level: str) -> list[str]:
    layers: dict[int, list[Pair]] = {}
    for pair in pairs:
        layers.setdefault(_line(pair.name, level), []).append(pair)
    lines = []
    for layer, inside in layers.items():
        differing, widest = sum(p.ratio > 1 for p in inside), max(inside, key=lambda p: p.ratio)
        where = f" of layer {layer}" if level != "all" and layer >= 0 else ""
        most = f", at most {widest.ratio:.3g} times ({widest.name})" if differing else ""
        lines.append(f"gate and up{where}: global scales differ in {differing} of {len(inside)} pairs{most}")
    return lines


def _line(name: str, level: str) -> int:
    """Equal for names that may share a line."""
    return -1 if level == "all" else layer_index(name)


def _range(scales: Sequence[tuple[float, float] | None]) -> str:
    known = [s for s in scales if s is not None]
    if not known:
        return "none"
    low, high = min(s[0] for s in known), max(s[1] for s in known)
    text = f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
    missing = len(scales) - len(known)
    return f"{text} ({missing} missing)" if missing else text


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:.0f}"
