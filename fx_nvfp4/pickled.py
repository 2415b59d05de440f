"""What of a packed weight is pickled.

Block scales travel as bytes: torch pickles the storage of an fp8 tensor in a way that only torch.load can read, so that
``pickle.loads`` of any model with one fails.
"""

from __future__ import annotations

from typing import Any

import torch

from .layouts import is_tiled


def state_to_pickle(weight: Any) -> dict[str, Any]:
    """The attributes of a weight, for ``__getstate__``."""
    return {**vars(weight), "block_scale": weight.block_scale.view(torch.uint8)}


def take_pickled(weight: Any, state: dict[str, Any]) -> None:
    """The inverse, for ``__setstate__``; also for what was written before scales travelled as bytes."""
    scale = state["block_scale"]
    if scale.dtype == torch.uint8 and not is_tiled(state["qdata"]):
        scale = scale.view(torch.float8_e4m3fn)
    optional = (*weight.optional_tensor_data_names, *weight.optional_tensor_attribute_names)
    vars(weight).update({**dict.fromkeys(optional), **state, "block_scale": scale})
