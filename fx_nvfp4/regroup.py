"""Reshaping a packed weight: dims of [.., N, K] are merged freely, experts and rows are split, K stays whole."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .layouts import is_tiled
from .parts import map_parts, of_lead, rows_each
from .prepack import TILE_ROWS
from .tensor import Dims, NVFP4Weight, unsupported


def regroup(func: Any, w: NVFP4Weight, shape: Sequence[int]) -> NVFP4Weight:
    """w in another shape with the elements in the order shown.

    Raises:
        RuntimeError: the shape has another number of elements.
        NotImplementedError: K would be split, or the sizes do not fall on dims of [.., N, K].
    """
    asked, shape = shape, _without_minus_one(w, shape)
    torch._check(
        math.prod(shape) == w.numel(), lambda: f"shape {list(asked)} is invalid for an NVFP4Weight {list(w.shape)}"
    )
    groups, factors = _factor(func, w, shape)
    if len(factors[-1]) > 1:
        raise unsupported(func, w, f"shape {list(shape)} asked for, which splits K = {w.sizes[-1]}")
    lead = len(w.lead)
    split = _split_rows(w, factors[lead]) if len(factors[lead]) > 1 else w
    for a in reversed(range(lead)):
        if len(factors[a]) > 1:
            split = of_lead(split, split.dims, lambda t, a=a: t.unflatten(a, factors[a]))  # type: ignore[misc]
    starts = [sum(max(1, len(f)) for f in factors[:a]) for a in range(len(factors))]
    return split.show([tuple(starts[a] + part for a, part in group) for group in groups])


def _without_minus_one(w: NVFP4Weight, shape: Sequence[int]) -> list[int]:
    known = math.prod(size for size in shape if not (isinstance(size, int) and size == -1))
    return [w.numel() // known if isinstance(size, int) and size == -1 else size for size in shape]


def _factor(func: Any, w: NVFP4Weight, shape: Sequence[int]) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
    """([(dim of [.., N, K], which factor of it) merged by each asked dim], sizes of each dim's factors)."""
    sizes = w.sizes
    factors: list[list[int]] = [[] for _ in sizes]
    pending = deque((a, sizes[a]) for merged in w.dims for a in merged)

    def take(size: int) -> tuple[int, int]:
        a, left = pending.popleft()
        if not statically_known_true(left == size):
            pending.appendleft((a, left // size))
        factors[a].append(size)
        return a, len(factors[a]) - 1

    groups: list[list[tuple[int, int]]] = []
    for asked in shape:
        need, group = asked, []
        if statically_known_true(need == 1) and pending and statically_known_true(pending[0][1] == 1):
            group.append(take(1))
        while not statically_known_true(need == 1):
            while pending and statically_known_true(pending[0][1] == 1):
                pending.popleft()
            size = pending[0][1] if pending else 0
            if pending and statically_known_true(size == need):
                group.append(take(size))
                need = 1
                if statically_known_true(size == 0):  # of no tokens: it also merges what no other dim asks for
                    rest = math.prod(list[int](shape[len(groups) + 1 :]))
                    while pending and not statically_known_true(math.prod(p[1] for p in pending) == rest):
                        group.append(take(pending[0][1]))
            elif size and need % size == 0:
                group.append(take(size))
                need = need // size
            elif size and need and size % need == 0:
                group.append(take(need))
                need = 1
            else:
                raise unsupported(
                    func, w, f"shape {list(shape)} asked for, which does not fall on dims of {list(sizes)}"
                )
        groups.append(group)
    return groups, factors


def _split_rows(w: NVFP4Weight, factors: Sequence[int]) -> NVFP4Weight:
    """Rows in groups, which become experts of fewer rows: [E, N, K] as [E, 2, N/2, K], for example."""
    if is_tiled(w.qdata) and not statically_known_true(factors[-1] % TILE_ROWS == 0):
        w = w.canonical()
    rows, groups = len(w.stored), math.prod(factors[:-1])
    scale = w.act_scale if w.act_scale is not None and w.act_scale.dim() else None
    if w.expert_ids is None:
        for size in factors[:-1]:
            scale = None if scale is None else scale.unsqueeze(-1).expand(*scale.shape, size)
        dims = _canonical(len(w.lead) + len(factors) - 1)
        scale = w.act_scale if scale is None else scale
        return map_parts(w, lambda t: t.unflatten(rows, (*factors[:-1], factors[-1] // rows_each(w, t))), dims, scale)
    within = torch.arange(groups, device=w.qdata.device).view(*factors[:-1])
    ids = w.expert_ids.view(*w.lead, *[1] * within.dim()) * groups + within
    scale = w.act_scale if scale is None else scale.repeat_interleave(groups)

    def split(part: Tensor) -> Tensor:
        return part.unflatten(1, (groups, factors[-1] // rows_each(w, part))).flatten(0, 1)

    return map_parts(w, split, _canonical(ids.dim()), scale, expert_ids=ids)


def _canonical(lead: int) -> Dims:
    return tuple((d,) for d in range(lead + 2))
