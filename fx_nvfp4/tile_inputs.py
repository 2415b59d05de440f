"""Weights that a compiled model owns are permuted into tiles where they lie, when it is compiled first.

Dynamo has traced with the canonical layout by then, and traces again. The guards of graphs that were compiled before
fail, as the parts have other dtypes, and so have new graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .layouts import is_tiled
from .lowering import compat
from .prepack_model import tile_all
from .report import module_path
from .tensor import NVFP4Weight


def tile_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], everywhere: bool) -> list[str]:
    """Permute the packed parameters and buffers of a Dynamo graph for which kernels read tiles, or all of them.

    Those are weights on a GPU that show 16 bits, in graphs without gradients: others would be unpacked at each call.
    Does not return where there were any: see :func:`compat.trace_again`.

    Returns:
        Why those that are in the canonical layout stay so.
    """
    if not compat.can_trace_again() or (_differentiates(example_inputs) and not everywhere):
        return []
    owned = [
        (module_path(name), value)
        for value, (name, is_argument) in zip(example_inputs, compat.input_sources(gm), strict=False)
        if not is_argument and _is_whole(value) and (everywhere or _gains(value))
    ]
    done = tile_all(owned)
    if done.converted:
        compat.trace_again("packed weights were permuted into tiles")
    return [f"not in tiles: {reason}" for reason in dict.fromkeys(done.left.values())]


def _differentiates(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _gains(weight: NVFP4Weight) -> bool:
    return _on_gpu(weight) and weight.dtype.itemsize == 2


def _on_gpu(weight: NVFP4Weight) -> bool:
    return weight.is_cuda


def _is_whole(value: Any) -> bool:
    """Whether a graph input is a canonical weight with values, and no view of chosen experts."""
    whole = isinstance(value, NVFP4Weight) and value.expert_ids is None
    return whole and not is_tiled(value.qdata) and compat.is_real(value.qdata)
