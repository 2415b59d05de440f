"""A study as a picture; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import Study


def require_matplotlib() -> Any:
    """matplotlib, drawing to files alone.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots are drawn with matplotlib: pip install matplotlib") from error
    return Figure, FigureCanvasAgg


def check_plot(file: Path | None) -> None:
    """Raise before anything is measured where it could not be drawn into that file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such folder, or matplotlib draws no files of that ending.
    """
    if file is None:
        return
    figure, canvas = require_matplotlib()
    endings = sorted(canvas(figure()).get_supported_filetypes())
    if not file.parent.is_dir():
        raise ValueError(f"--plot {file}: there is no folder {file.parent}")
    if file.suffix.removeprefix(".").lower() not in endings:
        raise ValueError(f"--plot {file}: the name must end in one of {endings}")


def save_plot(study: Study, file: str | Path) -> None:
    """Draw the fp32 errors, a group of bars a case, to a file whose ending chooses the format (png, svg, pdf).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.
    """
    figure_class, canvas = require_matplotlib()
    ways = list(dict.fromkeys(row.way for row in study.rows))
    figure = figure_class(figsize=(2 + 1.6 * len(study.cases), 4.5), layout="constrained")
    canvas(figure)
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        found = {row.case: row.fp32 for row in study.rows if row.way == way}
        places = [c + (i - (len(ways) - 1) / 2) * width for c, case in enumerate(study.cases) if case in found]
        axes.bar(places, [found[case] for case in study.cases if case in found], width, label=way)
    axes.set_yscale("log")
    axes.set_xticks(range(len(study.cases)), [case.replace(", ", "\n") for case in study.cases])
    axes.set_ylabel("relative error of the fp32 output")
    axes.set_title(f"against the exact sum; {study.device}, torch {study.torch}")
    figure.legend(loc="outside lower center", ncols=len(ways))
    figure.savefig(file)
