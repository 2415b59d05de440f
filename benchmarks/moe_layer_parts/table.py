"""One shape's cells as a Markdown table, and below it what failed and why."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Cell
from .variants import Variant

Places = dict[tuple[str, int], Cell]  # by name of the variant and number of tokens


def render(cells: Sequence[Cell], variants: Sequence[Variant]) -> str:
    """Rows are numbers of tokens; times are microseconds, rounded to three digits."""
    by_place = {(cell.variant, cell.tokens): cell for cell in cells}
    tokens = list(dict.fromkeys(cell.tokens for cell in cells))
    columns = [_column(variant, by_place, tokens) for variant in variants]
    floors = [_number(_floor(count, by_place, variants)) for count in tokens]
    flat = [["tokens", *map(str, tokens)], ["floor", *floors], *(c for group in columns for c in group)]
    flat.append(["best peer / ours", *(_best(count, by_place, variants) for count in tokens)])
    lines = [_line(row) for row in zip(*map(_padded, flat), strict=True)]
    rule = "|" + "|".join("-" * (len(column[0]) + 1) + ":" for column in map(_padded, flat)) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", *_notes(cells, variants)]).rstrip()


def _column(variant: Variant, cells: Places, tokens: Sequence[int]) -> list[list[str]]:
    """A variant's times; ours with what part of the floor, or how much more than weight-only, beside it."""
    times = [variant.name, *(_number(_time(variant.name, count, cells)) for count in tokens)]
    if not variant.ours:
        return [times]
    if variant.format == "w4a16":
        parts = [cells[variant.name, count].of_floor if (variant.name, count) in cells else None for count in tokens]
        return [times, ["% of floor", *map(_percent, parts)]]
    overhead = [_overhead(variant.name, count, cells) for count in tokens]
    return [times, ["overhead %", *map(_percent, overhead)]]


def _overhead(name: str, tokens: int, cells: Places) -> float | None:
    time, base = _time(name, tokens, cells), _time("ours w4a16", tokens, cells)
    return None if time is None or base is None else time / base - 1


def _floor(tokens: int, cells: Places, variants: Sequence[Variant]) -> float | None:
    """That of the first variant which ran: each was computed from what the device reached just then."""
    found = (cells[v.name, tokens].floor for v in variants if (v.name, tokens) in cells)
    return next((floor for floor in found if floor is not None), None)


def _best(tokens: int, cells: Places, variants: Sequence[Variant]) -> str:
    """The fastest peer that does the whole layer, as a multiple of ours, weight-only where that ran."""
    ours = next((t for v in variants if v.ours and (t := _time(v.name, tokens, cells)) is not None), None)
    peers = [(t, v.name) for v in variants if v.whole and not v.ours and (t := _time(v.name, tokens, cells))]
    if ours is None or not peers:
        return "-"
    time, name = min(peers)
    return f"{time / ours:.2f} ({name})"


def _time(name: str, tokens: int, cells: Places) -> float | None:
    cell = cells.get((name, tokens))
    return None if cell is None else cell.microseconds


def _notes(cells: Sequence[Cell], variants: Sequence[Variant]) -> list[str]:
    """What a column's name does not say, and the reasons of its missing times; equal ones once."""
    notes = [f"{v.name}: {v.note}" for v in variants if v.note]
    failed: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.reason:
            failed.setdefault((cell.variant, cell.reason), []).append(str(cell.tokens))
    return notes + [f"- {name} ({', '.join(counts)} tokens): {why}" for (name, why), counts in failed.items()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f}"


def _padded(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    return [text.rjust(width) for text in column]


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"
