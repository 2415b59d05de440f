# mypy: allow-untyped-defs
"""The up product of a routed block on tiled weights, with the activation; tiles of tokens as tile_table cuts them.

One program computes one tile of tokens by ROWS rows of the weight, gate rows and their up rows together. The loop is
compiled for several numbers of tokens, and each tile takes the smallest that holds it.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import compile_activation
from .entry import permuted
from .launch import launch, wait_for_inputs
from .operands import require
from .sizes import cdiv
from .tile_config import TileConfig
from .tiled import leave, prefetch, product, scaled
from .tiled_operands import Routing, Rows, TiledOperand, constants, stride
from .tiled_work import distance, find_tile, find_work, first_chunks, is_for, row_scale, slots_of_tile, sum_factor


@triton.jit
def up_tile(
    table_ptr,
    first,
    count,
    out_ptr,
    x_ptr,
    words,
    scales,
    gate_global_scale_ptr,
    gate_bias_ptr,
    global_scale_ptr,
    bias_ptr,
    factor,
    h_scale_ptr,
    output,
    slots_per_row,
    N,
    K,
    stride_gn,
    stride_bn,
    TOKENS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PERMUTE_H: tl.constexpr,
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
    x_ptrs = x_ptr + slots // slots_per_row * K
    rest_slots, rest_ptrs, rest_mask = slots, None, mask
    if REST:
        rest_slots, rest_mask = slots_of_tile(table_ptr, first, count, TOKENS - REST, REST, DIRECT)
        rest_ptrs = x_ptr + rest_slots // slots_per_row * K
    # Read ahead of the product, as nothing else would hide how long it takes.
    scale = row_scale(global_scale_ptr, stride_gn, output, N, factor)
    if GATED:
        gate_scale = row_scale(gate_global_scale_ptr, stride_gn, output, N, factor)
    acc, rest = product(
        words, scales, x_ptrs, mask, rest_ptrs, rest_mask, K, ROWS, BLOCK_K, STAGES, MASKED, ORDER, WAIT, dtype, FORM
    )
    for part in tl.static_range(2 if REST else 1):
        sums = acc if part == 0 else rest
        up = sums
        if GATED:
            if INTERLEAVED:
                gate, up = tl.split(tl.permute(tl.reshape(sums, (ROWS // 2, 2, sums.shape[1])), (0, 2, 1)))
            else:
                # A thread holds rows of both halves of the tile, so that this parts registers.
                gate, up = tl.split(tl.permute(tl.reshape(sums, (2, ROWS // 2, sums.shape[1])), (1, 2, 0)))
        up = scaled(up, scale, bias_ptr, stride_bn, output, N, dtype)
        if GATED:
            gate = scaled(gate, gate_scale, gate_bias_ptr, stride_bn, output, N, dtype)
            rows = leave(ACTIVATION(gate, up), h_scale_ptr, PERMUTE_H, FORM == "sm90", dtype)
        else:
            rows = leave(ACTIVATION(up, up), h_scale_ptr, PERMUTE_H, FORM == "sm90", dtype)
        column = permuted(output) if PERMUTE_H and output.shape[0] % 64 != 0 else output
        places = slots if part == 0 else rest_slots
        there = mask if part == 0 else rest_mask
        tl.store(out_ptr + places[:, None] * N + column[None, :], rows, mask=there[:, None] & (output < N)[None, :])


# Numbers that change from call to call must not lead to new compilations.
@triton.jit(do_not_specialize=["tiles", "parts", "slots_per_row", "experts", "stride_ie", "stride_he"])
def tiled_up_kernel(
    table_ptr,
    out_ptr,
    x_ptr,
    gate_words_ptr,
    gate_scales_ptr,
    gate_global_scale_ptr,
    gate_bias_ptr,
    words_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    in_scale_ptr,
    h_scale_ptr,
    tiles,
    parts,
    slots_per_row,
    experts,
    N,
    K,
    stride_we,
    stride_ge,
    stride_gn,
    stride_be,
    stride_bn,
    stride_ie,
    stride_he,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PERMUTE_H: tl.constexpr,
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
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[slot, :N] = ACTIVATION(gate, up) of x's row slot // slots_per_row.

    in_scale is the float64 activation scale of x by expert, h_scale that with which h is rounded, or None. Gate rows
    are the first half of a tile's, or in turn with up's where the weight holds them so (INTERLEAVED, then
    gate_words is not read). DIRECT: every slot is a tile of its own, and table holds ids. EARLY: the table is older
    than the kernel that was launched last, and is read before that has ended.
    """
    if not EARLY:
        wait_for_inputs(PDL)
    tile, part = find_work(tiles, parts, AT_ONCE)
    expert, count, first = find_tile(table_ptr, tile, 0, SIZES >> 8 * (BODIES - 1), DIRECT)
    if (count == 0) | (expert < 0) | (expert >= experts):
        if EARLY:
            wait_for_inputs(PDL)
        return
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    R: tl.constexpr = ROWS // 16
    row_tile = tl.arange(0, R)
    own = part * R + row_tile
    weight_tiles = N // 8 if INTERLEAVED else N // 16
    if HALVES:
        own = part * (R // 2) + row_tile % (R // 2)
    own = tl.minimum(own, weight_tiles - 1)  # past the last row, which is not stored, any row will do
    words, scales = first_chunks(words_ptr, scales_ptr, expert, own, stride_we, K)
    if HALVES:
        words += distance(gate_words_ptr, words_ptr, 4) * (row_tile < R // 2)
        scales += distance(gate_scales_ptr, scales_ptr, 2) * (row_tile < R // 2)
    if PDL and EARLY:
        if PREFETCHED:
            prefetch(words, PREFETCHED)
        wait_for_inputs(PDL)
    factor = sum_factor(in_scale_ptr, expert, stride_ie)
    if h_scale_ptr is not None:
        h_scale_ptr += expert * stride_he
    global_scale_ptr += expert * stride_ge
    if GATED:
        gate_global_scale_ptr += expert * stride_ge
    if bias_ptr is not None:
        bias_ptr += expert * stride_be
        if GATED:
            gate_bias_ptr += expert * stride_be
    OUTPUTS: tl.constexpr = ROWS // 2 if GATED else ROWS
    output = part * OUTPUTS + tl.arange(0, OUTPUTS)
    for body in tl.static_range(BODIES):
        if is_for(count, SIZES, body):
            up_tile(
                table_ptr,
                first,
                count,
                out_ptr,
                x_ptr,
                words,
                scales,
                gate_global_scale_ptr,
                gate_bias_ptr,
                global_scale_ptr,
                bias_ptr,
                factor,
                h_scale_ptr,
                output,
                slots_per_row,
                N,
                K,
                stride_gn,
                stride_bn,
                SIZES >> 8 * body & 255,
                ACTIVATION,
                GATED,
                INTERLEAVED,
                PERMUTE_H,
                ORDER,
                DIRECT,
                FORM,
                ROWS,
                BLOCK_K,
                STAGES,
                MASKED,
                WAIT,
            )


def up(
    rows: Rows,
    gate: TiledOperand | None,
    weight: TiledOperand,
    interleaved: bool,
    routing: Routing,
    slots_per_row: int,
    activation: str,
    h_scale: Tensor | None,
    permuted: bool,
    config: TileConfig,
    everyone: bool = True,
) -> Tensor:
    """activation(gate, up) of every slot -> [slots, N] in x's dtype.

    Where rows.last, the table must have been written before the kernel that was launched last, as this one reads it
    before that has ended.

    Args:
        rows: slot s reads row s // slots_per_row.
        routing: has a table.
        gate: None where there is none; with the words of `weight` where rows of gate and up take turns (interleaved).
        h_scale: float64 activation scale, [] or [E]: h is rounded to NVFP4, code * block_scale.
        permuted: whether to permute h.
        everyone: every slot has an expert, or what the others get is not read; else they get zeros.
    """
    x, rows_of_output = rows.x, 2 if interleaved else 1
    weight.check(x, rows_of_output)
    if gate is not None:
        gate.check(x, rows_of_output)
        require(gate.strides() == weight.strides(), "gate", gate.strides(), f"the strides of up, {weight.strides()}")
        require((gate.bias is None) == (weight.bias is None), "gate", gate.bias, "a bias if up has one")
    out = x.new_empty(routing.slots, weight.n) if everyone else x.new_zeros(routing.slots, weight.n)
    if out.numel() == 0:
        return out
    outputs = config.rows if gate is None else config.rows // 2
    tiles, parts = routing.tiles(config.largest), cdiv(weight.n, outputs)
    launch(
        tiled_up_kernel,
        tiles * parts,
        routing.table,
        out,
        x,
        *([None] * 4 if gate is None else gate.pointers()),
        *weight.pointers(),
        rows.scale,
        h_scale,
        tiles,
        parts,
        slots_per_row,
        len(weight.words),
        weight.n,
        weight.k,
        *weight.strides(),
        stride(rows.scale),
        stride(h_scale),
        ACTIVATION=compile_activation(activation),
        GATED=gate is not None,
        INTERLEAVED=interleaved,
        PERMUTE_H=permuted,
        **constants(rows, routing, config),
        EARLY=rows.last,
    )
    return out
