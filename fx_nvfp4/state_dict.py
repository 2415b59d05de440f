"""State dicts of models whose weights are in tiles hold them in the canonical layout, for whoever reads them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layouts import is_tiled
from .tensor import NVFP4Weight


def keep_state_dict_canonical(module: nn.Module) -> None:
    """From now on ``state_dict()`` copies the module's own weights that are in tiles into the canonical layout.

    ``state_dict(keep_vars=True)`` gives the parameters themselves, as torch has it, and copies nothing.
    """
    if _canonical not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_canonical)


def keep_state_dicts_canonical(model: nn.Module) -> None:
    """As :func:`keep_state_dict_canonical`, for all modules of a model that hold weights in tiles."""
    for module in model.modules():
        if any(_in_tiles(t) for held in (module._parameters, module._buffers) for t in held.values()):
            keep_state_dict_canonical(module)


def _canonical(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for held in (module._parameters, module._buffers):
        for name, own in held.items():
            entry = state.get(prefix + name)
            if entry is not own and isinstance(entry, NVFP4Weight) and _in_tiles(entry):
                state[prefix + name] = entry.canonical()


def _in_tiles(tensor: Any) -> bool:
    return isinstance(getattr(tensor, "data", None), NVFP4Weight) and is_tiled(tensor.data.qdata)
