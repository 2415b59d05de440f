"""The sampled evaluator with the handlers of ATen's ops: what everything outside of it imports it by."""

from __future__ import annotations

from . import sample_moves, sample_values  # noqa: F401 - importing them registers their handlers
from .boundaries import with_boundaries
from .coords import Coords
from .nodes import arguments, hint, is_tensor, shape_of
from .sampler import Sampler, Unsupported, handles, handles_item, inputs_of, is_supported

__all__ = [
    "Coords",
    "Sampler",
    "Unsupported",
    "arguments",
    "handles",
    "handles_item",
    "hint",
    "inputs_of",
    "is_supported",
    "is_tensor",
    "shape_of",
    "with_boundaries",
]
