"""The routed block of a mixture-of-experts layer in plain PyTorch: the truth in tests, and what runs on a CPU.

out[t] = sum over a of weights[t, a] * down(h), h = activation(up(x[t])), each product by expert ids[t, a]. Products are
rounded to x's dtype, again with their bias, and h is; the activation and the weighted sum are computed in fp32, the sum
rounded once, to x's dtype or to the one asked for. A slot is one place of ids, number t * A + a; slots with ids outside
0..E-1 contribute nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .activation import Expression
from .layouts import canonical, is_tiled, weight_sizes
from .reference import Activations


@dataclass(frozen=True)
class Projection:
    """One packed weight [E, N, K], its bias [E, N] or None, and how its input is quantised."""

    qdata: Tensor
    block_scale: Tensor
    global_scale: Tensor
    bias: Tensor | None
    act: Activations

    @property
    def n(self) -> int:
        return weight_sizes(self.qdata)[1]

    @property
    def k(self) -> int:
        return weight_sizes(self.qdata)[2]

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qdata, self.block_scale, self.global_scale

    @property
    def quantisation(self) -> tuple[Tensor | None, str, str]:
        """The last arguments of an op of the op set."""
        return self.act.scale, self.act.mode, self.act.dialect

    def canonical(self) -> Projection:
        """The same with codes and block scales in the canonical layout."""
        qdata, block_scale = canonical(self.qdata, self.block_scale)
        return replace(self, qdata=qdata, block_scale=block_scale)

    def rows(self, rows: slice) -> Projection:
        """The projection to some of the outputs, as views; the canonical layout alone has any."""
        qdata, block_scale, global_scale = self.qdata, self.block_scale.view(torch.uint8), self.global_scale
        bias = None if self.bias is None else self.bias[:, rows]
        return Projection(qdata[:, rows], block_scale[:, rows], global_scale[:, rows], bias, self.act)

    def of_expert(self, e: int) -> tuple[Tensor, Tensor, Tensor, Activations]:
        """What reference.matmul takes."""
        return self.qdata[e], self.block_scale.view(torch.uint8)[e], self.global_scale[e], self.act.of_expert(e)

    def add_bias(self, y: Tensor, expert: int | Tensor) -> Tensor:
        """y [S, N] plus the bias of one expert, or of an expert for each row, rounded to y's dtype."""
        return y if self.bias is None else (y.float() + self.bias[expert].float()).to(y.dtype)


@dataclass(frozen=True)
class Block:
    """Weights and functions of one layer.

    layout: how up's rows hold gate and up: "concatenated", "interleaved", "separate" (two weights), "plain" (no gate).
    weighted: whether routing weights multiply the "output" or the "input" of the experts.
    out_dtype: of the result, if not x's.
    """

    up: tuple[Projection, ...]
    down: Projection
    activation: Expression
    layout: str
    weighted: str
    out_dtype: torch.dtype | None = None

    @property
    def experts(self) -> int:
        return self.down.qdata.shape[0]

    @property
    def tiled(self) -> bool:
        """Whether a weight is in tiles."""
        return any(is_tiled(p.qdata) for p in (*self.up, self.down))

    def canonical(self) -> Block:
        """The same with all weights in the canonical layout."""
        if not self.tiled:
            return self
        return replace(self, up=tuple(p.canonical() for p in self.up), down=self.down.canonical())

    @property
    def rows_apart(self) -> bool:
        """Whether each slot has a row of its own: multiplied by its weight, or rounded with its expert's scale."""
        return self.weighted == "input" or any(p.act.needs_experts for p in self.up)

    def enter(self, x: Tensor, weights: Tensor) -> Tensor:
        """Rows [S, K] as the up product takes them, with the routing weights [S] of their slots."""
        return (x.float() * weights.float().unsqueeze(-1)).to(x.dtype) if self.weighted == "input" else x

    def split(self, ups: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """(gate or None, up) of the up products [S, N]."""
        if self.layout == "plain":
            return None, ups[0]
        if self.layout == "separate":
            return ups[0], ups[1]
        if self.layout == "interleaved":
            return ups[0][..., 0::2], ups[0][..., 1::2]
        gate, up = ups[0].chunk(2, dim=-1)
        return gate, up

    def join(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        """The inverse of split; without a gate, gate is not looked at."""
        if self.layout == "plain":
            return [up]
        if self.layout == "separate":
            return [gate, up]
        if self.layout == "interleaved":
            return [torch.stack((gate, up), dim=-1).flatten(-2)]
        return [torch.cat((gate, up), dim=-1)]

    def inside(self, ids: Tensor) -> Tensor:
        """Which slots have an expert."""
        return (ids >= 0) & (ids < self.experts)


def moe(x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> Tensor:
    """x [T, K], ids and weights [T, A] -> [T, H] in x's dtype, or in the block's out_dtype."""
    slots = x.new_zeros(ids.numel(), block.down.n)
    for e, slot in reference.rows_by_ids(ids.reshape(-1), block.experts):
        rows = block.enter(x[slot // ids.shape[1]], weights.reshape(-1)[slot])
        ups = [p.add_bias(reference.matmul(rows, *p.of_expert(e)), e) for p in block.up]
        h = block.activation.evaluate(*block.split(ups)).to(x.dtype)
        slots[slot] = block.down.add_bias(reference.matmul(h, *block.down.of_expert(e)), e)
    factor = block.inside(ids).float()
    if block.weighted == "output":
        factor = torch.where(block.inside(ids), weights.float(), 0.0)
    total = (slots.view(*ids.shape, slots.shape[1]).float() * factor.unsqueeze(-1)).sum(dim=1)
    return total.to(block.out_dtype or x.dtype)
