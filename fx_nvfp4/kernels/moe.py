# mypy: allow-untyped-defs
"""A routed block in three launches: up product and activation, down product, weighted sum.

Rows of x are gathered as they are loaded, and every buffer between the launches is indexed by slot (token * top-k +
place), so nothing is permuted. Each slot is written once and the sum runs in a fixed order: no atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import compile_activation
from .config import COMBINE_COLUMNS, GemmConfig, gemm_config
from .grouped import find_tile, row_tiles
from .launch import dependent_launch, launch, wait_for_inputs
from .operands import Weight, check_input, check_out_scale, pack_weight, require
from .routing import load_expert
from .sizes import cdiv, next_power_of_2
from .tile import output_scale, product_tile, store_tile


@triton.jit
def slot_product(
    x_ptr,
    stride_xm,
    x_rows,
    row_mask,
    expert,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_ge,
    stride_gn,
    stride_ae,
    stride_be,
    stride_bn,
    cols,
    col_mask,
    K,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] of rows of x by one expert, rounded to dtype, and again with the bias."""
    acc = product_tile(
        x_ptr,
        stride_xm,
        x_rows,
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
    if out_scale_ptr is not None:
        out_scale_ptr += expert * stride_ae
    scale = output_scale(global_scale_ptr + expert * stride_ge, out_scale_ptr, cols * stride_gn, col_mask)
    y = (acc * scale[None, :]).to(dtype).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * stride_be + cols * stride_bn, mask=col_mask, other=0.0).to(tl.float32)
        y = (y + bias[None, :]).to(dtype).to(tl.float32)
    return y


