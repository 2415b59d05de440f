# mypy: allow-untyped-defs
"""Slots of a routing table sorted by expert, on the device and without atomics: the order never varies."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import ROUTING_BLOCK, ROUTING_BLOCKS_PER_STEP, ROUTING_GROUPS
from .operands import require
from .sizes import cdiv, next_power_of_2


@triton.jit
def load_expert(ids_ptr, slot, slots, E):
    """The expert of each slot as int32, E for those of nobody."""
    expert = tl.load(ids_ptr + slot, mask=slot < slots, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def count_kernel(ids_ptr, before_ptr, total_ptr, slots, E, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """One program per expert: before[b, expert] = its slots in the blocks before b; total[expert] = all of them."""
    expert = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    seen = 0
    for first in range(0, slots, BLOCK * BLOCKS):
        slot = first + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        count = tl.sum((load_expert(ids_ptr, slot, slots, E) == expert).to(tl.int32), axis=1)
        row = first // BLOCK + block
        tl.store(before_ptr + row * E + expert, seen + tl.cumsum(count, 0) - count, mask=row * BLOCK < slots)
        seen += tl.sum(count, 0)
    tl.store(total_ptr + expert, seen)


@triton.jit
def place_kernel(
    ids_ptr, before_ptr, total_ptr, order_ptr, offs_ptr, slots, E, BLOCK: tl.constexpr, GROUPS: tl.constexpr
):
    """One program per block of slots: writes each to its place. With before_ptr None there is only one block."""
    block = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    slot = block * BLOCK + here
    expert = load_expert(ids_ptr, slot, slots, E)
    # Before a slot come its expert's slots earlier in this block and in the blocks before, and those of lower experts.
    earlier = (expert[None, :] == expert[:, None]) & (here[None, :] < here[:, None])
    place = tl.sum(earlier.to(tl.int32), axis=1)
    if before_ptr is not None:
        place += tl.load(before_ptr + block * E + expert, mask=expert < E, other=0)
    start = 0
    # A few experts at a time, so that the comparisons stay in registers.
    for first in range(0, E, GROUPS):
        group = first + tl.arange(0, GROUPS)
        if total_ptr is None:
            total = tl.sum((group[:, None] == expert[None, :]).to(tl.int32), axis=1)
        else:
            total = tl.load(total_ptr + group, mask=group < E, other=0)
        place += tl.sum(tl.where(group[None, :] < expert[:, None], total[None, :], 0), axis=1)
        if block == 0:
            tl.store(offs_ptr + group, start + tl.cumsum(total, 0), mask=group < E)
        start += tl.sum(total, 0)
    tl.store(order_ptr + place, slot, mask=expert < E)


def sort_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """ids int32 or int64 [T, A] -> order int32 [T * A], the slots (t * A + a) sorted by expert; offs int32 [E].

    Slots of expert e are order[offs[e-1]:offs[e]], in rising order. Slots whose id is outside [0, E) are in no group,
    and order past offs[-1] is not written. The host never waits for the device.
    """
    require(ids.dtype in (torch.int32, torch.int64), "ids", ids.dtype, "int32 or int64")
    slots = ids.numel()
    order = torch.empty(slots, dtype=torch.int32, device=ids.device)
    offs = order.new_empty(experts)
    if slots == 0:
        return order, offs.zero_()
    ids = ids.contiguous()
    blocks = cdiv(slots, ROUTING_BLOCK)
    before = total = None
    with torch.cuda.device_of(ids):
        if blocks > 1:
            before, total = order.new_empty(blocks, experts), order.new_empty(experts)
            steps = min(ROUTING_BLOCKS_PER_STEP, next_power_of_2(blocks))
            count_kernel[(experts,)](ids, before, total, slots, experts, BLOCK=ROUTING_BLOCK, BLOCKS=steps, num_warps=8)
        place_kernel[(blocks,)](
            ids, before, total, order, offs, slots, experts, BLOCK=ROUTING_BLOCK, GROUPS=ROUTING_GROUPS
        )
    return order, offs
