"""Stacks the packed parts of experts, one projection at a time, each expert's own memory given back as it is copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fused import DOWN_NAME, UP_NAMES, FusedExperts
from ..tensor import NVFP4Weight
from .expert import ExpertPlan, leaves_of


class Stack:
    """The parts of a list of experts as 3-D tensors; the experts become views of them, so both still compute.

    At no time is more than one projection of one layer held twice.
    """

    def __init__(self, plan: ExpertPlan, experts: Sequence[nn.Module]) -> None:
        self._plan, self._experts = plan, experts
        self._moved: list[tuple[int, int]] = []  # (expert, leaf)
        self._trained: set[tuple[int, str]] = set()
        self.products = [self._stacked(p) for p in range(len(plan.products))]

    def _stacked(self, product: int) -> dict[str, Tensor]:
        """Parts of one product of every expert, [E, ..] each."""
        sources = self._plan.sources()[product]
        whole: dict[str, Tensor] = {}
        for e, expert in enumerate(self._experts):
            leaves = list(leaves_of(expert))
            for part, value in self._plan.parts(expert, product).items():
                if e == 0:
                    whole[part] = torch.empty(len(self._experts), *value.shape, dtype=value.dtype, device=value.device)
                place = whole[part][e]
                place.copy_(value)
                source = sources[part]
                if source is not None:
                    self._trained |= {(product, part)} if leaves[source].trained else set()
                    leaves[source].set(place.view(leaves[source].get().dtype))
                    self._moved.append((e, source))
        return whole

    def undo(self) -> None:
        """Give every expert memory of its own again."""
        for e, leaf in self._moved:
            own = list(leaves_of(self._experts[e]))[leaf]
            own.set(own.get().clone())

    def module(self, dtype: torch.dtype, weighted: str) -> FusedExperts:
        """The stacked experts as a module; weights show dtype."""
        names = (*UP_NAMES[self._plan.layout], DOWN_NAME)
        weights: dict[str, NVFP4Weight] = {}
        biases: dict[str, Tensor] = {}
        for p, (name, parts) in enumerate(zip(names, self.products, strict=True)):
            product = self._plan.products[p]
            weights[name] = NVFP4Weight(
                parts["qdata"],
                parts["block_scale"].view(torch.uint8 if product.tiled else torch.float8_e4m3fn),
                parts["global_scale"],
                dtype,
                product.activations,
                product.dialect,
                act_scale=parts.get("act_scale"),
            )
            if "bias" in parts:
                # Marked like the experts' own, so that training them is noticed.
                biases[name] = parts["bias"].requires_grad_((p, "bias") in self._trained)
        return FusedExperts(weights, biases, self._plan.activation, self._plan.layout, weighted)
