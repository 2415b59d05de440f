"""Weights that a compiled model owns are permuted into tiles where they lie, when it is compiled first.

Dynamo has traced with the canonical layout by then, and traces again. The guards of graphs that were compiled before
fail, as the parts have other dtypes, and so have new graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .layouts import is_tiled
from .lowering import compat
from .prepack_model import tile_all
from .report import module_path
from .tensor import NVFP4Weight


def tile_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], everywhere: bool) -> list[str]:
    """Permute the packed parameters and buffers of a Dynamo graph that are on a GPU, or everywhere.

    Does not return where there were any: see :func:`compat.trace_again`.

    Returns:
        Why those that are in the canonical layout stay so.
    """
    if not compat.can_trace_again():
        return []
    owned = [
        (module_path(name), value)
        for value, (name, is_argument) in zip(example_inputs, compat.input_sources(gm), strict=False)
        if not is_argument and _is_whole(value) and (everywhere or value.is_cuda)
    ]
    done = tile_all(owned)
    if done.converted:
        compat.trace_again("packed weights were permuted into tiles")
    return [f"not in tiles: {reason}" for reason in done.left.values()]


def _is_whole(value: Any) -> bool:
    """Whether a graph input is a canonical weight with values, and no view of chosen experts."""
    whole = isinstance(value, NVFP4Weight) and value.expert_ids is None
    return whole and not is_tiled(value.qdata) and compat.is_real(value.qdata)
