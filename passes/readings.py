"""The codes and scales that samples read, for each order of nibbles and direction of the global scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_nvfp4.format import E2M1_VALUES

from .probe import Probe, Read


@dataclass(frozen=True)
class Reading:
    """The values that samples read under one way to take them: nibble order and direction of the global scale."""

    low_first: bool
    divide: bool
    nibble: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def code(self) -> Tensor:
        return torch.tensor(E2M1_VALUES)[self.nibble]

    def take(self, mask: Tensor) -> Reading:
        cut = (x[mask] for x in (self.nibble, self.scale, self.global_scale))
        return Reading(self.low_first, self.divide, *cut)


def read_values(probe: Probe, qdata: Read, scale: Read, global_scale: Read | None, k_dim: int) -> Iterator[Reading]:
    """All readings of the leaves that hold qdata, block scales and global scale, the usual order of nibbles first."""
    k = probe.coords[:, k_dim]
    width = qdata.dtype.itemsize
    byte = probe.values(qdata).contiguous().view(torch.uint8).reshape(-1, width)
    byte = byte[torch.arange(len(k)), k // 2 % width].long()
    s = probe.values(scale).view(torch.float8_e4m3fn).float()
    g = probe.values(global_scale) if global_scale else torch.ones(len(k))
    for low_first in (True, False):
        nibble = torch.where((k % 2 == 0) == low_first, byte & 15, byte >> 4)
        for divide in (False, True) if global_scale else (False,):
            yield Reading(low_first, divide, nibble, s, g)
