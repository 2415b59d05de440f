"""A roofline: operations a second over operations a byte of packed weights; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fx_nvfp4.faithfulness.plot import require_matplotlib

from .results import Cell, Run
from .shapes import SHAPES, Shape


def save_plot(run: Run, file: str | Path) -> None:
    """Draw all cells, a colour a layer and a marker a variant, below the roof measured at the start.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the file's ending.
    """
    figure_class, canvas = require_matplotlib()
    figure = figure_class(figsize=(9, 6), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    shapes = {shape.title: shape for shape in SHAPES.values()}
    done = [cell for cell in run.cells if cell.microseconds is not None]
    titles, variants = (list(dict.fromkeys(getattr(c, name) for c in done)) for name in ("shape", "variant"))
    for title in titles:
        for variant in variants:
            points = [_point(c, shapes) for c in done if (c.shape, c.variant) == (title, variant)]
            if points:
                marker, colour = "osv^D*PX<>"[variants.index(variant) % 10], f"C{titles.index(title)}"
                style = "-" if variant.startswith("ours") else ":"
                axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, label=f"{title}, {variant}")
    rates = run.at_start
    ridge = rates.matmul / rates.read
    intensities = sorted({x for x, _ in (_point(c, shapes) for c in done)} | {ridge})
    axes.plot(intensities, [min(rates.read * x, rates.matmul) * 1e-12 for x in intensities], "k-", label="roof")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of the packed experts hit")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{run.device}, torch {run.environment['torch']}: {rates}")
    figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(file)


def _point(cell: Cell, shapes: Mapping[str, Shape]) -> tuple[float, float]:
    """(operations a byte, TFLOP/s)."""
    assert cell.experts_hit is not None
    assert cell.microseconds is not None
    shape = shapes[cell.shape]
    flops = shape.flops(cell.tokens)
    return flops / (cell.experts_hit * shape.expert_bytes), flops / cell.microseconds * 1e-6
