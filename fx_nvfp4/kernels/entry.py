# mypy: allow-untyped-defs
"""Rows of activations as products on tiled weights take them: chosen, weighted, rounded to NVFP4 and permuted at once.

Columns are permuted inside chunks of 64 as fx_nvfp4/prepack.py says (permute_k), so that a lane of the matrix units
needs one block scale of the weight for each of its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import ENTRY_BLOCK, ENTRY_TOKENS
from .fake_quantize import round_blocks
from .fragments import form_of
from .launch import dependent_launch, launch, wait_for_inputs
from .operands import require
from .routing import load_expert
from .sizes import cdiv, next_power_of_2


@triton.jit
def round_unscaled(x, act_scale, NATIVE: tl.constexpr):
    """x [B, 16] float32 to code * block_scale [B, 16] float32, for one activation scale, float64."""
    # Both rounded from float64, so that neither is the rounded inverse of a rounded number.
    codes, block_scale = round_blocks(x, act_scale.to(tl.float32), (1.0 / act_scale).to(tl.float32), NATIVE)
    return codes * block_scale[:, None]


@triton.jit
def permute_chunks(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] with each chunk of 64 columns in the order of the matrix units."""
    x = tl.reshape(x, (ROWS, COLUMNS // 64, 4, 4, 2, 2))  # row, chunk, t, step, half, e
    return tl.reshape(tl.permute(x, (0, 1, 3, 4, 2, 5)), (ROWS, COLUMNS))


@triton.jit
def permuted(column):
    """Where permute_chunks puts a column."""
    return column // 64 * 64 + column // 4 % 4 * 16 + column // 2 % 2 * 8 + column // 16 % 4 * 2 + column % 2


@triton.jit(do_not_specialize=["rows_per_x", "slots", "E"])
def entry_kernel(
    x_ptr,
    stride_xm,
    ids_ptr,
    weights_ptr,
    in_scale_ptr,
    out_ptr,
    rows_per_x,
    slots,
    K,
    E,
    ROWS: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    PERMUTE: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row r of out from row r // rows_per_x of x, ROWS of them in a program; weights and in_scale may be None."""
    wait_for_inputs(PDL)
    blocks = tl.cdiv(K, BLOCK)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    whole = tl.load(x_ptr + first // rows_per_x * stride_xm + column, mask=column < K, other=0.0)
    for place in tl.static_range(ROWS):
        slot = first + place
        x = whole
        if weights_ptr is not None:
            x = (x.to(tl.float32) * tl.load(weights_ptr + slot).to(tl.float32)).to(dtype)
        if in_scale_ptr is not None:
            expert = 0
            if PER_EXPERT:
                # A slot of nobody is read by nobody; any scale will do.
                found = load_expert(ids_ptr, slot, slots, E)
                expert = tl.where(found < E, found, 0)
            blocks_of_x = tl.reshape(x.to(tl.float32), (BLOCK // 16, 16))
            x = tl.reshape(round_unscaled(blocks_of_x, tl.load(in_scale_ptr + expert), NATIVE), (BLOCK,)).to(dtype)
        if PERMUTE:
            x = tl.reshape(permute_chunks(tl.reshape(x, (1, BLOCK)), 1, BLOCK), (BLOCK,))
        tl.store(out_ptr + slot * K + column, x, mask=column < K)


def enter(
    x: Tensor,
    ids: Tensor | None = None,
    experts: int = 0,
    weights: Tensor | None = None,
    act_scale: Tensor | None = None,
    apart: bool = False,
    permute: bool = True,
) -> Tensor:
    """x [T, K] -> [T, K] permuted, or with `apart` one row for each slot of ids [T, A], [T * A, K].

    Args:
        x: float16 or bfloat16, K a multiple of 64.
        ids, experts: whose scale a slot takes, where act_scale is one for each expert.
        weights: [T, A], multiplied into the rows of the slots, and rounded; needs `apart`.
        act_scale: float64 multiplier, [] or [E]: rows are rounded to code * block_scale; [E] needs `apart`.
    """
    k = x.shape[-1]
    require(x.ndim == 2 and k % 64 == 0, "x", tuple(x.shape), "[rows, K], K a multiple of 64")
    require(act_scale is None or act_scale.dtype == torch.float64, "act_scale", act_scale, "float64")
    x = x if x.stride(-1) == 1 else x.contiguous()
    per_x = ids.shape[1] if apart and ids is not None else 1
    out = x.new_empty(len(x) * per_x, k)
    if out.numel() == 0:
        return out
    block = min(ENTRY_BLOCK, next_power_of_2(k))
    # Of few tokens every slot has a program; of many a program reads a row once for all of its slots.
    at_once = per_x if len(x) >= ENTRY_TOKENS else 1
    launch(
        entry_kernel,
        len(out) // at_once * cdiv(k, block),
        x,
        x.stride(0),
        None if ids is None else ids.contiguous(),
        None if weights is None else weights.contiguous(),
        None if act_scale is None else act_scale.contiguous(),
        out,
        per_x,
        len(out),
        k,
        experts,
        ROWS=at_once,
        PER_EXPERT=act_scale is not None and act_scale.ndim == 1,
        PERMUTE=permute,
        NATIVE=form_of(x) == "sm90",
        BLOCK=block,
        num_warps=2 if block <= 512 else 4,
        **dependent_launch(x),
    )
    return out
