# mypy: allow-untyped-defs
"""Slots sorted by expert and cut into tiles of tokens, on the device, in one launch for few slots and two for many.

No atomics decide an order, so the result never varies, and the host never waits: the number of tiles is bounded by
:func:`fx_nvfp4.kernels.grouped.row_tiles`, and those that nobody needs are empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import TABLE_BLOCK, TABLE_BLOCK_OF_MANY, TABLE_SLOTS_AT_ONCE
from .grouped import row_tiles
from .launch import dependent_launch, wait_for_inputs
from .operands import require
from .routing import load_expert


@triton.jit
def write_places(order_ptr, expert, totals, before, start, E, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """order[place] = slot for the BLOCK slots from `start` on; totals and before (this block) are slots by expert."""
    here, group = tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    # Ahead of a slot lie all slots of lower experts, its expert's in earlier blocks, and those earlier in this one.
    lower = tl.where(group[None, :] < expert[:, None], totals[None, :], 0)
    place = tl.sum(tl.where(group[None, :] == expert[:, None], before[None, :], lower), axis=1)
    earlier = (expert[None, :] == expert[:, None]) & (here[None, :] < here[:, None])
    place += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(order_ptr + place, start + here, mask=expert < E)


@triton.jit
def write_tiles(
    table_ptr, totals, first_tile, tiles, E, TOKENS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    """table[i] = (expert, first place, count, 0) of BLOCK tiles from `first_tile` on; the count of no tile is 0."""
    tile, group = first_tile + tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    needed = tl.where(group < E, (totals + TOKENS - 1) // TOKENS, 0)
    until = tl.cumsum(needed, 0)
    expert = tl.sum((until[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    chosen = group[None, :] == expert[:, None]
    ends = tl.cumsum(totals, 0)
    skipped = (tile - tl.sum(tl.where(chosen, (until - needed)[None, :], 0), axis=1)) * TOKENS
    first = tl.sum(tl.where(chosen, (ends - totals)[None, :], 0), axis=1) + skipped
    count = tl.minimum(tl.sum(tl.where(chosen, ends[None, :], 0), axis=1) - first, TOKENS)
    row = table_ptr + tile * 4
    tl.store(row, expert, mask=tile < tiles)
    tl.store(row + 1, first, mask=tile < tiles)
    tl.store(row + 2, tl.where(expert < E, count, 0), mask=tile < tiles)


@triton.jit(do_not_specialize=["slots", "tiles", "E"])
def table_kernel(
    ids_ptr,
    order_ptr,
    table_ptr,
    slots,
    tiles,
    E,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program counts all slots, and places a block of them and of the tiles."""
    wait_for_inputs(PDL)
    start = tl.program_id(0) * BLOCK
    slot = tl.arange(0, SLOTS)
    everyone = load_expert(ids_ptr, slot, slots, E)
    totals = tl.histogram(everyone, GROUPS)
    before = tl.histogram(tl.where(slot < start, everyone, E), GROUPS)
    expert = load_expert(ids_ptr, start + tl.arange(0, BLOCK), slots, E)
    write_places(order_ptr, expert, totals, before, start, E, BLOCK, GROUPS)
    write_tiles(table_ptr, totals, start, tiles, E, TOKENS, BLOCK, GROUPS)


@triton.jit(do_not_specialize=["slots", "E"])
def count_blocks_kernel(ids_ptr, counts_ptr, slots, E, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr):
    """counts[b, group]: the slots of block b by expert, nobody's as group E."""
    wait_for_inputs(PDL)
    block = tl.program_id(0)
    expert = load_expert(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), slots, E)
    tl.store(counts_ptr + block * GROUPS + tl.arange(0, GROUPS), tl.histogram(expert, GROUPS))


@triton.jit(do_not_specialize=["slots", "blocks", "tiles", "E"])
def table_of_counts_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    table_ptr,
    slots,
    blocks,
    tiles,
    E,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """As table_kernel, from the counts of all blocks, STEP of them at a time."""
    wait_for_inputs(PDL)
    pid = tl.program_id(0)
    group, row = tl.arange(0, GROUPS), tl.arange(0, STEP)
    totals = tl.zeros((GROUPS,), dtype=tl.int32)
    before = tl.zeros((GROUPS,), dtype=tl.int32)
    for first in range(0, blocks, STEP):
        block = first + row
        counts = tl.load(counts_ptr + block[:, None] * GROUPS + group[None, :], mask=block[:, None] < blocks, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(block[:, None] < pid, counts, 0), axis=0)
    # A part of the block at a time, so that comparisons of slots with groups stay in registers.
    for part in range(0, BLOCK, PART):
        start = pid * BLOCK + part
        expert = load_expert(ids_ptr, start + tl.arange(0, PART), slots, E)
        write_places(order_ptr, expert, totals, before, start, E, PART, GROUPS)
        write_tiles(table_ptr, totals, start, tiles, E, TOKENS, PART, GROUPS)
        before += tl.histogram(expert, GROUPS)


class Tiles(NamedTuple):
    """Slots in the order of their experts, and tiles of them."""

    order: Tensor  # int32 [slots]; past the last slot that has an expert it is not written
    table: Tensor  # int32 [count, 4]: expert, first place in order, slots of the tile (0: no tile), unused
    tokens: int  # slots that a tile holds at most


def sort_into_tiles(ids: Tensor, experts: int, tokens: int) -> Tiles:
    """ids int32 or int64 [T, A] -> its slots, t * A + a, by expert, in tiles of up to `tokens`.

    Slots of one expert are in rising order; those whose id is outside [0, experts) are in no tile. Every program cuts
    as many tiles as it places slots: there are never more tiles than slots.
    """
    require(ids.dtype in (torch.int32, torch.int64), "ids", ids.dtype, "int32 or int64")
    slots = ids.numel()
    tiles = min(slots, row_tiles(slots, experts, tokens))
    order = torch.empty(slots, dtype=torch.int32, device=ids.device)
    table = torch.empty(tiles, 4, dtype=torch.int32, device=ids.device)
    if slots == 0:
        return Tiles(order, table, tokens)
    ids = ids.contiguous()
    constants = {"TOKENS": tokens, "GROUPS": triton.next_power_of_2(experts + 1), **dependent_launch(ids)}
    with torch.cuda.device_of(ids):
        if slots <= TABLE_SLOTS_AT_ONCE:
            table_kernel[(triton.cdiv(slots, TABLE_BLOCK),)](
                ids,
                order,
                table,
                slots,
                tiles,
                experts,
                SLOTS=max(TABLE_BLOCK, triton.next_power_of_2(slots)),
                BLOCK=TABLE_BLOCK,
                **constants,
            )
        else:
            _sort_many(ids, order, table, experts, constants)
    return Tiles(order, table, tokens)


def _sort_many(ids: Tensor, order: Tensor, table: Tensor, experts: int, constants: dict[str, int]) -> None:
    block, groups = TABLE_BLOCK_OF_MANY, constants["GROUPS"]
    blocks = triton.cdiv(len(order), block)
    counts = order.new_empty(blocks, groups)
    launch = {name: value for name, value in constants.items() if name != "TOKENS"}
    count_blocks_kernel[(blocks,)](ids, counts, len(order), experts, BLOCK=block, num_warps=4, **launch)
    table_of_counts_kernel[(blocks,)](
        ids,
        counts,
        order,
        table,
        len(order),
        blocks,
        len(table),
        experts,
        BLOCK=block,
        PART=TABLE_BLOCK,
        STEP=max(1, 8192 // groups),
        num_warps=8,
        **constants,
    )
