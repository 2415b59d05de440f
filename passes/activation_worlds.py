"""Numbers to try a quantiser of activations with: every boundary of the format, relative to the global scale in use."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fx_nvfp4.format import BLOCK

# Powers of two keep ties exact in 16 bits; the others make reciprocals and products round.
SCALES = (1.0, 2.0**-6, 2.0**-11, 1 / 137.3, 0.000207, 0.0371, 3.3)
_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Worlds:
    """blocks: [B, 16], float64; scales: [B], the multiplier each block is tried with."""

    blocks: Tensor
    scales: Tensor

    def where(self, keep: Tensor) -> Worlds:
        return Worlds(self.blocks[keep], self.scales[keep])

    def __add__(self, others: Worlds) -> Worlds:
        return Worlds(torch.cat((self.blocks, others.blocks)), torch.cat((self.scales, others.scales)))

    def repeated(self, times: int) -> Worlds:
        return Worlds(self.blocks.repeat(times, 1), self.scales.repeat(times))


@lru_cache(maxsize=1)
def finite() -> Worlds:
    """Ties and their neighbours under ordinary, subnormal, vanishing and overflowing block scales, zeros, and noise."""
    generator = torch.Generator().manual_seed(16)
    wanted = torch.cat((_block_scales(), torch.rand(24, generator=generator, dtype=torch.float64) * 400))
    ties = torch.tensor(_TIES, dtype=torch.float64)
    blocks, scales = [], []
    for scale in SCALES:
        for signs in (1, -1):
            some = torch.randint(0, len(ties), (len(wanted), BLOCK), generator=generator)
            beside = torch.randint(-1, 2, some.shape, generator=generator).double() * 2.0**-20
            codes = ties[some] * (1 + beside) * signs
            codes[:, ::5] = torch.randn(len(wanted), len(range(0, BLOCK, 5)), generator=generator).double() * 2
            codes = codes.clamp(-6, 6)
            codes[torch.arange(len(wanted)), some[:, 0] * 2] = 6.0 * signs
            blocks.append(codes * wanted[:, None] * scale)
        blocks += [_noise(scale, generator), _zeros()]
        scales.append(torch.full((2 * len(wanted) + len(blocks[-2]) + len(blocks[-1]),), scale, dtype=torch.float64))
    return Worlds(torch.cat(blocks), torch.cat(scales))


@lru_cache(maxsize=8)
def around(numbers: tuple[float, ...]) -> Worlds:
    """Blocks that hold numbers which the program compares with, and what is next to them, and those of which they are
    the maximum, or the block scale with the global scale or without."""
    generator = torch.Generator().manual_seed(18)
    near = torch.tensor([1.0, -1.0, 1 - 2.0**-7, 1 + 2.0**-7], dtype=torch.float64).repeat(BLOCK // 8)
    blocks, scales = [torch.zeros(0, BLOCK, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for number, scale in itertools.product(numbers, SCALES[::3]):
        largest = number * torch.tensor([1.0, 5.0, 6.0, 6 * scale], dtype=torch.float64)[:, None]
        some = (torch.rand(len(largest), BLOCK, generator=generator, dtype=torch.float64) * 2 - 1) * largest
        some[:, ::2] = torch.where(largest >= number, number * near.roll(len(blocks)), some[:, ::2])
        some[:, 1] = largest[:, 0]
        blocks.append(some.roll(len(blocks) * 5, 1))
        scales.append(torch.full((len(some),), scale, dtype=torch.float64))
    found = Worlds(torch.cat(blocks), torch.cat(scales))
    return found.where(found.blocks.abs().amax(1) < torch.finfo(torch.float16).max)


@lru_cache(maxsize=1)
def not_finite() -> Worlds:
    """A NaN or an infinity among ordinary numbers."""
    generator = torch.Generator().manual_seed(17)
    blocks = torch.randn(12, BLOCK, generator=generator).double()
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        blocks[row::3, 4] = value
    return Worlds(blocks, torch.full((12,), 2.0**-6, dtype=torch.float64))


def _block_scales() -> Tensor:
    """Numbers before they are rounded to e4m3: values, half-way points, below the smallest and above the largest."""
    values = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    halves = (values[1:] + values[:-1]) / 2
    extremes = torch.tensor(
        [2.0**-12, 2.0**-10, 2.0**-10 * 1.01, 447.0, 448.0, 456.0, 465.0, 480.0, 5e3], dtype=torch.float64
    )
    return torch.cat((values[::4], values[:8], halves[::5], halves[:8], extremes))


def _noise(scale: float, generator: torch.Generator) -> Tensor:
    spread = torch.tensor([1.0, 30.0, 400.0, 3000.0, 2.0**-8], dtype=torch.float64)[:, None]
    return torch.randn(5, BLOCK, generator=generator).double() * spread * scale


def _zeros() -> Tensor:
    zeros = torch.zeros(3, BLOCK, dtype=torch.float64)
    zeros[1] = -0.0
    zeros[2, 3] = 1e-30
    return zeros
