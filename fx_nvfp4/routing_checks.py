"""A debug mode that looks at routing before it is used: environment variable FX_NVFP4_DEBUG_IDS, "0" (default) or "1".

Without it, ids outside 0..E-1 and rows past the last offset contribute nothing, and nothing waits for a device. With
it, negative ids still mean "no expert", as models write them, and everything else that is out of range raises. It
reads ids and offsets on the host at each call, so that it cannot be used while a CUDA graph is captured.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

VARIABLE = "FX_NVFP4_DEBUG_IDS"


def wanted() -> bool:
    """Whether the debug mode is on.

    Raises:
        ValueError: another value of the variable.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f'environment variable {VARIABLE} must be "0" or "1", got {value!r}')
    return value == "1"


def check_ids(op: str, ids: Tensor, experts: int) -> None:
    """In the debug mode, refuse ids that name no expert.

    Raises:
        IndexError: an id is experts or larger; tells how many are, and the first one and its place.
    """
    if not wanted():
        return
    odd = (ids >= experts).nonzero()
    if len(odd):
        place = odd[0].tolist()
        first = ids[tuple(place)].item()
        raise IndexError(
            f"{op}: {len(odd)} of {ids.numel()} expert ids are out of range, the first is {first} at {place}; "
            f"there are {experts} experts, and only negative ids may stand for none"
        )


def check_offsets(op: str, offs: Tensor, rows: int) -> None:
    """In the debug mode, refuse offsets that fall, or end anywhere but at the last row or before it.

    Raises:
        IndexError: tells the first such offset and its place.
    """
    if not wanted() or not offs.numel():
        return
    before = torch.cat((offs.new_zeros(1), offs[:-1]))
    odd = ((offs < before) | (offs > rows)).nonzero()
    if len(odd):
        place = int(odd[0])
        raise IndexError(
            f"{op}: offset {int(offs[place])} at [{place}], after {int(before[place])}, for {rows} rows; offsets are "
            "the ends of each expert's rows: they rise, and none exceeds the number of rows"
        )
