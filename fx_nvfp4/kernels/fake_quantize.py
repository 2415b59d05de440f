# mypy: allow-untyped-defs
"""Activations to NVFP4 and back, by the rule of Blackwell's hardware."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FAKE_QUANTIZE_BLOCKS
from .decode import e4m3_to_fp16, fp32_to_e4m3, round_to_e2m1
from .operands import FLOAT_DTYPES, require
from .sizes import cdiv


@triton.jit
def round_to_e4m3(x, NATIVE: tl.constexpr):
    """float32 to the nearest e4m3 number, ties to even, no larger than 448; by the GPU's own conversion if NATIVE."""
    rounded = x.to(tl.float8e4nv).to(tl.float32) if NATIVE else e4m3_to_fp16(fp32_to_e4m3(x)).to(tl.float32)
    return rounded


@triton.jit
def round_blocks(x, act_scale, inverse_act_scale, NATIVE: tl.constexpr = False):
    """float32 x [B, 16] with one activation scale per block [B], or one -> codes' values and block scales [B], float32.

    scale = e4m3(g * (amax / 6)), code = e2m1(x * (1 / (scale * (1 / g)))) with g = inverse_act_scale, each step rounded
    to float32; a block whose scale rounds to zero is zero, signs kept. NaN does not count in amax and becomes +6.
    """
    amax = tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=1)
    wanted = inverse_act_scale * (amax * 0.16666667163372040)  # float32(1/6)
    # Not positive, or NaN from 0 * inf, when the block or the whole tensor is zero.
    scale = round_to_e4m3(tl.where(wanted > 0.0, wanted, 0.0), NATIVE)
    # Triton's / is not correctly rounded on a GPU, and one ulp is enough to move a tie.
    step = tl.where(scale > 0.0, scale * act_scale, float("inf"))
    to_code = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    return round_to_e2m1(x * to_code[:, None]), scale


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    act_scale_ptr,
    inverse_act_scale_ptr,
    row_group_ptr,
    out_ptr,
    total_blocks,
    blocks_per_row,
    rows_per_group,
    groups,
    APPLY_SCALE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of 16 elements per program; x and out contiguous."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < total_blocks
    element = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + element, mask=mask[:, None], other=0.0).to(tl.float32)
    row = block // blocks_per_row
    if row_group_ptr is not None:
        group = tl.load(row_group_ptr + row, mask=mask, other=0).to(tl.int64)
    else:
        group = row // rows_per_group
    # Rows that belong to no group get the scale zero, and with it zeros.
    in_group = mask & (group >= 0) & (group < groups)
    act_scale = tl.load(act_scale_ptr + group, mask=in_group, other=0.0)
    inverse_act_scale = tl.load(inverse_act_scale_ptr + group, mask=in_group, other=0.0)
    codes, scale = round_blocks(x, act_scale, inverse_act_scale)
    if APPLY_SCALE:
        scale *= act_scale
    values = codes * scale[:, None]
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def _launch(x: Tensor, act_scale: Tensor, row_group: Tensor | None, apply_scale: bool) -> Tensor:
    require(x.dtype in FLOAT_DTYPES, "x", x.dtype, "bfloat16, float16 or float32")
    require(x.shape[-1] % 16 == 0, "x", tuple(x.shape), "a multiple of 16 in the last dimension")
    require(act_scale.dtype == torch.float64, "act_scale", act_scale.dtype, "float64")
    require(act_scale.device == x.device, "act_scale", act_scale.device, f"x's device {x.device}")
    require(act_scale.ndim <= 1, "act_scale", tuple(act_scale.shape), "one scale, [], or one per group, [E]")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    rows, groups = x.numel() // x.shape[-1], act_scale.numel()
    if row_group is not None:
        require(row_group.shape == x.shape[:-1], "row_group", tuple(row_group.shape), f"shape {tuple(x.shape[:-1])}")
        row_group = row_group.contiguous()
    elif groups > 1:
        require(x.shape[0] == groups, "x", tuple(x.shape), f"{groups} in the first dimension, one per act_scale")
    total_blocks = x.numel() // 16
    with torch.cuda.device_of(x):
        fake_quantize_kernel[(cdiv(total_blocks, FAKE_QUANTIZE_BLOCKS),)](
            x.contiguous(),
            # Both rounded from float64, so that neither is the rounded inverse of a rounded number.
            act_scale.to(torch.float32).contiguous(),
            act_scale.reciprocal().to(torch.float32).contiguous(),
            row_group,
            out,
            total_blocks,
            x.shape[-1] // 16,
            rows // groups,
            groups,
            APPLY_SCALE=apply_scale,
            BLOCKS=FAKE_QUANTIZE_BLOCKS,
        )
    return out


def fake_quantize(x: Tensor, act_scale: Tensor, row_group: Tensor | None = None) -> Tensor:
    """x [.., K] -> code * (block_scale * float32(act_scale)), each product in float32, then rounded to x's dtype.

    act_scale is the multiplier, float64: one for all of x, [], or one per group, [E]. row_group (integers, x's shape
    without K) names each row's group; without it the groups are the slices of x's first dimension. Rows whose group is
    outside [0, E) come out as 0.
    """
    return _launch(x, act_scale, row_group, apply_scale=True)


def fake_quantize_unscaled(x: Tensor, act_scale: Tensor, row_group: Tensor | None = None) -> Tensor:
    """As :func:`fake_quantize`, but code * block_scale alone, exact in x's dtype; act_scale then scales the sum."""
    return _launch(x, act_scale, row_group, apply_scale=False)
