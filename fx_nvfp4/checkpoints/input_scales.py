"""Activation scales: read together, so that one error names all that cannot be used."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CheckpointError
from .formats import Convention, read_input_multiplier
from .reader import Reader, StoredTensor

WEIGHT_ONLY = 'load(..., activations="none") leaves them unused and keeps activations at their own precision'
_NAMED = 5


class InputScales:
    """Reads activation scales, and remembers those that are missing, zero, negative, NaN or infinite.

    Calibration gives no usable scale to experts that no token was routed to, so they seldom come alone.
    """

    def __init__(self, reader: Reader, convention: Convention) -> None:
        self._reader, self._convention = reader, convention
        self._unusable: list[str] = []

    def multiplier(self, tensor: StoredTensor) -> Tensor:
        """Global scale(s) of the activations: float64, flat; not to be used before :meth:`check`."""
        scale = read_input_multiplier(self._reader, tensor, self._convention)
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            share = f", {int(bad.sum())} of {bad.numel()}" if bad.numel() > 1 else ""
            self._unusable.append(f"{tensor.name} (a multiplier of {scale[bad][0].item()}{share})")
        return scale

    def missing(self, name: str) -> None:
        """Remember that there is no tensor of that name."""
        self._unusable.append(f"{name} (no such tensor)")

    def check(self) -> None:
        """Raise if any scale was not usable.

        Raises:
            CheckpointError: how many, and the first of them by name.
        """
        if not self._unusable:
            return
        named = ", ".join(self._unusable[:_NAMED]) + (", ..." if len(self._unusable) > _NAMED else "")
        raise CheckpointError(
            f"found {len(self._unusable)} unusable input scales: {named}; expected positive finite ones, "
            f"calibration gives none to experts that saw no token; {WEIGHT_ONLY}, or calibrate these layers again"
        )
