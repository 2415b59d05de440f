"""The two layouts of a packed weight: rows of codes, or tiles, see :mod:`fx_nvfp4.prepack`. Its dtypes tell which.

    canonical: codes uint8 [.., N, K/2] and block scales float8_e4m3fn [.., N, K/16]
    tiles:     words int32 [.., N/16, K/64, 32, 4] and their scales uint8 [.., N/16, K/64, 32, 2]

Either way there is a float32 global scale [.., N], and the leading dims count experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import format as nvfp4
from .prepack import TILE_K, TILE_ROWS, unpack_tiles

_WORDS, _SCALES = (32, 4), (32, 2)


def is_tiled(qdata: Tensor) -> bool:
    """Whether codes are words of tiles."""
    return qdata.dtype == torch.int32


def weight_sizes(qdata: Tensor) -> tuple[tuple[int, ...], int, int]:
    """(leading sizes, N, K) of a weight with these codes."""
    if is_tiled(qdata):
        *lead, tiles, chunks, _, _ = qdata.shape
        return tuple(lead), tiles * TILE_ROWS, chunks * TILE_K
    *lead, n, half = qdata.shape
    return tuple(lead), n, half * 2


def canonical(qdata: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales in the canonical layout: those given, or new ones unpacked from tiles."""
    return unpack_tiles(qdata, block_scale) if is_tiled(qdata) else (qdata, block_scale)


def check_packed(qdata: Tensor, block_scale: Tensor) -> None:
    """Raise ValueError unless codes and block scales have the dtypes and fitting shapes of either layout."""
    if not is_tiled(qdata):
        if qdata.dtype != torch.uint8:
            words = "tiles have int32 words [.., N/16, K/64, 32, 4]"
            raise ValueError(f"packed codes: expected uint8, got {_describe(qdata)}; {words}")
        nvfp4.check_packed(qdata, block_scale)
        return
    tiles = tuple(qdata.shape[:-2])
    fit = qdata.dim() >= 4 and tuple(qdata.shape[-2:]) == _WORDS and tuple(block_scale.shape) == (*tiles, *_SCALES)
    if not fit or block_scale.dtype != torch.uint8:
        raise ValueError(
            "packed tiles: expected words int32 [.., N/16, K/64, 32, 4] and scales uint8 [.., N/16, K/64, 32, 2], "
            f"got {_describe(qdata)} and {_describe(block_scale)}; canonical codes are uint8 [.., N, K/2]"
        )


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
