"""The same view of each stored part of a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layouts import is_tiled
from .prepack import TILE_ROWS
from .tensor import NVFP4Weight

Dims = Sequence[tuple[int, ...]]


def as_bytes(block_scale: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn of block scales as bytes, which every device can index and copy."""
    return fn(block_scale.view(torch.uint8)).view(block_scale.dtype)


def map_parts(
    w: NVFP4Weight, fn: Callable[[Tensor], Tensor], dims: Dims, act_scale: Tensor | None, **changes: Tensor
) -> NVFP4Weight:
    """fn of codes, block scales and global scales, shown in dims, with the activation scales given."""
    return w.show(
        dims,
        qdata=fn(w.qdata),
        block_scale=as_bytes(w.block_scale, fn),
        global_scale=fn(w.global_scale),
        act_scale=act_scale,
        **changes,
    )


def rows_each(w: NVFP4Weight, part: Tensor) -> int:
    """How many rows of w one entry along the rows of a part of it holds."""
    return TILE_ROWS if is_tiled(w.qdata) and part.dim() > w.global_scale.dim() else 1


def of_lead(w: NVFP4Weight, dims: Dims, fn: Callable[[Tensor], Tensor]) -> NVFP4Weight:
    """fn of the leading dims: of the ids where experts are chosen, else of the stored parts."""
    if w.expert_ids is not None:
        return w.show(dims, expert_ids=fn(w.expert_ids))
    per_expert = w.act_scale is not None and w.act_scale.dim() > 0
    return map_parts(w, fn, dims, fn(w.act_scale) if per_expert else w.act_scale)  # type: ignore[arg-type]
