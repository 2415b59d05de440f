# mypy: allow-untyped-defs
"""The up and down products of a routed block on tiled weights; tiles of tokens as kernels/tile_table.py cuts them.

One program computes one tile of tokens by ROWS rows of the weight, gate rows and their up rows together. The loop is
compiled for several numbers of tokens, and each tile takes the smallest that holds it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import compile_activation
from .entry import permuted
from .fragments import form_of
from .launch import dependent_launch, wait_for_inputs
from .operands import require
from .tile_config import TileConfig, needs_wait
from .tile_table import HEADER
from .tiled import FACTOR, leave, prefetch, product, scaled


@triton.jit
def find_work(tiles, parts, AT_ONCE: tl.constexpr):
    """(tile, part of the rows) of this program: AT_ONCE tiles take turns, so that programs that run together share."""
    pid = tl.program_id(0)
    first = pid // (AT_ONCE * parts) * AT_ONCE
    size = tl.minimum(tiles - first, AT_ONCE)
    inside = pid - first * parts
    return first + inside % size, inside // size


@triton.jit
def find_tile(table_ptr, tile, LARGEST: tl.constexpr, DIRECT: tl.constexpr):
    """(expert, number of slots, where they are) of a tile; with DIRECT table holds ids, and every slot is a tile."""
    if DIRECT:
        expert, count, slots_ptr = tl.load(table_ptr + tile), tile * 0 + 1, table_ptr
    else:
        row = table_ptr + tile * (HEADER + LARGEST)
        expert, count, slots_ptr = tl.load(row), tl.load(row + 1), row + HEADER
    return expert.to(tl.int64), count, slots_ptr


@triton.jit
def slots_of_tile(slots_ptr, tile, count, TOKENS: tl.constexpr, DIRECT: tl.constexpr):
    """(int64 slots [TOKENS], mask)."""
    place = tl.arange(0, TOKENS)
    mask = place < count
    slots = tile + place if DIRECT else tl.load(slots_ptr + place, mask=mask, other=0)
    return slots.to(tl.int64), mask


@triton.jit
def row_scale(global_scale_ptr, stride_gn, n, N, factor):
    """float32 [rows n], what brings a sum of products to its value."""
    return tl.load(global_scale_ptr + n * stride_gn, mask=n < N, other=0.0) * factor


@triton.jit
def distance(to, origin, BYTES: tl.constexpr):
    """How many elements of BYTES lie between two pointers, as an offset: a choice between pointers is not pipelined."""
    return tl.multiple_of((to.to(tl.int64) - origin.to(tl.int64)) // BYTES, 8)


@triton.jit
def up_tile(
    slots_ptr,
    tile,
    count,
    out_ptr,
    x_ptr,
    words,
    scales,
    tile_mask,
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
    PERMUTED: tl.constexpr,
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
    slots, mask = slots_of_tile(slots_ptr, tile, count, TOKENS, DIRECT)
    x_ptrs = x_ptr + slots // slots_per_row * K
    # Read ahead of the product, as nothing else would hide how long it takes.
    scale = row_scale(global_scale_ptr, stride_gn, output, N, factor)
    if GATED:
        gate_scale = row_scale(gate_global_scale_ptr, stride_gn, output, N, factor)
    acc = product(
        words, scales, tile_mask, x_ptrs, mask, K, ROWS, TOKENS, BLOCK_K, STAGES, MASKED, PERMUTED, WAIT, dtype, FORM
    )
    up = acc
    if GATED:
        if INTERLEAVED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // 2, 2, TOKENS)), (0, 2, 1)))
        else:
            # A thread holds rows of both halves of the tile, so that this parts registers.
            gate, up = tl.split(tl.permute(tl.reshape(acc, (2, ROWS // 2, TOKENS)), (1, 2, 0)))
    up = scaled(up, scale, bias_ptr, stride_bn, output, N, dtype)
    if GATED:
        gate = scaled(gate, gate_scale, gate_bias_ptr, stride_bn, output, N, dtype)
        rows = leave(ACTIVATION(gate, up), h_scale_ptr, PERMUTE_H, dtype)
    else:
        rows = leave(ACTIVATION(up, up), h_scale_ptr, PERMUTE_H, dtype)
    column = permuted(output) if PERMUTE_H and output.shape[0] % 64 != 0 else output
    tl.store(out_ptr + slots[:, None] * N + column[None, :], rows, mask=mask[:, None] & (output < N)[None, :])


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
    PERMUTED: tl.constexpr,
    DIRECT: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BODIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[slot, :N] = ACTIVATION(gate, up) of x's row slot // slots_per_row.

    in_scale is the float64 activation scale of x by expert, out_scale that with which h is rounded, or None. Gate rows
    are the first half of a tile's, or in turn with up's where the weight holds them so (INTERLEAVED, then
    gate_words is not read). DIRECT: every slot is a tile of its own, and table holds ids, maybe of the last kernel.
    """
    if DIRECT:
        wait_for_inputs(PDL)
    tile, part = find_work(tiles, parts, AT_ONCE)
    expert, count, slots_ptr = find_tile(table_ptr, tile, SMALLEST << (BODIES - 1), DIRECT)
    if (count == 0) | (expert < 0) | (expert >= experts):
        if not DIRECT:
            wait_for_inputs(PDL)
        return
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    R: tl.constexpr = ROWS // 16
    row_tile = tl.arange(0, R)
    own = part * R + row_tile
    weight_tiles = N // 8 if INTERLEAVED else N // 16
    if HALVES:
        own = part * (R // 2) + row_tile % (R // 2)
    words = words_ptr + (expert * stride_we + own * (K * 2))
    scales = scales_ptr + (expert * (stride_we // 4) + own * (K // 2))
    if HALVES:
        words += tl.where(row_tile < R // 2, distance(gate_words_ptr, words_ptr, 4), 0)
        scales += tl.where(row_tile < R // 2, distance(gate_scales_ptr, scales_ptr, 2), 0)
    if PDL and not DIRECT:
        if PREFETCHED:
            prefetch(words, PREFETCHED)
        wait_for_inputs(PDL)
    factor = FACTOR
    if in_scale_ptr is not None:
        factor *= tl.load(in_scale_ptr + expert * stride_ie).to(tl.float32)
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
        if (count <= SMALLEST << body) & (count > (SMALLEST << body) // 2 * min(body, 1)):
            up_tile(
                slots_ptr,
                tile,
                count,
                out_ptr,
                x_ptr,
                words,
                scales,
                own < weight_tiles,
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
                SMALLEST << body,
                ACTIVATION,
                GATED,
                INTERLEAVED,
                PERMUTE_H,
                PERMUTED,
                DIRECT,
                FORM,
                ROWS,
                BLOCK_K,
                STAGES,
                MASKED,
                WAIT,
            )


@triton.jit
def down_tile(
    slots_ptr,
    tile,
    count,
    out_ptr,
    x_ptr,
    words,
    scales,
    tile_mask,
    global_scale_ptr,
    bias_ptr,
    factor,
    output,
    N,
    K,
    stride_gn,
    stride_bn,
    TOKENS: tl.constexpr,
    PERMUTED: tl.constexpr,
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
    slots, mask = slots_of_tile(slots_ptr, tile, count, TOKENS, DIRECT)
    x_ptrs = x_ptr + slots * K
    scale = row_scale(global_scale_ptr, stride_gn, output, N, factor)
    acc = product(
        words, scales, tile_mask, x_ptrs, mask, K, ROWS, TOKENS, BLOCK_K, STAGES, MASKED, PERMUTED, WAIT, dtype, FORM
    )
    y = scaled(acc, scale, bias_ptr, stride_bn, output, N, dtype)
    ptrs = out_ptr + slots[:, None] * N + output[None, :]
    tl.store(ptrs, tl.trans(y.to(dtype)), mask=mask[:, None] & (output < N)[None, :])


@triton.jit(do_not_specialize=["tiles", "parts", "experts", "stride_ie"])
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
    N,
    K,
    stride_we,
    stride_ge,
    stride_gn,
    stride_be,
    stride_bn,
    stride_ie,
    PERMUTED: tl.constexpr,
    DIRECT: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BODIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[slot, :N] = row `slot` of x, permuted, by the slot's expert."""
    tile, part = find_work(tiles, parts, AT_ONCE)
    expert, count, slots_ptr = find_tile(table_ptr, tile, SMALLEST << (BODIES - 1), DIRECT)
    if (count == 0) | (expert < 0) | (expert >= experts):
        wait_for_inputs(PDL)
        return
    own = part * (ROWS // 16) + tl.arange(0, ROWS // 16)
    words = words_ptr + (expert * stride_we + own * (K * 2))
    scales = scales_ptr + (expert * (stride_we // 4) + own * (K // 2))
    if PDL:
        if PREFETCHED:
            prefetch(words, PREFETCHED)
        wait_for_inputs(PDL)
    factor = FACTOR
    if in_scale_ptr is not None:
        factor *= tl.load(in_scale_ptr + expert * stride_ie).to(tl.float32)
    global_scale_ptr += expert * stride_ge
    if bias_ptr is not None:
        bias_ptr += expert * stride_be
    output = part * ROWS + tl.arange(0, ROWS)
    for body in tl.static_range(BODIES):
        if (count <= SMALLEST << body) & (count > (SMALLEST << body) // 2 * min(body, 1)):
            down_tile(
                slots_ptr,
                tile,
                count,
                out_ptr,
                x_ptr,
                words,
                scales,
                own < N // 16,
                global_scale_ptr,
                bias_ptr,
                factor,
                output,
                N,
                K,
                stride_gn,
                stride_bn,
                SMALLEST << body,
                PERMUTED,
                DIRECT,
                FORM,
                ROWS,
                BLOCK_K,
                STAGES,
                MASKED,
                WAIT,
            )


class TiledOperand(NamedTuple):
    """Tiled weights of E experts, or a view of some of their tiles of rows; see fx_nvfp4/prepack.py.

    Interleaved gate and up share words and scales, and each has its own global_scale and bias.
    """

    words: Tensor  # int32 [E, tiles of rows, K/64, 32, 4]
    scales: Tensor  # uint8 [E, tiles of rows, K/64, 32, 2]
    global_scale: Tensor  # float32 [E, N]
    bias: Tensor | None  # [E, N]

    @property
    def k(self) -> int:
        return self.words.shape[2] * 64

    @property
    def n(self) -> int:
        return self.global_scale.shape[1]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.words, self.scales.view(torch.uint16), self.global_scale, self.bias

    def strides(self) -> tuple[int, ...]:
        bias = (0, 0) if self.bias is None else self.bias.stride()
        return self.words.stride(0), *self.global_scale.stride(), *bias

    def check(self, x: Tensor, rows_of_output: int = 1) -> None:
        """Raise ValueError unless the kernels can read it, and x with it."""
        words, scales, global_scale, bias = self
        experts, tiles = words.shape[:2]
        require(words.ndim == 5 and words.dtype == torch.int32, "words", f"{words.dtype} {words.ndim}-D", "int32, 5-D")
        require(words.shape[3:] == (32, 4), "words", tuple(words.shape), "[E, N/16, K/64, 32, 4]")
        require(scales.dtype == torch.uint8, "scales", scales.dtype, "uint8")
        expected = (*words.shape[:4], 2)
        require(scales.shape == expected, "scales", tuple(scales.shape), f"shape {expected}")
        for name, packed in (("words", words), ("scales", scales)):
            require(packed[0].is_contiguous(), name, f"strides {packed.stride()}", "whole tiles, one after the other")
        # The kernels know one stride over experts.
        same = experts == 1 or scales.stride(0) * 2 == words.stride(0)
        require(same, "scales", f"stride {scales.stride(0)}", f"stride {words.stride(0) // 2} over experts")
        rows = (experts, tiles * 16 // rows_of_output)
        require(global_scale.dtype == torch.float32, "global_scale", global_scale.dtype, "float32")
        by_row: tuple[tuple[str, Tensor | None], ...] = (("global_scale", global_scale), ("bias", bias))
        for name, tensor in by_row:
            require(tensor is None or tensor.shape == rows, name, tensor, f"shape {rows}")
        require(x.dtype in (torch.bfloat16, torch.float16), "x", x.dtype, "bfloat16 or float16")
        require(x.is_contiguous() and x.shape[-1] == self.k, "x", tuple(x.shape), f"[rows, {self.k}], contiguous")
        for name, tensor in (("words", words), ("scales", scales), *by_row):
            require(tensor is None or tensor.device == x.device, name, tensor, f"x's device {x.device}")


class Routing(NamedTuple):
    """Which slots each tile holds."""

    table: Tensor  # of sort_into_tiles, or the ids of the slots, each of which is then a tile
    slots: int

    @property
    def direct(self) -> bool:
        return self.table.ndim == 1


class Rows(NamedTuple):
    """The input of a product: rows [.., K], whether entry.enter has permuted them, and their scale."""

    x: Tensor
    permuted: bool
    scale: Tensor | None  # float64 [] or [E], multiplied into the sum


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
) -> Tensor:
    """activation(gate, up) of every slot -> [slots, N] in x's dtype; slots of nobody are not written.

    The table must have been written before the kernel that was launched last: this one reads it before that has ended.

    Args:
        rows: slot s reads row s // slots_per_row.
        gate: None where there is none; with the words of `weight` where rows of gate and up take turns (interleaved).
        h_scale: float64 activation scale, [] or [E]: h is rounded to NVFP4, code * block_scale.
        permuted: whether to permute h.
    """
    x, rows_of_output = rows.x, 2 if interleaved else 1
    weight.check(x, rows_of_output)
    if gate is not None:
        gate.check(x, rows_of_output)
        require(gate.strides() == weight.strides(), "gate", gate.strides(), f"the strides of up, {weight.strides()}")
        require((gate.bias is None) == (weight.bias is None), "gate", gate.bias, "a bias if up has one")
    out = x.new_empty(routing.slots, weight.n)
    if out.numel() == 0:
        return out
    outputs = config.rows if gate is None else config.rows // 2
    parts = triton.cdiv(weight.n, outputs)
    with torch.cuda.device_of(x):
        tiled_up_kernel[(len(routing.table) * parts,)](
            routing.table,
            out,
            x,
            *([None] * 4 if gate is None else gate.pointers()),
            *weight.pointers(),
            rows.scale,
            h_scale,
            len(routing.table),
            parts,
            slots_per_row,
            len(weight.words),
            weight.n,
            weight.k,
            *weight.strides(),
            _stride(rows.scale),
            _stride(h_scale),
            ACTIVATION=compile_activation(activation),
            GATED=gate is not None,
            INTERLEAVED=interleaved,
            PERMUTE_H=permuted,
            **_constants(rows, routing, config, bool(weight.n % outputs or weight.k % config.block_k)),
        )
    return out


def down(rows: Rows, weight: TiledOperand, routing: Routing, config: TileConfig, everyone: bool = True) -> Tensor:
    """Row s of x [slots, K] by the expert of slot s -> [slots, N].

    As :func:`up` this reads the table before the kernel that was launched last has ended.

    Args:
        everyone: every slot has an expert, or what the others get does not matter; else they get zeros.
    """
    x = rows.x
    weight.check(x)
    out = x.new_empty(routing.slots, weight.n) if everyone else x.new_zeros(routing.slots, weight.n)
    if out.numel() == 0:
        return out
    parts = triton.cdiv(weight.n, config.rows)
    with torch.cuda.device_of(x):
        tiled_down_kernel[(len(routing.table) * parts,)](
            routing.table,
            out,
            x,
            *weight.pointers(),
            rows.scale,
            len(routing.table),
            parts,
            len(weight.words),
            weight.n,
            weight.k,
            *weight.strides(),
            _stride(rows.scale),
            **_constants(rows, routing, config, bool(weight.n % config.rows or weight.k % config.block_k)),
        )
    return out


def _stride(scale: Tensor | None) -> int:
    return scale.stride(0) if scale is not None and scale.ndim else 0


def _constants(rows: Rows, routing: Routing, config: TileConfig, masked: bool) -> dict[str, Any]:
    form = form_of(rows.x)
    return {
        "PERMUTED": rows.permuted,
        "DIRECT": routing.direct,
        "FORM": form,
        "MASKED": masked,
        "WAIT": form == "sm90" and needs_wait(config),
        "PREFETCHED": min(config.prefetched, triton.next_power_of_2(rows.x.shape[-1] + 1) // 2),
        **config.meta(),
        **dependent_launch(rows.x),
    }
