# mypy: allow-untyped-defs
"""y[s] = x[s] @ weight[ids[s]].T: a few rows, each with an expert of its own, in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import INDEXED
from .decode import dequantize_tile
from .operands import check_input, check_out_scale, pack_weight, require
from .sizes import cdiv
from .tile import output_scale


@triton.jit
def indexed_kernel(
    x_ptr,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    ids_ptr,
    out_ptr,
    N,
    K,
    E,
    stride_xm,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_ge,
    stride_ae,
    stride_om,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row and BLOCK_N outputs; float32 arithmetic, as one row cannot fill a matrix unit."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // tiles_n).to(tl.int64)
    cols = (pid % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < N
    out_ptrs = out_ptr + row * stride_om + cols
    expert = tl.load(ids_ptr + row).to(tl.int64)
    # Expert parallelism marks rows of experts that live elsewhere with an id out of range.
    if (expert < 0) | (expert >= E):
        nothing = tl.zeros((BLOCK_N,), dtype=tl.float32)
        tl.store(out_ptrs, nothing.to(out_ptr.dtype.element_ty), mask=col_mask)
        return
    k = tl.arange(0, BLOCK_K)
    k_byte = tl.arange(0, BLOCK_K // 2)
    k_block = tl.arange(0, BLOCK_K // 16)
    x_ptrs = x_ptr + row * stride_xm + k
    qdata_ptrs = qdata_ptr + expert * stride_qe + cols[:, None] * stride_qn + k_byte[None, :]
    scale_ptrs = block_scale_ptr + expert * stride_se + cols[:, None] * stride_sn + k_block[None, :]
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = K - start
        x = tl.load(x_ptrs, mask=k < left, other=0.0).to(tl.float32)
        packed = tl.load(qdata_ptrs, mask=col_mask[:, None] & (k_byte[None, :] < left // 2), other=0)
        scales = tl.load(scale_ptrs, mask=col_mask[:, None] & (k_block[None, :] < left // 16), other=0)
        acc += tl.sum(dequantize_tile(packed, scales, tl.float32) * x[None, :], axis=1)
        x_ptrs += BLOCK_K
        qdata_ptrs += BLOCK_K // 2
        scale_ptrs += BLOCK_K // 16
    if out_scale_ptr is not None:
        out_scale_ptr += expert * stride_ae
    acc *= output_scale(global_scale_ptr + expert * stride_ge, out_scale_ptr, cols, col_mask)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=col_mask)


def indexed(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    ids: Tensor,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Row s of x [S, K] by expert ids[s] -> [S, N]; rows whose id is outside [0, E) come out as 0.

    qdata uint8 [E, N, K/2], block_scale e4m3 [E, N, K/16], global_scale float32 [E, N], ids int32 or int64 [S].
    Sums and scales as in :func:`fx_nvfp4.kernels.batched.batched`. Each row reads its expert's weights anew: meant for
    few rows.
    """
    weight = pack_weight(qdata, block_scale, global_scale)
    x = check_input(x, weight, ndim=2)
    s = x.shape[0]
    require(ids.shape == (s,), "ids", tuple(ids.shape), f"shape [{s}], one expert per row of x")
    require(ids.dtype in (torch.int32, torch.int64), "ids", ids.dtype, "int32 or int64")
    require(ids.device == x.device, "ids", ids.device, f"x's device {x.device}")
    out_scale, stride_ae = check_out_scale(out_scale, weight)
    out = x.new_empty(s, weight.n)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        indexed_kernel[(s * cdiv(weight.n, INDEXED.block_n),)](
            x,
            *weight,
            out_scale,
            ids.contiguous(),
            out,
            weight.n,
            weight.k,
            weight.experts,
            x.stride(0),
            *weight.strides(),
            stride_ae,
            out.stride(0),
            **INDEXED.meta(),
        )
    return out
