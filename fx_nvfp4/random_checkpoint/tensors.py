"""Random tensors as bytes, made in pieces, so that no tensor has to fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoints.reader import DTYPES

_PIECE = 1 << 24  # numbers made at once
_SCALE_BYTES = (0x70, 0x7E)  # e4m3 numbers from 128 to 448
_MEAN_SCALE = 258.0  # of those bytes, drawn uniformly
_CODE_MEAN_SQUARE = 68.5 / 8  # of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6


@dataclass(frozen=True)
class RandomTensor:
    """A tensor of a checkpoint: dtype in safetensors' names, and what it holds.

    scale: standard deviation of BF16 numbers (0: all are 1), value of F32 ones; codes and block scales have none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float = 0.0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def pieces(self, generator: np.random.Generator) -> Iterator[bytes]:
        """Its bytes in order."""
        count = math.prod(self.shape)
        for start in range(0, count, _PIECE):
            yield self._make(min(_PIECE, count - start), generator)

    def _make(self, count: int, generator: np.random.Generator) -> bytes:
        if self.dtype == "U8":
            return generator.bytes(count)
        if self.dtype == "F8_E4M3":
            return generator.integers(*_SCALE_BYTES, count, np.uint8, endpoint=True).tobytes()
        if self.dtype == "F32":
            return np.full(count, self.scale, np.float32).tobytes()
        numbers = torch.ones(count)
        if self.scale:
            numbers = torch.from_numpy(generator.standard_normal(count, np.float32)) * self.scale
        return numbers.bfloat16().view(torch.int16).numpy().tobytes()


def global_scale(deviation: float) -> float:
    """The multiplier with which random codes and block scales have about that standard deviation."""
    return deviation / (_CODE_MEAN_SQUARE**0.5 * _MEAN_SCALE)
