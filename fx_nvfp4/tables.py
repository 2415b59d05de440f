"""Lookup tables that arrive as graph inputs: found before compiling, hashed into the artifact, guarded at run time.

A model that decodes E2M1 with a table means NVFP4 only for that table's values. Inductor's caches key on shapes, so
the values go into the pass's uuid, and a call with other values runs the graph as it was written.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .lowering import compat
from .report import NVFP4Warning

# Entries of tables of codes, pairs of codes and magnitudes.
_SIZES = (8, 16, 32, 256, 512)


def find_tables(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, Tensor]:
    """Graph inputs that may be lookup tables of codes -> values.

    Small buffers and constants of the model that hold a zero, as code 0 stands for one: no parameters, whose values
    would otherwise decide which artifact fits, and no scales.
    """
    sources = compat.input_sources(gm)
    return {
        i: value.detach()
        for i, value in enumerate(example_inputs)
        if compat.is_real(value) and type(value) in (Tensor, torch.nn.Buffer)
        if value.numel() in _SIZES and value.dim() in (1, 2) and not (i < len(sources) and sources[i][1])
        if value.dtype.itemsize > 1 or value.dim() == 1  # rather codes or block scales
        if bool((value == 0).any())
    }


def hash_tables(tables: Mapping[int, Tensor]) -> str:
    """Hash of positions, dtypes and values."""
    digest = hashlib.sha256()
    for i, table in sorted(tables.items()):
        digest.update(f"{i} {table.dtype} {list(table.shape)}".encode())
        digest.update(_bytes(table))
    return digest.hexdigest()


class TableGuard:
    """Runs a compiled graph while its tables hold the values it was compiled for, and the written one otherwise."""

    def __init__(self, gm: fx.GraphModule, tables: Mapping[int, Tensor]) -> None:
        self._written = _copy_of(gm)
        self._values = {i: t.clone() for i, t in tables.items()}
        # Tables found equal, held so that their addresses stay theirs: several models may share the graph.
        self._verified = {i: {t.data_ptr(): (t, _version(t))} for i, t in tables.items()}
        self._warned = False

    def wrap(self, compiled: Callable[..., Any], used: set[int]) -> Callable[..., Any]:
        """compiled, guarded on the tables at the inputs ``used``."""

        def guarded(*args: Any) -> Any:
            if all(self._holds(i, args[i]) for i in used):
                return compiled(*args)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "a lookup table changed after compilation, so the graph runs as written, without NVFP4 "
                    "kernels; call torch._dynamo.reset() to compile it anew",
                    NVFP4Warning,
                    stacklevel=2,
                )
            return self._written(*args)

        return guarded

    def _holds(self, index: int, table: Tensor) -> bool:
        _, version = self._verified[index].get(table.data_ptr(), (None, None))
        if version is not None and _version(table) == version:
            return True
        if not torch.equal(table, self._values[index]):
            return False
        self._verified[index][table.data_ptr()] = table, _version(table)
        return True


def _copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """gm's graph in a module of its own, as compiling may change it; tensors are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def _version(table: Tensor) -> int | None:
    """Number of in-place changes so far; inference tensors do not count them."""
    return None if table.is_inference() else table._version


def _bytes(table: Tensor) -> bytes:
    return table.cpu().contiguous().view(torch.uint8).numpy().tobytes()
