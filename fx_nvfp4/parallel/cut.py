"""Which part of stacked experts a rank holds, and the tensors of that part in memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import BLOCK
from ..fused import BIAS, DOWN_NAME
from .experts import Experts


def share(count: int, rank: int, ranks: int) -> range:
    """What one rank has of so many things in a row; shares differ by one at most."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def bounds(count: int, ranks: int, each: int = 1) -> tuple[int, ...]:
    """Where the shares of all ranks begin, and where the last one ends, in elements; each: how many a thing has."""
    return tuple(each * share(count, rank, ranks).start for rank in range(ranks + 1))


def by_expert(experts: Experts, name: str, mine: range) -> Tensor:
    """Whole experts of one weight or bias."""
    return own(experts.module.get_parameter(name).data[mine.start : mine.stop])


def by_intermediate(experts: Experts, name: str, mine: range, first: bool) -> Tensor:
    """Of every expert what belongs to some elements of the intermediate dim, gate and up together.

    Args:
        mine: elements, whole blocks of 16.
        first: of several ranks, whose results are summed, one adds the bias of down.
    """
    value = experts.module.get_parameter(name).data
    if name == DOWN_NAME:
        return own(value.narrow(1 if experts.transposed else 2, mine.start, len(mine)))
    if name == DOWN_NAME + BIAS:
        return own(value) if first else torch.zeros_like(value)
    rows = _rows(experts, mine).to(value.device)
    return own(value.index_select(2 if experts.transposed and value.dim() == 3 else 1, rows))


def blocks_of(experts: Experts, rank: int, ranks: int) -> range:
    """One rank's share of the intermediate dim, in elements."""
    blocks = share(experts.inner // BLOCK, rank, ranks)
    return range(blocks.start * BLOCK, blocks.stop * BLOCK)


def _rows(experts: Experts, mine: range) -> Tensor:
    """Rows of an up weight that give some elements of the intermediate dim."""
    if experts.layout == "interleaved":
        return torch.arange(2 * mine.start, 2 * mine.stop)
    rows = torch.arange(mine.start, mine.stop)
    return torch.cat((rows, experts.inner + rows)) if experts.layout == "concatenated" else rows


def own(part: Tensor) -> Tensor:
    """A copy of a part, so that the whole can be freed."""
    return part.clone(memory_format=torch.contiguous_format)