@triton.jit
def up_kernel(
    order_ptr,
    offs_ptr,
    out_ptr,
    x_ptr,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    gate_qdata_ptr,
    gate_block_scale_ptr,
    gate_global_scale_ptr,
    gate_bias_ptr,
    S,
    N,
    K,
    E,
    tiles_m,
    slots_per_row,
    stride_xm,
    stride_qe,
    stride_qn,
    stride_se,
    stride_sn,
    stride_ge,
    stride_gn,
    stride_ae,
    stride_be,
    stride_bn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out[slot] = ACTIVATION(gate, up) of row slot // slots_per_row; one program per tile of slots of one expert.

    Gate and up take turns in the columns of the product's tile, so one loop computes both and a split parts them.
    """
    pid = tl.program_id(0)
    group, first, end = find_tile(offs_ptr, pid % tiles_m, S, E, BLOCK_M, GROUPS)
    if group >= E:
        return
    place = first + tl.arange(0, BLOCK_M)
    row_mask = place < end
    slots = tl.load(order_ptr + place, mask=row_mask, other=0).to(tl.int64)
    OUTPUTS: tl.constexpr = BLOCK_N if gate_qdata_ptr is None else BLOCK_N // 2
    start = (pid // tiles_m).to(tl.int64) * OUTPUTS
    column = tl.arange(0, BLOCK_N)
    cols = start + column * OUTPUTS // BLOCK_N
    if gate_qdata_ptr is not None:
        is_gate = column % 2 == 0
        qdata_ptr = tl.where(is_gate, gate_qdata_ptr, qdata_ptr)[:, None]
        block_scale_ptr = tl.where(is_gate, gate_block_scale_ptr, block_scale_ptr)[:, None]
        global_scale_ptr = tl.where(is_gate, gate_global_scale_ptr, global_scale_ptr)
        if bias_ptr is not None:
            bias_ptr = tl.where(is_gate, gate_bias_ptr, bias_ptr)
    y = slot_product(
        x_ptr,
        stride_xm,
        slots // slots_per_row,
        row_mask,
        group.to(tl.int64),
        qdata_ptr,
        block_scale_ptr,
        global_scale_ptr,
        out_scale_ptr,
        bias_ptr,
        stride_qe,
        stride_qn,
        stride_se,
        stride_sn,
        stride_ge,
        stride_gn,
        stride_ae,
        stride_be,
        stride_bn,
        cols,
        cols < N,
        K,
        out_ptr.dtype.element_ty,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if gate_qdata_ptr is not None:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, OUTPUTS, 2)))
        h = ACTIVATION(gate, up)
    else:
        h = ACTIVATION(y, y)
    outputs = start + tl.arange(0, OUTPUTS)
    store_tile(out_ptr, N, slots, row_mask, outputs, outputs < N, h)


@triton.jit
def down_kernel(
    order_ptr,
    offs_ptr,
    out_ptr,
    x_ptr,
    qdata_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_scale_ptr,
    bias_ptr,
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
    stride_gn,
    stride_ae,
    stride_be,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out[slot] = x[slot] by the slot's expert; one program per tile of slots of one expert."""
    pid = tl.program_id(0)
    group, first, end = find_tile(offs_ptr, pid % tiles_m, S, E, BLOCK_M, GROUPS)
    if group >= E:
        return
    place = first + tl.arange(0, BLOCK_M)
    row_mask = place < end
    slots = tl.load(order_ptr + place, mask=row_mask, other=0).to(tl.int64)
    cols = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < N
    y = slot_product(
        x_ptr,
        stride_xm,
        slots,
        row_mask,
        group.to(tl.int64),
        qdata_ptr,
        block_scale_ptr,
        global_scale_ptr,
        out_scale_ptr,
        bias_ptr,
        stride_qe,
        stride_qn,
        stride_se,
        stride_sn,
        stride_ge,
        stride_gn,
        stride_ae,
        stride_be,
        stride_bn,
        cols,
        col_mask,
        K,
        out_ptr.dtype.element_ty,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    store_tile(out_ptr, N, slots, row_mask, cols, col_mask, y)


@triton.jit(do_not_specialize=["S", "E"])
def combine_kernel(
    y_ptr, ids_ptr, weights_ptr, out_ptr, S, N, E, A: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """out[t] = sum of the slots of token t, times weights unless that is None; slots of nobody are not read."""
    wait_for_inputs(PDL)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    token = (pid // tiles_n).to(tl.int64)
    cols = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # One slot after the other in the text, so that all are read at once and no warp waits for another's part.
    for place in tl.static_range(A):
        slot = token * A + place
        inside = load_expert(ids_ptr, slot, S, E) < E
        y = tl.load(y_ptr + slot * N + cols, mask=cols < tl.where(inside, N, 0), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.where(inside, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
        total += y
    tl.store(out_ptr + token * N + cols, total.to(out_ptr.dtype.element_ty), mask=cols < N)


class Operand(NamedTuple):
    """One product: its input by rows, packed weight, factor of the sum and bias."""

    x: Tensor  # [rows, K]
    qdata: Tensor  # uint8 [E, N, K/2]
    block_scale: Tensor  # e4m3 or its bytes [E, N, K/16]
    global_scale: Tensor  # float32 [E, N]
    out_scale: Tensor | None  # float32 [] or [E]
    bias: Tensor | None  # [E, N]


def up(
    operand: Operand, gate: Operand | None, order: Tensor, offs: Tensor, slots_per_row: int, activation: str
) -> Tensor:
    """activation(gate, up) of every slot -> [S, N] in x's dtype; slots in no group are not written.

    order and offs as :func:`fx_nvfp4.kernels.routing.sort_slots` gives them; slot s reads row s // slots_per_row of x.
    activation is the source of a Triton function (see kernels/activation.py); without a gate it is given up twice. The
    gate shares x and out_scale with up, and must be like it in memory: see :func:`alike`.
    """
    weight, arguments, strides = _prepare(operand)
    others: list[Tensor | None] = [None] * 4
    if gate is not None:
        require(alike(operand, gate), "gate", "other strides, bias or input than those of up", "those of up")
        others = [*_prepare(gate)[0], gate.bias]
    out = operand.x.new_empty(order.shape[0], weight.n)
    _launch(
        up_kernel,
        (order, offs, out, *arguments, *others),
        (slots_per_row, *strides),
        out,
        weight,
        gemm_config(cdiv(order.shape[0], weight.experts), out.dtype, gated=gate is not None),
        columns=weight.n if gate is None else 2 * weight.n,
        ACTIVATION=compile_activation(activation),
    )
    return out


def alike(a: Operand, b: Operand) -> bool:
    """Whether one kernel can read both with the same input, strides and dtypes."""
    same_input = a.x is b.x and a.out_scale is b.out_scale
    return same_input and all(
        (s is None and t is None)
        or (s is not None and t is not None and (s.shape, s.stride(), s.dtype) == (t.shape, t.stride(), t.dtype))
        for s, t in zip((*a[1:4], a.bias), (*b[1:4], b.bias), strict=True)
    )


def down(operand: Operand, order: Tensor, offs: Tensor) -> Tensor:
    """Row s of x by the expert of slot s -> [S, N] in x's dtype; slots in no group are not written."""
    weight, arguments, strides = _prepare(operand)
    out = operand.x.new_empty(order.shape[0], weight.n)
    config = gemm_config(cdiv(order.shape[0], weight.experts), out.dtype)
    _launch(down_kernel, (order, offs, out, *arguments), strides, out, weight, config, columns=weight.n)
    return out


def combine(y: Tensor, ids: Tensor, weights: Tensor | None, experts: int, dtype: torch.dtype | None = None) -> Tensor:
    """y [T * A, H], ids and weights [T, A] -> [T, H]: sums in float32 over the slots whose id is in [0, experts).

    Rounded to `dtype`, by default y's.
    """
    tokens, top = ids.shape
    out = y.new_empty(tokens, y.shape[1], dtype=dtype)
    if out.numel() == 0:
        return out
    block_n = min(next_power_of_2(y.shape[1]), COMBINE_COLUMNS)
    launch(
        combine_kernel,
        tokens * cdiv(y.shape[1], block_n),
        y,
        ids.contiguous(),
        None if weights is None else weights.contiguous(),
        out,
        ids.numel(),
        y.shape[1],
        experts,
        A=top,
        BLOCK_N=block_n,
        **dependent_launch(y),
    )
    return out


def _prepare(operand: Operand) -> tuple[Weight, list[Any], list[int]]:
    """(weight, pointer arguments, strides) of one product, checked."""
    weight = pack_weight(*operand[1:4], strided_scale=True)
    x = check_input(operand.x, weight, ndim=2)
    out_scale, stride_ae = check_out_scale(operand.out_scale, weight)
    bias, stride_be, stride_bn = operand.bias, 0, 0
    if bias is not None:
        shape = (weight.experts, weight.n)
        require(bias.shape == shape, "bias", tuple(bias.shape), f"shape {shape}")
        require(bias.device == x.device, "bias", bias.device, f"x's device {x.device}")
        stride_be, stride_bn = bias.stride()
    strides = [x.stride(0), *weight.strides(), weight.global_scale.stride(1), stride_ae, stride_be, stride_bn]
    return weight, [x, *weight, out_scale, bias], strides


def _launch(
    kernel: Any,
    pointers: Any,
    rest: Any,
    out: Tensor,
    weight: Weight,
    config: GemmConfig,
    columns: int,
    **constants: Any,
) -> None:
    """One program for each tile of slots and of the product's columns."""
    slots = out.shape[0]
    if out.numel() == 0:
        return
    tiles_m = row_tiles(slots, weight.experts, config.block_m)
    with torch.cuda.device_of(out):
        kernel[(tiles_m * cdiv(columns, config.block_n),)](
            *pointers,
            slots,
            weight.n,
            weight.k,
            weight.experts,
            tiles_m,
            *rest,
            GROUPS=next_power_of_2(weight.experts + 1),
            **constants,
            **config.meta(),
        )
