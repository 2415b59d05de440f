# mypy: allow-untyped-defs
"""y[e] = x[e] @ weight[e].T for every expert, and the single linear layer as the case of one expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import gemm_config
from .operands import check_input, check_out_scale, pack_weight, require
from .sizes import cdiv
from .tile import output_scale, product_tile, store_tile


@triton.jit
def batched_kernel(
    x_ptr,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xe,
    stride_xm,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_ge,
    stride_ae,
    stride_oe,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of one expert; tiles that share weights are neighbours."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    rows = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    col_mask = cols < N
    if out_scale_ptr is not None:
        out_scale_ptr += expert * stride_ae
    acc = product_tile(
        x_ptr + expert * stride_xe,
        stride_xm,
        rows,
        row_mask,
        qdata_ptr + expert * stride_qe,
        stride_qn,
        block_scale_ptr + expert * stride_se,
        stride_sn,
        cols,
        col_mask,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    acc *= output_scale(global_scale_ptr + expert * stride_ge, out_scale_ptr, cols, col_mask)[None, :]
    store_tile(out_ptr + expert * stride_oe, stride_om, rows, row_mask, cols, col_mask, acc)


def batched(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, out_scale: Tensor | None = None
) -> Tensor:
    """x [E, M, K], qdata uint8 [E, N, K/2], block_scale e4m3 [E, N, K/16], global_scale float32 [E, N] -> [E, M, N].

    Products are summed in float32; global_scale and out_scale (float32 [] or [E]) multiply the sum once, and the result
    is rounded to x's dtype. Raises ValueError for tensors that do not fit together.
    """
    weight = pack_weight(qdata, block_scale, global_scale)
    x = check_input(x, weight, ndim=3)
    require(x.shape[0] == weight.experts, "x", tuple(x.shape), f"{weight.experts} experts in the first dimension")
    out_scale, stride_ae = check_out_scale(out_scale, weight)
    m = x.shape[1]
    out = x.new_empty(weight.experts, m, weight.n)
    if out.numel() == 0:
        return out
    config = gemm_config(m, x.dtype)
    tiles = cdiv(m, config.block_m) * cdiv(weight.n, config.block_n)
    with torch.cuda.device_of(x):
        batched_kernel[(weight.experts * tiles,)](
            x,
            *weight,
            out_scale,
            out,
            m,
            weight.n,
            weight.k,
            *x.stride()[:2],
            *weight.strides(),
            stride_ae,
            *out.stride()[:2],
            **config.meta(),
        )
    return out


def linear(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, out_scale: Tensor | None = None
) -> Tensor:
    """x [.., K], qdata uint8 [N, K/2], block_scale e4m3 [N, K/16], global_scale float32 [N] -> [.., N].

    out_scale is float32 []; everything else as in :func:`batched`.
    """
    require(qdata.ndim == 2, "qdata", tuple(qdata.shape), "2 dimensions, [N, K/2]")
    out = batched(x.reshape(1, -1, x.shape[-1]), qdata[None], block_scale[None], global_scale[None], out_scale)
    return out.view(*x.shape[:-1], qdata.shape[0])
