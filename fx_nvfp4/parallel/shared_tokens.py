"""Ranks that all have the same tokens: each runs its part of the experts, and the results are summed.

The sums are DTensor's: what enters is replicated, so that its gradients, of which each rank has a part, are summed on
the way back; what leaves is partial, and becomes replicated by one all_reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def install(module: nn.Module, mesh: DeviceMesh, mine: range | None) -> None:
    """Make a module that holds a part of its experts return what the whole would.

    Args:
        mine: which experts these are; None: a part of each.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        x, ids, weights = (*args, *kwargs.values())
        x, weights = _enter(x, mesh), _enter(weights, mesh)
        if mine is not None:
            ids, weights = to_local(ids, weights, mine)
        return (x, ids, weights), {}

    module.register_forward_pre_hook(before, with_kwargs=True)
    leave_whole(module, mesh)


def enter_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Say of a module's input that all ranks have it, each of which gives a part of its gradient."""
    module.register_forward_pre_hook(lambda module, args: (_enter(args[0], mesh), *args[1:]))


def leave_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum what the ranks' modules give."""

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return (
            DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
        )

    module.register_forward_hook(after)


def to_local(ids: Tensor, weights: Tensor, mine: range) -> tuple[Tensor, Tensor]:
    """Ids among a rank's own experts; those of others become the number of its experts, which is nobody."""
    outside = (ids < mine.start) | (ids >= mine.stop)
    return torch.where(outside, len(mine), ids - mine.start), weights.masked_fill(outside, 0.0)


def _enter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
