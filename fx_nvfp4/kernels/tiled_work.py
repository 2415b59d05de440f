# mypy: allow-untyped-defs
"""Which tile a program of a product on tiled weights computes, as Triton device functions."""

import triton
import triton.language as tl

from .tile_table import HEADER
from .tiled import FACTOR


@triton.jit
def find_work(tiles, parts, AT_ONCE: tl.constexpr):
    """(tile, part of the rows) of this program: AT_ONCE tiles take turns, so that programs that run together share."""
    pid = tl.program_id(0)
    first = pid // (AT_ONCE * parts) * AT_ONCE
    size = tl.minimum(tiles - first, AT_ONCE)
    inside = pid - first * parts
    return first + inside % size, inside // size


@triton.jit
def find_tile(table_ptr, tile, batch, LARGEST: tl.constexpr, DIRECT: tl.constexpr):
    """(expert, number of slots, its first slot or where the table has it) of a tile.

    With DIRECT table holds ids, and every slot is a tile. Without a table each expert has `batch` slots, one after the
    other.
    """
    if DIRECT:
        expert, count, first = tl.load(table_ptr + tile), tile * 0 + 1, tile
    elif table_ptr is None:
        of_expert = tl.cdiv(batch, LARGEST)
        expert = tile // of_expert
        place = tile % of_expert * LARGEST
        count, first = tl.minimum(batch - place, LARGEST), expert * batch + place
    else:
        first = tile * (HEADER + LARGEST)
        expert, count = tl.load(table_ptr + first), tl.load(table_ptr + first + 1)
        first += HEADER
    return expert.to(tl.int64), count, first


@triton.jit
def slots_of_tile(table_ptr, first, count, PLACE: tl.constexpr, TOKENS: tl.constexpr, DIRECT: tl.constexpr):
    """(int64 slots [TOKENS], mask) from the tile's place PLACE on."""
    place = PLACE + tl.arange(0, TOKENS)
    mask = place < count
    slots = first + place
    if not DIRECT and table_ptr is not None:
        slots = tl.load(table_ptr + slots, mask=mask, other=0)
    return slots.to(tl.int64), mask


@triton.jit
def is_for(count, SIZES: tl.constexpr, body: tl.constexpr):
    """Whether the loop of this number is the smallest that holds so many; SIZES has a byte for each, rising."""
    return (count <= SIZES >> 8 * body & 255) & (count > (SIZES << 8) >> 8 * body & 255)


@triton.jit
def first_chunks(words_ptr, scales_ptr, expert, row_tile, stride_we, K):
    """Where words and scales of an expert's tiles of rows begin."""
    return words_ptr + (expert * stride_we + row_tile * (K * 2)), scales_ptr + (
        expert * (stride_we // 4) + row_tile * (K // 2)
    )


@triton.jit
def sum_factor(in_scale_ptr, expert, stride_ie):
    """float32, what the sum lacks besides its row's scale: decoding's factor, and the activation scale if any."""
    factor = FACTOR
    if in_scale_ptr is not None:
        factor *= tl.load(in_scale_ptr + expert * stride_ie).to(tl.float32)
    return factor


@triton.jit
def row_scale(global_scale_ptr, stride_gn, n, N, factor):
    """float32 [rows n], what brings a sum of products to its value."""
    return tl.load(global_scale_ptr + n * stride_gn, mask=n < N, other=0.0) * factor


@triton.jit
def distance(to, origin, BYTES: tl.constexpr):
    """How many elements of BYTES lie between two pointers, as an offset: a choice between pointers is not pipelined."""
    return tl.multiple_of((to.to(tl.int64) - origin.to(tl.int64)) // BYTES, 8)
