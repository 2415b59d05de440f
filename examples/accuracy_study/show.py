"""Results as text and as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .questions import CHOICES
from .study import Result


def tables(results: Sequence[Result], questions: int) -> str:
    """Three tables: what it costs, layer by layer, expert by expert."""
    return "\n\n".join((_quality(results, questions), _layers(results), _experts(results)))


def _quality(results: Sequence[Result], questions: int) -> str:
    rows = [("variant", "perplexity", "of bf16", "answers right", "as bf16's")]
    for r in results:
        right = f"{r.right:.1%} +- {_spread(r.right, questions):.1%}"
        rows.append(
            (r.name, f"{r.perplexity:.4f}", f"{r.ratio:.4f} +- {r.ratio_spread:.4f}", right, f"{r.as_bf16:.1%}")
        )
    return table(rows)


def _layers(results: Sequence[Result]) -> str:
    quantised = [r for r in results if r.experts]
    numbers = range(len(quantised[0].layers_alone))
    rows = [("relative error", *(f"layer {i}" for i in numbers), *(f"after {i}" for i in numbers))]
    rows += [(r.name, *(f"{e:.3f}" for e in (*r.layers_alone, *r.layers_after))) for r in quantised]
    return table(rows)


def _experts(results: Sequence[Result]) -> str:
    rows = [("error of experts", "least", "median", "largest", "which")]
    for r in (r for r in results if r.experts):
        places = ((e, f"layer {i}, expert {j}") for i, layer in enumerate(r.experts) for j, e in enumerate(layer))
        errors = sorted((e, place) for e, place in places if e is not None)
        figures = [f"{errors[i][0]:.3f}" for i in (0, len(errors) // 2, -1)]
        rows.append((r.name, *figures, errors[-1][1]))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def plot(results: Sequence[Result], questions: int, file: Path) -> None:
    """Perplexity, answers, errors by layer, errors by expert; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    (perplexity, right), (layers, experts) = figure.subplots(2, 2)
    _bars(perplexity, right, results, questions)
    for r in (r for r in results if r.experts):
        layers.plot(r.layers_after, marker="o", label=r.name)
        errors = [math.nan if e is None else e for layer in r.experts for e in layer]
        experts.plot(errors, marker=".", linewidth=0.5)
    shape = results[-1].experts
    count = len(shape[0])
    layers.set(xlabel="layer", ylabel="relative error of the hidden state after it", yscale="log")
    layers.set_xticks(range(len(shape)))
    figure.legend(loc="outside lower center", ncols=3)
    experts.set(xlabel=f"expert ({count} a layer)", ylabel="relative error of its results", yscale="log")
    experts.set_xticks(range(0, count * len(shape), count))
    experts.grid(axis="x")
    figure.savefig(file, dpi=100)


def _bars(perplexity: Any, right: Any, results: Sequence[Result], questions: int) -> None:
    names = [r.name for r in results]
    perplexity.errorbar([r.ratio for r in results], names, xerr=[r.ratio_spread for r in results], fmt="o", capsize=3)
    perplexity.set(xlabel="perplexity, as a multiple of bf16's")
    perplexity.grid(axis="x")
    right.barh(names, [r.right for r in results], xerr=[_spread(r.right, questions) for r in results])
    right.axvline(1 / CHOICES, color="black", linestyle=":")
    right.set(xlabel="answers right (dotted: guessing)")
    for axes in (perplexity, right):
        axes.invert_yaxis()
    right.tick_params(labelleft=False)


def _spread(share: float, count: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / count)
