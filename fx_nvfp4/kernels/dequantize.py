# mypy: allow-untyped-defs
"""Packed weights back to floating point, for whoever wants to see them or has no matrix product to feed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import DEQUANTIZE
from .decode import e4m3_to_fp16, scale_blocks, unpack_codes
from .operands import FLOAT_DTYPES, require
from .sizes import cdiv


@triton.jit
def dequantize_kernel(
    qdata_ptr, block_scale_ptr, global_scale_ptr, out_ptr, rows, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program per BLOCK_N rows and BLOCK_K columns of the output; all tensors contiguous."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    row = (pid // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    start = (pid % tiles_k) * BLOCK_K
    row_mask = row < rows
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    block = start // 16 + tl.arange(0, BLOCK_K // 16)[None, :]
    k = start + tl.arange(0, BLOCK_K)[None, :]
    packed = tl.load(qdata_ptr + row * (K // 2) + byte, mask=row_mask & (byte < K // 2), other=0)
    scales = tl.load(block_scale_ptr + row * (K // 16) + block, mask=row_mask & (block < K // 16), other=0)
    scales = e4m3_to_fp16(scales).to(tl.float32)
    if global_scale_ptr is not None:
        scales *= tl.load(global_scale_ptr + row, mask=row_mask, other=0.0)
    values = scale_blocks(unpack_codes(packed).to(tl.float32), scales)
    tl.store(out_ptr + row * K + k, values.to(out_ptr.dtype.element_ty), mask=row_mask & (k < K))


def dequantize(qdata: Tensor, block_scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """qdata uint8 [.., N, K/2], block_scale e4m3 [.., N, K/16], global_scale float32 [.., N] or None -> [.., N, K].

    value = code * (block_scale * global_scale), each product in float32, then rounded to dtype: the order in which
    vLLM, ModelOpt and torchao multiply. Without global_scale the value is exact in every dtype.
    """
    *rows, half_k = qdata.shape
    require(qdata.dtype == torch.uint8, "qdata", qdata.dtype, "uint8, two codes to a byte")
    require(half_k % 8 == 0, "qdata", tuple(qdata.shape), "K/2 a multiple of 8 (K a multiple of 16)")
    scale_shape = (*rows, half_k // 8)
    require(block_scale.shape == scale_shape, "block_scale", tuple(block_scale.shape), f"shape {scale_shape}")
    require(dtype in FLOAT_DTYPES, "dtype", dtype, "bfloat16, float16 or float32")
    if global_scale is not None:
        require(global_scale.shape == tuple(rows), "global_scale", tuple(global_scale.shape), f"shape {tuple(rows)}")
        require(global_scale.dtype == torch.float32, "global_scale", global_scale.dtype, "float32")
        global_scale = global_scale.contiguous()
    out = torch.empty(*rows, half_k * 2, dtype=dtype, device=qdata.device)
    if out.numel() == 0:
        return out
    count = out.numel() // out.shape[-1]
    grid = (cdiv(count, DEQUANTIZE.block_n) * cdiv(half_k * 2, DEQUANTIZE.block_k),)
    with torch.cuda.device_of(qdata):
        dequantize_kernel[grid](
            qdata.contiguous(),
            block_scale.view(torch.uint8).contiguous(),
            global_scale,
            out,
            count,
            half_k * 2,
            **DEQUANTIZE.meta(),
        )
    return out
