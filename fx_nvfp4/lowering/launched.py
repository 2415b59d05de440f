"""What a function would start on a GPU, found by calling it on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import Launch, recording

_ALLOCATIONS = {torch.ops.aten.new_empty, torch.ops.aten.empty}


class NotLaunchesError(Exception):
    """A function does more on the device than start kernels; says what."""


class Traced(NamedTuple):
    launches: list[Launch]
    result: Tensor


def trace_launches(call: Callable[[], Tensor]) -> Traced:
    """What a call on fake tensors would start, in its order.

    Raises:
        NotLaunchesError: it also computes by other operations.
    """
    watch = _Watch()
    with recording() as launches, watch:
        result = call()
    if watch.computed:
        raise NotLaunchesError(f"besides kernels it calls {', '.join(sorted(set(watch.computed)))}")
    return Traced(launches, result)


class _Watch(TorchDispatchMode):
    """Notes operations that neither look at tensors nor allocate them."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = func.is_view or func.namespace == "prim"
        if not looks and func.overloadpacket not in _ALLOCATIONS:
            self.computed.append(str(func))
        return func(*args, **(kwargs or {}))
