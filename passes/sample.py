"""The sampled evaluator with the handlers of ATen's ops: what everything outside of it imports it by."""

from __future__ import annotations

from . import sample_moves, sample_values  # noqa: F401 - importing them registers their handlers
from .boundaries import with_boundaries
from .coords import Coords
from .nodes import arguments, hint, is_tensor, same_size, shape_of
from .sampler import ATEN, MOVES, OutOfRange, Rules, Sampler, SymbolicPosition, Unsupported, inputs_of, is_supported

__all__ = [
    "ATEN",
    "MOVES",
    "Coords",
    "OutOfRange",
    "Rules",
    "Sampler",
    "SymbolicPosition",
    "Unsupported",
    "arguments",
    "hint",
    "inputs_of",
    "is_supported",
    "is_tensor",
    "same_size",
    "shape_of",
    "with_boundaries",
]
