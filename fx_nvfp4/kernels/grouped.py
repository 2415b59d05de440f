# mypy: allow-untyped-defs
"""y[r] = x[r] @ weight[e].T for rows sorted by expert, with the group borders on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import gemm_config
from .operands import check_input, check_out_scale, pack_weight, require
from .sizes import cdiv, next_power_of_2
from .tile import output_scale, product_tile, store_tile


@triton.jit
def find_tile(offs_ptr, tile, S, E, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Which group the tile-th row tile belongs to, its first row, and the group's end.

    Rows past the last group form group E. Tiles past the last row get a group above E, and no rows. GROUPS is a power
    of two above E. Borders are clamped to [0, S], so that wrong ones cannot lead outside the tensors.
    """
    group = tl.arange(0, GROUPS)
    end = tl.load(offs_ptr + group, mask=group < E, other=S).to(tl.int32)
    start = tl.load(offs_ptr + group - 1, mask=(group > 0) & (group <= E), other=0).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), S)
    start = tl.minimum(tl.maximum(tl.where(group > E, S, start), 0), S)
    tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)
    tiles_until = tl.cumsum(tiles, 0)
    found = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    chosen = group == found
    tile_in_group = tile - tl.sum(tl.where(chosen, tiles_until - tiles, 0), 0)
    first_row = tl.sum(tl.where(chosen, start, 0), 0) + tile_in_group * BLOCK_M
    return found, first_row, tl.sum(tl.where(chosen, end, 0), 0)


@triton.jit
def grouped_kernel(
    x_ptr,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    offs_ptr,
    out_ptr,
    S,
    N,
    K,
    E,
    tiles_m,
    stride_xm,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_ge,
    stride_ae,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program per tile; tiles_m bounds the number of row tiles, and the superfluous ones return at once."""
    pid = tl.program_id(0)
    group, first_row, end_row = find_tile(offs_ptr, pid % tiles_m, S, E, BLOCK_M, GROUPS)
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < end_row
    col_mask = cols < N
    if group >= E:
        nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        store_tile(out_ptr, stride_om, rows, row_mask, cols, col_mask, nothing)
        return
    expert = group.to(tl.int64)
    if out_scale_ptr is not None:
        out_scale_ptr += expert * stride_ae
    acc = product_tile(
        x_ptr,
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
    store_tile(out_ptr, stride_om, rows, row_mask, cols, col_mask, acc)


def grouped(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Rows offs[e-1] to offs[e] of x [S, K] by expert e -> [S, N]; rows past offs[-1] come out as 0.

    qdata uint8 [E, N, K/2], block_scale e4m3 [E, N, K/16], global_scale float32 [E, N], offs int32 or int64 [E], not
    decreasing. Sums and scales as in :func:`fx_nvfp4.kernels.batched.batched`. The host never waits for the device, so
    the call can be captured in a CUDA graph.
    """
    weight = pack_weight(qdata, block_scale, global_scale)
    x = check_input(x, weight, ndim=2)
    require(offs.shape == (weight.experts,), "offs", tuple(offs.shape), f"shape [{weight.experts}], one end per expert")
    require(offs.dtype in (torch.int32, torch.int64), "offs", offs.dtype, "int32 or int64")
    require(offs.device == x.device, "offs", offs.device, f"x's device {x.device}")
    out_scale, stride_ae = check_out_scale(out_scale, weight)
    s = x.shape[0]
    out = x.new_empty(s, weight.n)
    if out.numel() == 0:
        return out
    config = gemm_config(cdiv(s, weight.experts), x.dtype)
    tiles_m = row_tiles(s, weight.experts, config.block_m)
    with torch.cuda.device_of(x):
        grouped_kernel[(tiles_m * cdiv(weight.n, config.block_n),)](
            x,
            *weight,
            out_scale,
            offs.contiguous(),
            out,
            s,
            weight.n,
            weight.k,
            weight.experts,
            tiles_m,
            x.stride(0),
            *weight.strides(),
            stride_ae,
            out.stride(0),
            GROUPS=next_power_of_2(weight.experts + 1),
            **config.meta(),
        )
    return out


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """How many tiles rows need at most, however they are grouped; see :func:`find_tile`.

    Each non-empty group, the rows of nobody among them, wastes less than one tile.
    """
    groups = min(experts + 1, rows)
    return (rows + groups * (block_m - 1)) // block_m


def row_groups(offs: Tensor, rows: int) -> Tensor:
    """The group of each of `rows` rows, int64 [rows], as fake_quantize takes it; E for rows past offs[-1]."""
    return torch.searchsorted(offs, torch.arange(rows, dtype=offs.dtype, device=offs.device), right=True)
