# mypy: allow-untyped-defs
"""The tile that all matrix products share: x @ dequantised weight, and its store, as Triton device functions."""

import triton
import triton.language as tl

from .decode import dequantize_tile


@triton.jit
def product_tile(
    x_ptr,
    stride_xm,
    rows,
    row_mask,
    qdata_ptr,
    stride_qn,
    block_scale_ptr,
    stride_sn,
    cols,
    col_mask,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] = x[rows, :K] @ (code * block_scale)[cols, :K].T of one expert.

    rows and cols are int64; K is a multiple of 16 but not of BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)
    k_byte = tl.arange(0, BLOCK_K // 2)
    k_block = tl.arange(0, BLOCK_K // 16)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :]
    qdata_ptrs = qdata_ptr + cols[:, None] * stride_qn + k_byte[None, :]
    scale_ptrs = block_scale_ptr + cols[:, None] * stride_sn + k_block[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = K - start
        x = tl.load(x_ptrs, mask=row_mask[:, None] & (k[None, :] < left), other=0.0)
        packed = tl.load(qdata_ptrs, mask=col_mask[:, None] & (k_byte[None, :] < left // 2), other=0)
        scales = tl.load(scale_ptrs, mask=col_mask[:, None] & (k_block[None, :] < left // 16), other=0)
        w = dequantize_tile(packed, scales, x.dtype)
        # The decoded weight is the right operand, which wgmma takes from shared memory only. As the left operand it
        # would be read from registers, which Triton 3.6 gets wrong in some loops (see config.gemm_config).
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        qdata_ptrs += BLOCK_K // 2
        scale_ptrs += BLOCK_K // 16
    return acc


@triton.jit
def output_scale(global_scale_ptr, out_scale_ptr, cols, col_mask):
    """float32 factor of each output column: the weight's global scale, times the activation scale if there is one."""
    scale = tl.load(global_scale_ptr + cols, mask=col_mask, other=0.0)
    if out_scale_ptr is not None:
        scale *= tl.load(out_scale_ptr)
    return scale


@triton.jit
def store_tile(out_ptr, stride_om, rows, row_mask, cols, col_mask, values):
    """out[rows, cols] = values, rounded to out's dtype."""
    ptrs = out_ptr + rows[:, None] * stride_om + cols[None, :]
    tl.store(ptrs, values.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])
