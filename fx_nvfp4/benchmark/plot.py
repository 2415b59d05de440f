"""A benchmark as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..faithfulness.plot import require_matplotlib
from .measure import Study


def save_plot(study: Study, file: str | Path) -> None:
    """Draw prefill and decoding, a group of bars for each prompt length; the file's ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.
    """
    figure_class, canvas = require_matplotlib()
    figure = figure_class(figsize=(10, 4.5), layout="constrained")
    canvas(figure)
    ways, lengths = (
        list(dict.fromkeys(values)) for values in zip(*((r.way, r.tokens) for r in study.rows), strict=True)
    )
    width = 0.8 / len(ways)
    for axes, stage in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for i, way in enumerate(ways):
            places = [x + (i - (len(ways) - 1) / 2) * width for x in range(len(lengths))]
            times = [getattr(study.row(way, tokens), stage) * 1e3 for tokens in lengths]
            axes.bar(places, times, width, label=way if stage == "prefill" else None)
        axes.set_xticks(range(len(lengths)), [f"{tokens} tokens" for tokens in lengths])
        axes.set(title=stage, ylabel="ms", yscale="log")
    figure.suptitle(f"{study.model}; {study.device}, torch {study.torch}")
    figure.legend(loc="outside lower center", ncols=len(ways))
    figure.savefig(file)
