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
from torch.utils.weak import WeakIdKeyDictionary

from .lowering import compat
from .report import NVFP4Warning

# Entries of tables of codes, pairs of codes and magnitudes.
_SIZES = (8, 16, 32, 256, 512)


def find_tables(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, Tensor]:
    """Graph inputs that may be lookup tables of codes -> values.

    Small buffers and constants of the model that hold a zero, as code 0 stands for one: no scales, no arguments of the
    compiled function, and of parameters only frozen ones that repeat a few values, because the values decide which
    artifact fits, and biases shall not.
    """
    sources = compat.input_sources(gm)
    return {
        i: value.detach()
        for i, value in enumerate(example_inputs)
        if compat.is_real(value) and type(value) in (Tensor, torch.nn.Buffer, torch.nn.Parameter)
        if value.numel() in _SIZES and value.dim() in (1, 2) and not (i < len(sources) and sources[i][1])
        if value.dtype.itemsize > 1 or value.dim() == 1  # rather codes or block scales
        if not isinstance(value, torch.nn.Parameter) or _is_frozen_table(value)
        if bool((value == 0).any())
    }


def _is_frozen_table(parameter: Tensor) -> bool:
    return not parameter.requires_grad and len(parameter.detach().unique()) in range(4, 17)


def hash_tables(tables: Mapping[int, Tensor]) -> str:
    """Hash of positions, dtypes and values."""
    digest = hashlib.sha256()
    for i, table in sorted(tables.items()):
        digest.update(f"{i} {table.dtype} {list(table.shape)}".encode())
        digest.update(_bytes(table))
    return digest.hexdigest()


class TableGuard:
    """Runs a compiled graph while its tables hold the values it was compiled for, and the written one otherwise.

    On a CPU the entries are compared at each call, so every change is noticed. On an accelerator that would make the
    host wait for the device, so a table is compared once for each state that PyTorch tells apart: another tensor,
    storage or version. Writes that PyTorch does not count (through ``.data`` or a kernel of one's own) are not noticed
    there. It counts none for inference tensors: those are compared at each call, except under CUDA graph capture.
    """

    def __init__(self, gm: fx.GraphModule, tables: Mapping[int, Tensor]) -> None:
        self._written = _copy_of(gm)
        self._values = {i: t.clone() for i, t in tables.items()}
        # States found equal, by tensor: several models may share the graph. A tensor that is gone leaves no entry.
        self._verified: dict[int, WeakIdKeyDictionary] = {i: WeakIdKeyDictionary() for i in tables}
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
        if _is_host_memory(table):
            return torch.equal(table, self._values[index])
        verified, state = self._verified[index], _state(table)
        if state is not None and verified.get(table) == state:
            return True
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # reading is not possible now, and the warm-up calls before a capture have done it
        if not torch.equal(table, self._values[index]):
            return False
        verified[table] = state
        return True


def _is_host_memory(table: Tensor) -> bool:
    return table.device.type == "cpu"


def _state(table: Tensor) -> tuple[int, int] | None:
    """What changes with every write that PyTorch counts; it counts none to inference tensors."""
    return None if table.is_inference() else (table.data_ptr(), table._version)


def _copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """gm's graph in a module of its own, as compiling may change it; tensors are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def _bytes(table: Tensor) -> bytes:
    return table.cpu().contiguous().view(torch.uint8).numpy().tobytes()
