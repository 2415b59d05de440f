"""Records the largest magnitude that enters each packed weight, of 3-D ones each expert, while a model runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import UNCALIBRATED
from ..reference import experts_by_offsets
from ..tensor import NVFP4Weight

_OPS = torch.ops.fx_nvfp4
# op -> position of the scale among its arguments; where it is 5, the routing comes before it
_SCALE = {_OPS.linear.default: 4, _OPS.batched.default: 4, _OPS.indexed.default: 5, _OPS.grouped.default: 5}


class Observer(TorchDispatchMode):
    """While active, products with weights that carry slots run weight-only, and their inputs are recorded.

    A weight carries its slots where its activation scale will be: views and choices of experts keep scales with their
    experts, however a model spells them, so each product says which experts its rows are of.

    Before:  linear(x, *weight, slot, "uncalibrated")
    After:   amax[slot] = max(amax[slot], |x|);  linear(x, *weight, None, "none")
    """

    def __init__(self) -> None:
        super().__init__()
        self._slots = 0
        self._amax: dict[torch.device, Tensor] = {}

    def slots(self, w: NVFP4Weight) -> NVFP4Weight:
        """The weight with a slot, or one an expert, that nobody else has."""
        count = math.prod(w.stored)
        slots = torch.arange(self._slots, self._slots + count, dtype=torch.float64, device=w.qdata.device)
        self._slots += count
        return w.replace(activations=UNCALIBRATED, act_scale=slots.view(w.stored))

    def amax(self, w: NVFP4Weight) -> Tensor:
        """fp32 [] or [E] on the CPU: what entered a weight that :meth:`slots` gave; 0 where nothing did."""
        assert w.act_scale is not None
        slots = w.act_scale.long().cpu()
        found = [self._on(device)[:-1].cpu()[slots] for device in self._amax]
        return torch.stack([torch.zeros(slots.shape), *found]).amax(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, NVFP4Weight) for t in types):
            return NotImplemented  # it becomes one of our ops, which comes here
        at = _SCALE.get(func)
        if at is not None and args[at + 1 :][:1] == (UNCALIBRATED,):
            self._record(args[0], args[at], args[4] if at == 5 else None, func is _OPS.grouped.default)
            args = (*args[:at], None, "none", *args[at + 2 :])
        elif func is _OPS.moe.default and UNCALIBRATED in args:
            raise NotImplementedError(
                "calibrate: a FusedExperts, as prepare() makes, does not show what enters its experts: calibrate the "
                "model before prepare(), or give a hand-made one weights that have static scales"
            )
        return func(*args, **(kwargs or {}))

    def _record(self, x: Tensor, slots: Tensor, routing: Tensor | None, grouped: bool) -> None:
        rows = x.detach().abs().amax(-1).float()
        amax, nobody = self._on(x.device), self._slots
        if slots.dim() == 0:
            taken = slots.long().expand(rows.shape)
        elif routing is None:
            taken = slots.long().unsqueeze(-1).expand(rows.shape)
        else:
            experts = experts_by_offsets(routing, rows.shape[0]) if grouped else routing
            inside = (experts >= 0) & (experts < slots.shape[0])
            taken = torch.where(inside, slots.long()[experts.clamp(0, slots.shape[0] - 1)], nobody)
        amax.scatter_reduce_(0, taken.reshape(-1), rows.reshape(-1), "amax")

    def _on(self, device: torch.device) -> Tensor:
        """Largest magnitudes seen on a device, fp32 [slots + 1]; the last is of rows that belong to nobody."""
        if device not in self._amax:
            self._amax[device] = torch.zeros(self._slots + 1, device=device)
        return self._amax[device]
