# mypy: allow-untyped-defs
"""Slots sorted by expert into tiles of tokens, on the device, in one launch for few slots and two for many.

A row of the table is one tile: expert, number of slots (-1 and 0: no tile), two unused, and then the slots, so that a
program that computes the tile reads all it has to know at once. No atomics decide an order, so the result never varies,
and the host never waits: the number of tiles is bounded by :func:`fx_nvfp4.kernels.grouped.row_tiles`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import TABLE_BLOCK, TABLE_BLOCKS_OF_MANY, TABLE_COUNTED, TABLE_SLOTS_AT_ONCE
from .grouped import row_tiles
from .launch import dependent_launch, launch, wait_for_inputs
from .operands import require
from .routing import load_expert
from .sizes import cdiv, next_power_of_2

HEADER = tl.constexpr(4)
_TABLE = ("table_ptr",)


@triton.jit
def write_headers(table_ptr, totals, tiles, E, TOKENS: tl.constexpr, GROUPS: tl.constexpr):
    """Expert and count of each tile, shared among all programs; returns the first tile of each group [GROUPS]."""
    WIDTH: tl.constexpr = HEADER + TOKENS
    group = tl.arange(0, GROUPS)
    needed = tl.where(group < E, (totals + TOKENS - 1) // TOKENS, 0)
    first = tl.cumsum(needed, 0) - needed
    for i in range(tl.program_id(0), tl.max(needed, 0), tl.num_programs(0)):
        row = table_ptr + (first + i) * WIDTH
        tl.store(row, group, mask=i < needed)
        tl.store(row + 1, tl.minimum(totals - i * TOKENS, TOKENS), mask=i < needed)
    used = tl.sum(needed, 0)
    for start in range(used + tl.program_id(0) * GROUPS, tiles, tl.num_programs(0) * GROUPS):
        row = table_ptr + (start + group) * WIDTH
        tl.store(row, -1, mask=start + group < tiles)  # read together with the count
        tl.store(row + 1, 0, mask=start + group < tiles)
    return first


@triton.jit
def write_slots(table_ptr, start, expert, before, first, E, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Slots from `start` on, of these experts [BLOCK], to their tiles; `before` counts each group's earlier slots."""
    WIDTH: tl.constexpr = HEADER + TOKENS
    here = tl.arange(0, BLOCK)
    earlier = (expert[None, :] == expert[:, None]) & (here[None, :] < here[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1) + tl.gather(before, expert, 0)
    tile = tl.gather(first, expert, 0) + rank // TOKENS
    tl.store(table_ptr + tile * WIDTH + HEADER + rank % TOKENS, start + here, mask=expert < E)


@triton.jit(do_not_specialize=["slots", "tiles", "E"])
def table_kernel(
    ids_ptr,
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
    """Each program counts all slots, and places a block of them."""
    wait_for_inputs(PDL)
    start = tl.program_id(0) * BLOCK
    slot = tl.arange(0, SLOTS)
    everyone = load_expert(ids_ptr, slot, slots, E)
    expert = load_expert(ids_ptr, start + tl.arange(0, BLOCK), slots, E)
    totals = tl.histogram(everyone, GROUPS)
    before = tl.histogram(tl.where(slot < start, everyone, E), GROUPS)
    first = write_headers(table_ptr, totals, tiles, E, TOKENS, GROUPS)
    write_slots(table_ptr, start, expert, before, first, E, TOKENS, BLOCK)


@triton.jit(do_not_specialize=["slots", "E", "block_size"])
def count_blocks_kernel(
    ids_ptr, counts_ptr, slots, block_size, E, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr
):
    """counts[b, group]: the slots of block b by expert, nobody's as group E."""
    wait_for_inputs(PDL)
    start = tl.program_id(0) * block_size
    counts = tl.zeros((GROUPS,), dtype=tl.int32)
    for part in range(0, block_size, BLOCK):
        counts += tl.histogram(load_expert(ids_ptr, start + part + tl.arange(0, BLOCK), slots, E), GROUPS)
    tl.store(counts_ptr + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), counts)


@triton.jit(do_not_specialize=["slots", "block_size", "tiles", "E"])
def table_of_counts_kernel(
    ids_ptr,
    counts_ptr,
    table_ptr,
    slots,
    block_size,
    tiles,
    E,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """As table_kernel, from the counts of all blocks, STEP of them at a time."""
    wait_for_inputs(PDL)
    pid, blocks = tl.program_id(0), tl.num_programs(0)
    group, row = tl.arange(0, GROUPS), tl.arange(0, STEP)
    totals = tl.zeros((GROUPS,), dtype=tl.int32)
    before = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(0, blocks, STEP):
        block = start + row
        counts = tl.load(counts_ptr + block[:, None] * GROUPS + group[None, :], mask=block[:, None] < blocks, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(block[:, None] < pid, counts, 0), axis=0)
    first = write_headers(table_ptr, totals, tiles, E, TOKENS, GROUPS)
    for part in range(0, block_size, BLOCK):
        start = pid * block_size + part
        expert = load_expert(ids_ptr, start + tl.arange(0, BLOCK), slots, E)
        write_slots(table_ptr, start, expert, before, first, E, TOKENS, BLOCK)
        before += tl.histogram(expert, GROUPS)


def sort_into_tiles(ids: Tensor, experts: int, tokens: int) -> Tensor:
    """ids int32 or int64 [T, A] -> table int32 [tiles, 4 + tokens] of its slots, t * A + a.

    Slots of one expert are in rising order; those whose id is outside [0, experts) are in no tile. Places past the
    number of slots of a tile are not written.
    """
    require(ids.dtype in (torch.int32, torch.int64), "ids", ids.dtype, "int32 or int64")
    slots = ids.numel()
    tiles = min(slots, row_tiles(slots, experts, tokens))
    table = torch.empty(tiles, HEADER.value + tokens, dtype=torch.int32, device=ids.device)
    if slots == 0:
        return table
    ids = ids.contiguous()
    constants = {"BLOCK": TABLE_BLOCK, "GROUPS": next_power_of_2(experts + 1), **dependent_launch(ids)}
    if slots > TABLE_SLOTS_AT_ONCE:
        _sort_many(ids, table, tiles, experts, tokens, constants)
        return table
    constants |= {"TOKENS": tokens, "SLOTS": max(TABLE_BLOCK, next_power_of_2(slots))}
    programs = cdiv(slots, TABLE_BLOCK)
    launch(table_kernel, programs, ids, table, slots, tiles, experts, writes=_TABLE, **constants)
    return table


def _sort_many(ids: Tensor, table: Tensor, tiles: int, experts: int, tokens: int, constants: dict[str, Any]) -> None:
    slots, groups = ids.numel(), constants["GROUPS"]
    size = TABLE_COUNTED * cdiv(slots, TABLE_COUNTED * TABLE_BLOCKS_OF_MANY)
    blocks = cdiv(slots, size)
    counts = table.new_empty(blocks, groups)
    counting = {**constants, "BLOCK": TABLE_COUNTED}
    launch(count_blocks_kernel, blocks, ids, counts, slots, size, experts, writes=("counts_ptr",), **counting)
    constants |= {"TOKENS": tokens, "STEP": max(1, 4096 // groups)}
    arguments = ids, counts, table, slots, size, tiles, experts
    launch(table_of_counts_kernel, blocks, *arguments, writes=_TABLE, **constants)
