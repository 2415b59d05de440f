"""Ranks that have tokens of their own: rows travel to the ranks of their experts, and the results back.

Each slot (a token and one of its experts) is a row. How many rows go from one rank to another is not known before,
and may be none: a rank without tokens, or one whose experts nobody chose, takes part all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_to_all_single
from torch.distributed._functional_collectives import all_to_all_single_autograd

from .cut import share

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange:
    """The forward of an experts module that holds whole experts of its own.

    Args:
        run: the module's own forward.
        experts: the number of experts of all ranks.
        weighted: whether routing weights multiply the "output" or the "input" of experts.
    """

    def __init__(self, run: Forward, group: ProcessGroup, experts: int, weighted: str) -> None:
        self.run, self.group, self.experts, self.weighted = run, group, experts, weighted
        ranks = group.size()
        self.ends = [share(experts, rank, ranks).stop for rank in range(ranks)]
        self.first = share(experts, group.rank(), ranks).start

    # How many rows travel is read back to the host, which ends a graph; what is called from here is compiled again.
    @torch.compiler.disable(recursive=False)
    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, K], ids and weights [T, A] of this rank's tokens -> [T, H]."""
        slots, order, sent, received = self._plan(ids)
        rows = x[order // ids.shape[1]]
        if self.weighted == "input":
            rows = (rows.float() * weights.reshape(-1)[order].float().unsqueeze(-1)).to(x.dtype)
        # What is still under way is no input for a compiled graph: the copy waits for it.
        rows = all_to_all_single_autograd(rows, received, sent, self.group).clone()
        local = ids.new_empty(sum(received))
        all_to_all_single(local, slots[order].contiguous(), received, sent, group=self.group)
        local = (local - self.first).unsqueeze(-1)
        y = self.run(rows, local, torch.ones_like(local, dtype=weights.dtype))
        y = all_to_all_single_autograd(y.contiguous(), sent, received, self.group)
        return self._combine(y, order, ids, weights)

    # Not compiled: it waits for the host, and Triton 3.6 fails at searchsorted in no ids at all. A rank that raises
    # leaves the others waiting.
    @torch.compiler.disable
    def _plan(self, ids: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """(ids of slots, slots of this rank by their expert, how many go to each rank, how many come from each)."""
        slots = ids.reshape(-1)
        inside = (slots >= 0) & (slots < self.experts)
        key, order = torch.where(inside, slots, self.experts).sort(stable=True)
        ends = torch.tensor(self.ends, dtype=key.dtype, device=key.device)
        until = torch.searchsorted(key, ends)  # the slots before each rank's last, as they are sorted
        sent = until.diff(prepend=until.new_zeros(1))
        received = torch.empty_like(sent)
        all_to_all_single(received, sent, group=self.group)
        order = order[: int(until[-1])]
        return slots, order, sent.tolist(), received.tolist()

    def _combine(self, y: Tensor, order: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's slots, in fp32, rounded once."""
        slots = y.new_zeros(ids.numel(), y.shape[1]).index_copy(0, order, y).view(*ids.shape, y.shape[1])
        factor = torch.ones_like(weights) if self.weighted == "input" else weights
        # Slots of nobody hold zeros, and their weights may be anything.
        factor = torch.where((ids >= 0) & (ids < self.experts), factor, 0.0)
        return (slots.float() * factor.float().unsqueeze(-1)).sum(dim=1).to(y.dtype)


def install(module: nn.Module, group: ProcessGroup, experts: int, weighted: str) -> None:
    """Make a module that holds whole experts of its own take tokens for all of them."""
    module.forward = Exchange(module.forward, group, experts, weighted)
