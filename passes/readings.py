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

    nibbles: tuple[int, ...]
    divide: bool
    nibble: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def code(self) -> Tensor:
        return torch.tensor(E2M1_VALUES)[self.nibble]

    def take(self, mask: Tensor) -> Reading:
        cut = (x[mask] for x in (self.nibble, self.scale, self.global_scale))
        return Reading(self.nibbles, self.divide, *cut)


def _orders(codes: int) -> Iterator[tuple[int, ...]]:
    """Ways to lay 2, 4, 8 or 16 codes out in one element: by place of each in the order of K, 0 the lowest four bits.

    From the low end, from the high end; in words also bytes from the low end with their high nibbles first, bytes from
    the high end with their low nibbles first, and even codes before odd ones, as AWQ has them.
    """
    rising = tuple(range(codes))
    orders = [rising, rising[::-1]]
    if codes > 2:
        swapped = tuple(i ^ 1 for i in rising)
        orders += [swapped, swapped[::-1], tuple(i // 2 + i % 2 * codes // 2 for i in rising)]
    return iter(orders)


def read_values(probe: Probe, qdata: Read, scale: Read, global_scale: Read | None, k_dim: int) -> Iterator[Reading]:
    """All readings of the leaves that hold qdata, block scales and global scale, the usual order of nibbles first."""
    k = probe.coords[:, k_dim]
    bytes_each = qdata.dtype.itemsize
    element = probe.values(qdata).contiguous().view(torch.uint8).reshape(-1, bytes_each).long()
    s = probe.values(scale).view(torch.float8_e4m3fn).float()
    g = probe.values(global_scale) if global_scale else torch.ones(len(k))
    for order in _orders(2 * bytes_each):
        place = torch.tensor(order)[k % len(order)]
        nibble = (element[torch.arange(len(k)), place // 2] >> place % 2 * 4) & 15
        for divide in (False, True) if global_scale else (False,):
            yield Reading(order, divide, nibble, s, g)
