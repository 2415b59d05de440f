"""The codes and scales that samples read, for each order of nibbles and direction of the global scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_nvfp4.format import E2M1_VALUES

from .probe import Probe, Read


@dataclass(frozen=True)
class Reading:
    """The values that samples read under one way to take them.

    nibbles: their order in an element. divide: whether by the global scale. factor: a number in place of it, if any.
    """

    nibbles: tuple[int, ...]
    divide: bool
    factor: float | None
    nibble: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def code(self) -> Tensor:
        return torch.tensor(E2M1_VALUES)[self.nibble]

    def take(self, mask: Tensor) -> Reading:
        cut = (x[mask] for x in (self.nibble, self.scale, self.global_scale))
        return Reading(self.nibbles, self.divide, self.factor, *cut)


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


def read_values(
    probe: Probe, qdata: Read, scale: Read, global_scale: Read | None, k_dim: int, factors: Sequence[float]
) -> Iterator[Reading]:
    """All readings of the leaves that hold qdata, block scales and global scale, the usual order of nibbles first.

    Without a global scale each of `factors` may take its place.
    """
    k = probe.coords[:, k_dim]
    bytes_each = qdata.dtype.itemsize
    element = probe.values(qdata).contiguous().view(torch.uint8).reshape(-1, bytes_each).long()
    s = probe.values(scale).view(torch.float8_e4m3fn).float()
    ones = torch.ones(len(k))
    scales: list[tuple[float | None, Tensor]] = [(None, ones), *((f, ones * f) for f in factors)]
    if global_scale:
        scales = [(None, probe.values(global_scale))]
    for (factor, g), order in itertools.product(scales, _orders(2 * bytes_each)):
        place = torch.tensor(order)[k % len(order)]
        nibble = (element[torch.arange(len(k)), place // 2] >> place % 2 * 4) & 15
        for divide in (False, True) if global_scale or factor is not None else (False,):
            yield Reading(order, divide, factor, nibble, s, g)
