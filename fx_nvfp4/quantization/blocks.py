"""The rules by which a block of 16 gets its scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import format as nvfp4
from ..dialects import Dialect, encode_e2m1, get_dialect

BLOCK_SCALE_RULES = ("amax", "mse")

# In bytes of e4m3, whose positive numbers are ordered as their bytes. Of normal weights 99.9 % find their best scale
# here: a little below that of the maximum, or half as large again, where 4 and not 6 is the largest code.
_STEPS = (1, -1, 2, -2, 3, 4, 5, 6)
_LARGEST = 0x7E


def quantize(x: Tensor, global_scale: Tensor, dialect: str, rule: str) -> tuple[Tensor, Tensor]:
    """Codes and block scales of x [..., K]; arguments, results and errors as :func:`fx_nvfp4.format.quantize`.

    Args:
        global_scale: float64 [..., 1].
        rule: "amax" or "mse", see :class:`fx_nvfp4.NVFP4Config`.
    """
    if rule == "amax":
        return nvfp4.quantize(x, global_scale, dialect)
    producer = get_dialect(dialect)
    s, g = (t.unsqueeze(-1) for t in nvfp4.scale_pair(global_scale, x.device))
    blocks = x.contiguous().unflatten(-1, (-1, nvfp4.BLOCK))
    scale = producer.block_scale(producer.amax(blocks), s, g).view(torch.uint8)
    codes, error = _try(blocks, scale, s, g, producer)
    first = scale
    for step in _STEPS:
        other = (first.int() + step).clamp(_smallest(producer), _LARGEST).to(torch.uint8)
        other_codes, other_error = _try(blocks, other, s, g, producer)
        # Strictly: a tie keeps the scale of the maximum.
        better = other_error < error
        scale, codes = torch.where(better, other, scale), torch.where(better, other_codes, codes)
        error = torch.where(better, other_error, error)
    return nvfp4.pack(codes.flatten(-2)), scale.squeeze(-1).view(torch.float8_e4m3fn)


def _try(blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor, producer: Dialect) -> tuple[Tensor, Tensor]:
    """Codes of the blocks [..., K/16, 16] under scales (bytes) [..., K/16, 1], and each block's squared error."""
    numbers = scale.view(torch.float8_e4m3fn).float()
    codes = encode_e2m1(producer.scaled(blocks, numbers, s, g))
    values = producer.value(nvfp4.decode_codes(codes), numbers, s, g)
    return codes, (values - blocks.float()).square().sum(-1, keepdim=True)


def _smallest(producer: Dialect) -> int:
    """The byte of the smallest scale that a producer writes for a block that is not zero."""
    smallest = getattr(producer, "smallest_scale", 2.0**-9)
    return int(torch.tensor(smallest).to(torch.float8_e4m3fn).view(torch.uint8))
