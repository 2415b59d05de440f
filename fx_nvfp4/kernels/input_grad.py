# mypy: allow-untyped-defs
"""dx[r] = (grad[r] * global_scale[e]) @ (code * block_scale)[e]: a product over the weight's rows, for gradients.

The global scale belongs to the rows that are summed over, so it cannot multiply the sum. A first kernel multiplies it
into the gradient in float32 and splits the result into bfloat16 parts, two for 16-bit gradients and three for float32;
the second multiplies each part with the exact weight in matrix units and sums all of it in float32. Two parts keep 16
bits of the 24, an error of 2**-17 a term, which rounding the sum to 16 bits hides; three keep all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import gradient_config
from .decode import dequantize_tile
from .grouped import find_tile, row_groups, row_tiles
from .operands import FLOAT_DTYPES, Weight, pack_weight, require
from .sizes import cdiv, next_power_of_2
from .tile import store_tile

SPLIT_BLOCK = 1024  # elements of a gradient row that one program scales and splits


@triton.jit
def split_grad_kernel(
    x_ptr,
    global_scale_ptr,
    row_group_ptr,
    order_ptr,
    parts_ptr,
    N,
    E,
    stride_xm,
    stride_ge,
    stride_xp,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts[r] = gradient row order[r] times the global scales of its group; rows of nobody stay unwritten.

    A part has stride_xp columns, N of them used and the others zero.
    """
    blocks = tl.cdiv(stride_xp, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    cols = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(row_group_ptr + row)
    if (group < 0) | (group >= E):
        return
    mask = cols < N
    source = row
    if order_ptr is not None:
        source = tl.load(order_ptr + row)
    rest = tl.load(x_ptr + source * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    rest *= tl.load(global_scale_ptr + group * stride_ge + cols, mask=mask, other=0.0)
    parts_ptrs = parts_ptr + row * PARTS * stride_xp + cols
    for _ in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        tl.store(parts_ptrs, part, mask=cols < stride_xp)
        rest -= part.to(tl.float32)
        parts_ptrs += stride_xp


@triton.jit
def input_grad_kernel(
    parts_ptr,
    qdata_ptr,
    block_scale_ptr,
    offs_ptr,
    order_ptr,
    out_ptr,
    S,
    N,
    K,
    E,
    tiles_m,
    stride_xp,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_om,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program per tile of BLOCK_M rows and BLOCK_K columns of dx; steps of BLOCK_N over the weight's rows."""
    pid = tl.program_id(0)
    group, first_row, end_row = find_tile(offs_ptr, pid % tiles_m, S, E, BLOCK_M, GROUPS)
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = rows < end_row
    first_col = (pid // tiles_m).to(tl.int64) * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    out_rows = rows
    if order_ptr is not None:
        out_rows = tl.load(order_ptr + rows, mask=row_mask, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    if group >= E:
        store_tile(out_ptr, stride_om, out_rows, row_mask, cols, cols < K, acc)
        return
    expert = group.to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    k_byte = first_col // 2 + tl.arange(0, BLOCK_K // 2)
    k_block = first_col // 16 + tl.arange(0, BLOCK_K // 16)
    parts_ptrs = parts_ptr + rows[:, None] * PARTS * stride_xp + n[None, :]
    qdata_ptrs = qdata_ptr + expert * stride_qe + n.to(tl.int64)[:, None] * stride_qn + k_byte[None, :]
    scale_ptrs = block_scale_ptr + expert * stride_se + n.to(tl.int64)[:, None] * stride_sn + k_block[None, :]
    for start in range(0, N, BLOCK_N):
        n_mask = n < N - start
        packed = tl.load(qdata_ptrs, mask=n_mask[:, None] & (k_byte[None, :] < K // 2), other=0)
        scales = tl.load(scale_ptrs, mask=n_mask[:, None] & (k_block[None, :] < K // 16), other=0)
        w = dequantize_tile(packed, scales, tl.bfloat16)
        for p in tl.static_range(PARTS):
            # The smallest part first, as it loses least to the rounding of a small sum.
            part_ptrs = parts_ptrs + (PARTS - 1 - p) * stride_xp
            part = tl.load(part_ptrs, mask=row_mask[:, None] & (n[None, :] < stride_xp - start), other=0.0)
            acc = tl.dot(part, w, acc)
        parts_ptrs += BLOCK_N
        qdata_ptrs += BLOCK_N * stride_qn
        scale_ptrs += BLOCK_N * stride_sn
    store_tile(out_ptr, stride_om, out_rows, row_mask, cols, cols < K, acc)


def grouped(grad: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, offs: Tensor) -> Tensor:
    """Rows offs[e-1] to offs[e] of grad [S, N] by expert e -> [S, K]; rows past offs[-1] come out as 0.

    qdata uint8 [E, N, K/2], block_scale e4m3 [E, N, K/16], global_scale float32 [E, N], offs int32 or int64 [E], not
    decreasing. The result has grad's dtype, rounded once from the float32 sum; gradients that are not finite give NaN.
    The host never waits for the device, so the call can be captured in a CUDA graph.
    """
    weight = pack_weight(qdata, block_scale, global_scale)
    require(offs.shape == (weight.experts,), "offs", tuple(offs.shape), f"shape [{weight.experts}], one end per expert")
    return _launch(grad, weight, offs.contiguous(), row_groups(offs, grad.shape[0]), None)


def indexed(grad: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, ids: Tensor) -> Tensor:
    """Row s of grad [S, N] by expert ids[s] -> [S, K]; ids outside 0..E-1 give zeros. Else as :func:`grouped`.

    Rows are sorted by expert on the device: gradients come by the batch, and rows of one expert share its decoding.
    """
    weight = pack_weight(qdata, block_scale, global_scale)
    require(ids.shape == grad.shape[:1], "ids", tuple(ids.shape), f"shape {list(grad.shape[:1])}, one per row")
    known = torch.where((ids < 0) | (ids >= weight.experts), weight.experts, ids.long())
    group, order = known.sort()
    experts = torch.arange(weight.experts, device=ids.device)
    return _launch(grad, weight, torch.searchsorted(group, experts, right=True), group, order)


def batched(grad: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """grad [E, M, N] by the expert of each batch -> [E, M, K]. Else as :func:`grouped`."""
    weight = pack_weight(qdata, block_scale, global_scale)
    require(grad.shape[0] == weight.experts, "grad", tuple(grad.shape), f"[{weight.experts}, M, N]")
    experts, m, n = grad.shape
    rows = torch.arange(experts * m, device=grad.device)
    offs = torch.arange(m, experts * m + 1, m, device=grad.device) if m else rows.new_zeros(experts)
    return _launch(grad.reshape(-1, n), weight, offs, rows // max(m, 1), None).view(experts, m, weight.k)


def linear(grad: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """grad [.., N] by one weight [N, K] -> [.., K]. Else as :func:`grouped`."""
    require(qdata.ndim == 2, "qdata", tuple(qdata.shape), "2 dimensions, [N, K/2]")
    rows = grad.reshape(1, -1, grad.shape[-1])
    return batched(rows, qdata[None], block_scale[None], global_scale[None]).view(*grad.shape[:-1], 2 * qdata.shape[1])


def _launch(grad: Tensor, weight: Weight, offs: Tensor, group: Tensor, order: Tensor | None) -> Tensor:
    """Rows of grad [S, N], in the order given, in groups that end at offs."""
    require(grad.dtype in FLOAT_DTYPES, "grad", grad.dtype, "bfloat16, float16 or float32")
    require(grad.ndim == 2 and grad.shape[1] == weight.n, "grad", tuple(grad.shape), f"[S, N] with N = {weight.n}")
    require(grad.device == weight.qdata.device, "grad", grad.device, f"the weight's device {weight.qdata.device}")
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    s = grad.shape[0]
    out = grad.new_empty(s, weight.k)
    if out.numel() == 0:
        return out
    count = 3 if grad.dtype == torch.float32 else 2
    # Columns in multiples of 16, so that the parts are loaded 16 bytes at a time whatever N is.
    parts = grad.new_empty(s, count, 16 * cdiv(weight.n, 16), dtype=torch.bfloat16)
    config = gradient_config(cdiv(s, weight.experts))
    tiles_m = row_tiles(s, weight.experts, config.block_m)
    stride_qe, stride_qn, stride_se, stride_sn, stride_ge = weight.strides()
    with torch.cuda.device_of(grad):
        split_grad_kernel[(s * cdiv(parts.shape[2], SPLIT_BLOCK),)](
            grad,
            weight.global_scale,
            group,
            order,
            parts,
            weight.n,
            weight.experts,
            grad.stride(0),
            stride_ge,
            parts.stride(1),
            PARTS=count,
            BLOCK=SPLIT_BLOCK,
        )
        input_grad_kernel[(tiles_m * cdiv(weight.k, config.block_k),)](
            parts,
            weight.qdata,
            weight.block_scale,
            offs,
            order,
            out,
            s,
            weight.n,
            weight.k,
            weight.experts,
            tiles_m,
            parts.stride(1),
            stride_qe,
            stride_qn,
            stride_se,
            stride_sn,
            out.stride(0),
            PARTS=count,
            GROUPS=next_power_of_2(weight.experts + 1),
            **config.meta(),
        )
    return out
