"""The files that a compilation leaves beside Inductor's own when TORCH_COMPILE_DEBUG is set."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from .report import Report

_NAME = "fx_nvfp4"
_FROM_CACHE = (
    "The graph came from Inductor's cache, so the pass did not run and there is no graph to show.\n"
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles it anew.\n"
)


class DebugFiles:
    """fx_nvfp4.txt and fx_nvfp4.json of one compiled graph, in the folder of its output_code.py.

    Args:
        folder: the "torchinductor" folder of this process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there = set(folder.glob("*"))
        self._graphs: list[tuple[str, str]] = []

    def add_graph(self, title: str, graph: fx.Graph) -> None:
        """Keep the graph as it is now."""
        self._graphs.append((title, graph.python_code("self", verbose=True, include_device=True).src))

    def write(self, report: Report) -> None:
        """Write both files; to be called once Inductor has made its folder."""
        target = self._target()
        target.with_suffix(".json").write_text(report.to_json())
        graphs = "\n".join(f"{title}\n{'=' * len(title)}\n{code}" for title, code in self._graphs)
        target.with_suffix(".txt").write_text(f"{report.table(full=True)}\n\n{graphs or _FROM_CACHE}")

    def _target(self) -> Path:
        """Inside the folder that Inductor made since; beside the folders where it made none."""
        made = [f for f in self._folder.glob("*") if f.is_dir() and f not in self._there]
        if made:
            return min(made, key=lambda f: f.stat().st_mtime_ns) / _NAME
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{_NAME}_{len(list(self._folder.glob(f'{_NAME}_*.json')))}"
