"""The files that a compilation leaves beside Inductor's own when TORCH_COMPILE_DEBUG is set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from . import tuning
from .kernel_dump import Sizes, dump, sizes_of
from .report import Report

_NAME = "fx_nvfp4"
_FROM_CACHE = (
    "The graph came from Inductor's cache, so the pass did not run and there is no graph to show.\n"
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles it anew.\n"
)


class DebugFiles:
    """What one compiled graph leaves in the folder of its output_code.py.

    fx_nvfp4.txt and fx_nvfp4.json: the report, and the graph before and after the pass. fx_nvfp4_kernels/: the kernels
    of its first block in tiles, to edit and run by themselves. fx_nvfp4_tuning.txt: what has been timed on this GPU.

    Args:
        folder: the "torchinductor" folder of this process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there = set(folder.glob("*"))
        self._graphs: list[tuple[str, str]] = []
        self._sizes: Sizes | None = None

    def add_graph(self, title: str, graph: fx.Graph) -> None:
        """Keep the graph as it is now, and what its first block in tiles is like."""
        self._sizes = self._sizes or sizes_of(graph)
        self._graphs.append((title, graph.python_code("self", verbose=True, include_device=True).src))

    def write(self, report: Report) -> None:
        """Write all files; to be called once Inductor has made its folder."""
        target = self._target()
        target.with_suffix(".json").write_text(report.to_json())
        graphs = "\n".join(f"{title}\n{'=' * len(title)}\n{code}" for title, code in self._graphs)
        target.with_suffix(".txt").write_text(f"{report.table(full=True)}\n\n{graphs or _FROM_CACHE}")
        if self._sizes is not None:
            dump(target.with_name(f"{target.name}_kernels"), self._sizes)
        if torch.cuda.is_available():
            timed = tuning.table_of(torch.device("cuda", torch.cuda.current_device())).describe()
            target.with_name(f"{target.name}_tuning.txt").write_text(timed or "nothing has been timed\n")

    def _target(self) -> Path:
        """Inside the folder that Inductor made since; beside the folders where it made none."""
        made = [f for f in self._folder.glob("*") if f.is_dir() and f not in self._there]
        if made:
            return min(made, key=lambda f: f.stat().st_mtime_ns) / _NAME
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{_NAME}_{len(list(self._folder.glob(f'{_NAME}_*.json')))}"
