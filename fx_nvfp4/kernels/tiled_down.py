# mypy: allow-untyped-defs
"""The down product of a routed block on tiled weights, and every product whose rows are in tiles; see tiled_up."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, wait_for_inputs
from .operands import require
from .sizes import cdiv
from .tile_config import TileConfig
from .tiled import prefetch, product, scaled
from .tiled_operands import Routing, Rows, TiledOperand, constants, stride
from .tiled_work import find_tile, find_work, first_chunks, is_for, row_scale, slots_of_tile, sum_factor


@triton.jit
def down_tile(
    table_ptr,
    first,
    count,
    out_ptr,
    x_ptr,
    words,
    scales,
    global_scale_ptr,
    bias_ptr,
    factor,
    output,
    N,
    K,
    stride_gn,
    stride_bn,
    TOKENS: tl.constexpr,
    ORDER: tl.constexpr,
    DIRECT: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    WAIT: tl.constexpr,
):
    """The tile's rows of out; pointers to scales and biases are the expert's own."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    REST: tl.constexpr = TOKENS // 3 if TOKENS % 3 == 0 else 0  # 96 tokens are 64 and 32 by the same weights
    slots, mask = slots_of_tile(table_ptr, first, count, 0, TOKENS - REST, DIRECT)
    x_ptrs = x_ptr + slots * K
    rest_slots, rest_ptrs, rest_mask = slots, None, mask
    if REST:
        rest_slots, rest_mask = slots_of_tile(table_ptr, first, count, TOKENS - REST, REST, DIRECT)
        rest_ptrs = x_ptr + rest_slots * K
    scale = row_scale(global_scale_ptr, stride_gn, output, N, factor)
    acc, rest = product(
        words, scales, x_ptrs, mask, rest_ptrs, rest_mask, K, ROWS, BLOCK_K, STAGES, MASKED, ORDER, WAIT, dtype, FORM
    )
    for part in tl.static_range(2 if REST else 1):
        y = scaled(acc if part == 0 else rest, scale, bias_ptr, stride_bn, output, N, dtype)
        places = slots if part == 0 else rest_slots
        there = mask if part == 0 else rest_mask
        ptrs = out_ptr + places[:, None] * N + output[None, :]
        tl.store(ptrs, tl.trans(y.to(dtype)), mask=there[:, None] & (output < N)[None, :])


@triton.jit(do_not_specialize=["tiles", "parts", "experts", "batch", "stride_ie"])
def tiled_down_kernel(
    table_ptr,
    out_ptr,
    x_ptr,
    words_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    in_scale_ptr,
    tiles,
    parts,
    experts,
    batch,
    N,
    K,
    stride_we,
    stride_ge,
    stride_gn,
    stride_be,
    stride_bn,
    stride_ie,
    ORDER: tl.constexpr,
    DIRECT: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    SIZES: tl.constexpr,
    BODIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[slot, :N] = row `slot` of x, in ORDER, by the slot's expert; without a table each has the next `batch`."""
    tile, part = find_work(tiles, parts, AT_ONCE)
    expert, count, first = find_tile(table_ptr, tile, batch, SIZES >> 8 * (BODIES - 1), DIRECT)
    if (count == 0) | (expert < 0) | (expert >= experts):
        wait_for_inputs(PDL)
        return
    own = part * (ROWS // 16) + tl.arange(0, ROWS // 16)
    own = tl.minimum(own, N // 16 - 1)  # past the last row, which is not stored, any row will do
    words, scales = first_chunks(words_ptr, scales_ptr, expert, own, stride_we, K)
    if PDL:
        if PREFETCHED:
            prefetch(words, PREFETCHED)
        wait_for_inputs(PDL)
    factor = sum_factor(in_scale_ptr, expert, stride_ie)
    global_scale_ptr += expert * stride_ge
    if bias_ptr is not None:
        bias_ptr += expert * stride_be
    output = part * ROWS + tl.arange(0, ROWS)
    for body in tl.static_range(BODIES):
        if is_for(count, SIZES, body):
            down_tile(
                table_ptr,
                first,
                count,
                out_ptr,
                x_ptr,
                words,
                scales,
                global_scale_ptr,
                bias_ptr,
                factor,
                output,
                N,
                K,
                stride_gn,
                stride_bn,
                SIZES >> 8 * body & 255,
                ORDER,
                DIRECT,
                FORM,
                ROWS,
                BLOCK_K,
                STAGES,
                MASKED,
                WAIT,
            )


def down(rows: Rows, weight: TiledOperand, routing: Routing, config: TileConfig, everyone: bool = True) -> Tensor:
    """Row s of x [slots, K] by the expert of slot s -> [slots, N].

    This reads the table before the kernel that was launched last has ended. Where that wrote the table, rows.last being
    False, the zeros of not `everyone` have to come between.

    Args:
        everyone: every slot has an expert, or what the others get does not matter; else they get zeros.
    """
    x = rows.x
    weight.check(x)
    ordered = rows.last or routing.table is None or routing.direct or not everyone
    require(ordered, "rows", "none entered, the table being last", "a kernel between the table's and this one")
    out = x.new_empty(routing.slots, weight.n) if everyone else x.new_zeros(routing.slots, weight.n)
    if out.numel() == 0:
        return out
    tiles, parts = routing.tiles(config.largest), cdiv(weight.n, config.rows)
    launch(
        tiled_down_kernel,
        tiles * parts,
        routing.table,
        out,
        x,
        *weight.pointers(),
        rows.scale,
        tiles,
        parts,
        len(weight.words),
        routing.batch,
        weight.n,
        weight.k,
        *weight.strides(),
        stride(rows.scale),
        **constants(rows, routing, config),
    )
    return out
