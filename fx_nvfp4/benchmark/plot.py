"""A benchmark as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..faithfulness.plot import require_matplotlib
from .measure import Study
from .table import prompts_text


def save_plot(study: Study, file: str | Path) -> None:
    """Draw prefill and decoding, a group of bars for each batch of prompts; the file's ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.
    """
    figure_class, canvas = require_matplotlib()
    figure = figure_class(figsize=(10, 4.5), layout="constrained")
    canvas(figure)
    ways, prompts = list(dict.fromkeys(row.way for row in study.rows)), study.prompts
    width = 0.8 / len(ways)
    for axes, stage in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for i, way in enumerate(ways):
            rows = {x: row for x, p in enumerate(prompts) if (row := study.row(way, *p)) is not None}
            places = [x + (i - (len(ways) - 1) / 2) * width for x in rows]
            times = [getattr(row, stage) * 1e3 for row in rows.values()]
            axes.bar(places, times, width, label=way if stage == "prefill" else None)
        axes.set_xticks(range(len(prompts)), [prompts_text(*p) for p in prompts])
        axes.set(title=stage, ylabel="ms", yscale="log")
    figure.suptitle(f"{study.model}; {study.device}, torch {study.torch}")
    figure.legend(loc="outside lower center", ncols=len(ways))
    figure.savefig(file)
