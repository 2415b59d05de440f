"""A roofline: operations a second over operations a byte of packed weights; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fx_nvfp4.faithfulness.plot import require_matplotlib

from .results import Cell, Run
from .shapes import SHAPES, Rates, Shape


def save_plot(run: Run, file: str | Path) -> None:
    """Draw all cells, a panel a layer and a marker a variant, below the roof measured at the start.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the file's ending.
    """
    figure_class, canvas = require_matplotlib()
    shapes = {shape.title: shape for shape in SHAPES.values()}
    done = [cell for cell in run.cells if cell.microseconds is not None]
    titles, variants = (list(dict.fromkeys(getattr(c, name) for c in done)) for name in ("shape", "variant"))
    columns = max(1, min(3, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    figure = figure_class(figsize=(2 + 4 * columns, 1 + 4 * rows), layout="constrained")
    canvas(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, title in zip(panels, titles, strict=False):
        points = [(c.variant, *_point(c, shapes)) for c in done if c.shape == title]
        for variant in variants:
            line = [(x, y) for name, x, y in points if name == variant]
            style, mark = "-" if variant.startswith("ours") else ":", variants.index(variant) % 10
            if line:
                panel.plot(*zip(*line, strict=True), style, marker="osv^D*PX<>"[mark], color=f"C{mark}", label=variant)
        _draw_roof(panel, run.at_start, [x for _, x, _ in points])
        panel.set(title=title, xscale="log", yscale="log", xlabel="operations a byte of the packed experts hit")
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    panels[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"{run.device}, torch {run.environment['torch']}: {run.at_start}")
    legends = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels)
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(file)


def _draw_roof(panel: Any, rates: Rates, intensities: Sequence[float]) -> None:
    xs = sorted({*intensities, rates.matmul / rates.read})
    panel.plot(xs, [min(rates.read * x, rates.matmul) * 1e-12 for x in xs], "k-", label="roof")


def _point(cell: Cell, shapes: Mapping[str, Shape]) -> tuple[float, float]:
    """(operations a byte, TFLOP/s)."""
    assert cell.experts_hit is not None
    assert cell.microseconds is not None
    shape = shapes[cell.shape]
    flops = shape.flops(cell.tokens)
    return flops / (cell.experts_hit * shape.expert_bytes), flops / cell.microseconds * 1e-6
