"""A report as text. Equal sites of repeated layers share a line: "model.layers.{0..47}.mlp.experts"."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .report import Match, Refusal, Report

_HEADER = ("module", "op", "weight", "activations in", "format", "recognised from")
_HIDDEN = 4  # weights that a graph break hides: how many of them are named


def render(report: Report, full: bool = False) -> str:
    """The text of a report; `full` gives every site its own line, with the name of its weight and its kernel."""
    lines = [_headline(report)]
    if report.matched:
        lines += table(_every_match(report.matched) if full else _matches(report.matched))
    lines += _refusals(report.refused, full)
    lines += _blocks(report, full)
    for found in report.breaks:
        hides = f"; it hides {_some(found.hides, full)}" if found.hides else ""
        lines += [f"graph break: {found}{hides}", *(f"  hint: {hint}" for hint in found.hints)]
    lines += [f"note: {text}" for text in _notes(report, full)]
    return "\n".join(lines + _cost(report))


def names(paths: Iterable[str]) -> list[str]:
    """Dotted paths with those that differ in numbers alone written as one: a.0.b, a.1.b -> a.{0..1}.b."""
    patterns: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for path in paths:
        pattern, numbers = _split(path)
        patterns.setdefault(pattern, []).append(numbers)
    return [
        _joined(pattern, sets)
        for pattern, numbers in patterns.items()
        for sets in _collapse(list(dict.fromkeys(numbers)))
    ]


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first row is its header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def _headline(report: Report) -> str:
    graphs = "1 graph" if report.graphs == 1 else f"{report.graphs} graphs"
    lifted = sum(b.lifted for b in report.blocks)
    blocks = f"{lifted} MoE block{'s' * (lifted != 1)} lifted, " if lifted else ""
    gradients = sum(m.op == "input_grad" for m in report.matched)
    products = f"{len(report.matched)} NVFP4 product{'s' * (len(report.matched) != 1)}"
    products += f" ({gradients} of them gradients)" if gradients else ""
    return f"nvfp4_emu: {products} in {graphs}, {blocks}{len(report.refused)} refused"


def _matches(matched: Sequence[Match]) -> list[tuple[str, ...]]:
    groups = grouped(matched, lambda m: m.row()[1:], lambda m: m.where)
    if all(len(sites) == 1 for _, _, sites in groups):
        return [_HEADER, *((where, *cells) for where, cells, _ in groups)]
    rows = [(where, str(len(sites)), *cells) for where, cells, sites in groups]
    return [(_HEADER[0], "sites", *_HEADER[1:]), *rows]


def _every_match(matched: Sequence[Match]) -> list[tuple[str, ...]]:
    rows = [(*m.row(), m.weight, m.config + _measured(m)) for m in matched]
    return [(*_HEADER, "parameter", "kernel"), *rows]


def _measured(match: Match) -> str:
    return "" if match.milliseconds is None else f", {match.milliseconds:.3g} ms"


def _refusals(refused: Sequence[Refusal], full: bool) -> list[str]:
    if full:
        return [f"refused: {r}" for r in refused]
    lines = []
    for where, (reason, advice), sites in grouped(refused, lambda r: (r.reason, r.advice), lambda r: r.where):
        nodes = f"{sites[0].node}, ... {len(sites)} sites" if len(sites) > 1 and sites[0].node else sites[0].node
        lines.append(f"refused: {where}{f' ({nodes})' if nodes else ''}: {reason}{f'. {advice}' if advice else ''}")
    return lines


def _blocks(report: Report, full: bool) -> list[str]:
    if full:
        return [f"{'block' if b.lifted else 'not lifted'}: {b}" for b in report.blocks]
    groups = grouped(report.blocks, lambda b: (b.lifted, b.summary()), lambda b: b.where)
    return [f"{'block' if lifted else 'not lifted'}: {where}: {summary}" for where, (lifted, summary), _ in groups]


def _notes(report: Report, full: bool) -> list[str]:
    pairs = [(m.where, note) for m in report.matched for note in m.notes]
    if full:
        return [*(f"{where}: {note}" for where, note in pairs), *report.notes]
    groups = grouped(pairs, lambda p: p[1], lambda p: p[0])
    return [*(f"{where}: {note}" for where, note, _ in groups), *report.notes]


def _cost(report: Report) -> list[str]:
    cost = report.cost
    if not cost.stages:
        return []
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cost.stages.items())
    of_all = (
        f", {cost.total / cost.compilation:.1%} of {cost.compilation:.1f} s in the backend" if cost.compilation else ""
    )
    each = f"; {cost.total / len(report.weights):.3f} s a weight" if report.weights else ""
    return [f"pass: {cost.total:.2f} s ({stages}){of_all}{each}"]


def _some(paths: Sequence[str], full: bool) -> str:
    found = list(paths) if full else names(paths)
    more = len(found) - _HIDDEN
    return ", ".join(found) if full or more <= 0 else f"{', '.join(found[:_HIDDEN])} and {more} more"


# Paths that differ in numbers alone

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)


def grouped(
    items: Iterable[_Item], key: Callable[[_Item], _Key], path: Callable[[_Item], str]
) -> list[tuple[str, _Key, list[_Item]]]:
    """(path, key, items) of those with equal keys whose paths differ in numbers alone, in order of appearance."""
    found: dict[tuple[tuple[str, ...], _Key], dict[tuple[int, ...], list[_Item]]] = {}
    for item in items:
        pattern, numbers = _split(path(item))
        found.setdefault((pattern, key(item)), {}).setdefault(numbers, []).append(item)
    groups = []
    for (pattern, equal), by_numbers in found.items():
        for sets in _collapse(list(by_numbers)):
            inside = [n for n in by_numbers if all(i in s for i, s in zip(n, sets, strict=True))]
            groups.append((_joined(pattern, sets), equal, [item for n in inside for item in by_numbers[n]]))
    return groups


def _split(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """ "a.0.b.12" -> ("a", "", "b", ""), (0, 12)."""
    parts = path.split(".")
    return tuple("" if p.isdecimal() else p for p in parts), tuple(int(p) for p in parts if p.isdecimal())


def _joined(pattern: tuple[str, ...], sets: tuple[frozenset[int], ...]) -> str:
    numbers = iter(sets)
    return ".".join(part or _range(sorted(next(numbers))) for part in pattern)


def _collapse(numbers: Sequence[tuple[int, ...]]) -> list[tuple[frozenset[int], ...]]:
    """Tuples as products of sets: (0, 0), (0, 1), (1, 0), (1, 1) -> [({0, 1}, {0, 1})]."""
    if not numbers or not numbers[0]:
        return [()] * bool(numbers)
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        tails.setdefault(first, []).append(tuple(rest))
    heads: dict[tuple[tuple[int, ...], ...], set[int]] = {}
    for first, rests in tails.items():
        heads.setdefault(tuple(rests), set()).add(first)
    return [(frozenset(firsts), *sets) for rests, firsts in heads.items() for sets in _collapse(rests)]


def _range(numbers: Sequence[int]) -> str:
    """As a shell would expand it: 3, {0..47}, {1..47..2} or {0,1,5}."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    step = numbers[1] - first
    if len(numbers) > 1 and list(numbers) == list(range(first, last + 1, step)):
        return f"{{{first}..{last}}}" if step == 1 else f"{{{first}..{last}..{step}}}"
    return f"{{{','.join(map(str, numbers))}}}"
