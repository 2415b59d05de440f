"""What is measured: a product or a whole block, with its weights, scales and activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import parse
from ..block import Block, Projection
from ..format import BLOCK, TWO_LEVEL_MAX
from ..reference import Activations
from ..tensor import NVFP4Weight
from . import arithmetic
from .arithmetic import Product

SWIGLU = parse("silu(g) * u")
APART = 8.0  # by how much scales of the "distinct" situation differ
WIDE = 12.0  # over how many powers of two the blocks of the "wide" situation spread


class Case(Protocol):
    """A product or block that can be computed in several ways."""

    @property
    def name(self) -> str:
        """What and in which situation."""

    def ours(self, dtype: torch.dtype) -> Tensor:
        """The result of our op for activations in dtype."""

    def by(self, product: Product, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        """The result by another product, before it is rounded to dtype."""

    def merged(self) -> Case | None:
        """The same with one scale where an engine keeps only one; None where there is nothing to merge."""

    def weight_only(self) -> Case | None:
        """The same without rounding of activations; None where they are not rounded anyway."""


@dataclass(frozen=True)
class LinearCase:
    """Rows x [M, K], holding bf16 numbers, times one weight [N, K]."""

    name: str
    x: Tensor
    weight: Projection

    def ours(self, dtype: torch.dtype) -> Tensor:
        return torch.ops.fx_nvfp4.linear(self.x.to(dtype), *self.weight.weight, *self.weight.quantisation)

    def by(self, product: Product, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        return product(self.x.to(dtype), self.weight).to(wide)

    def merged(self) -> LinearCase | None:
        return replace(self, weight=_merge(self.weight)) if _scales_differ(self.weight) else None

    def weight_only(self) -> LinearCase | None:
        return None if self.weight.act.mode == "none" else replace(self, weight=_unrounded(self.weight))


@dataclass(frozen=True)
class MoECase:
    """Rows x [T, K], holding bf16 numbers, through the SwiGLU experts of ids [T, A], weighted by weights [T, A]."""

    name: str
    x: Tensor
    ids: Tensor
    weights: Tensor
    block: Block

    def ours(self, dtype: torch.dtype) -> Tensor:
        (up,), down = self.block.up, self.block.down
        return torch.ops.fx_nvfp4.moe(
            self.x.to(dtype),
            self.ids,
            self.weights,
            *([part] for part in up.weight),
            *down.weight,
            self.block.activation.text,
            self.block.layout,
            up_act_scale=None if up.act.scale is None else [up.act.scale],
            down_act_scale=down.act.scale,
            up_activations=up.act.mode,
            down_activations=down.act.mode,
            dialect=up.act.dialect,
        )

    def by(self, product: Product, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
        return arithmetic.moe(product, self.x.to(dtype), self.ids, self.weights, self.block, dtype, wide)

    def merged(self) -> MoECase | None:
        (up,), down = self.block.up, self.block.down
        if not (_scales_differ(up) or _scales_differ(down)):
            return None
        return replace(self, block=replace(self.block, up=(_merge(up),), down=_merge(down)))

    def weight_only(self) -> MoECase | None:
        (up,), down = self.block.up, self.block.down
        if up.act.mode == down.act.mode == "none":
            return None
        return replace(self, block=replace(self.block, up=(_unrounded(up),), down=_unrounded(down)))


def projection(weight: NVFP4Weight) -> Projection:
    """A packed weight [N, K] or [E, N, K] as the ops take it."""
    act = Activations(weight.activations, weight.act_scale, weight.dialect)
    return Projection(weight.qdata, weight.block_scale, weight.global_scale, None, act)


@dataclass(frozen=True)
class Situation:
    """How random weights and activations are drawn.

    apart: up's weights are so many times larger than gate's, with a global scale of their own, and the activation
        scales of the experts spread over that factor.
    wide: blocks of 16 are made smaller by up to 2^wide, so that sums need more bits than fp32 has.
    """

    name: str
    apart: float = 1.0
    wide: float = 0.0


SITUATIONS = (
    Situation("equal scales"),
    Situation("distinct scales", apart=APART),
    Situation("wide blocks", wide=WIDE),
)


def random_cases(
    tokens: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    hidden: int = 1024,
    inner: int = 512,
    experts: int = 8,
    top: int = 2,
) -> list[Case]:
    """W4A4 with normal weights and activations: gate and up of one expert as a product, and the block around them.

    In each situation: one global scale for gate and up, and one activation scale for all experts ("equal"); those of
    up and of the experts up to 8 times larger ("distinct"); equal ones, and blocks of many magnitudes ("wide").
    """
    draw = Draw(torch.Generator().manual_seed(seed))
    x, routing = draw.normal(tokens, hidden), draw.routing(tokens, experts, top)
    cases: list[Case] = []
    for situation in SITUATIONS:
        rows = draw.blocks(x, situation.wide).bfloat16().float()
        up, down = draw.experts(rows, inner, experts, situation)
        block = Block((projection(up.to(device)),), projection(down.to(device)), SWIGLU, "concatenated", "output")
        rows, ids, weights = (t.to(device) for t in (rows, *routing))
        cases.append(LinearCase(f"linear, {situation.name}", rows, arithmetic.of_expert(block.up[0], 0)))
        cases.append(MoECase(f"MoE block, {situation.name}", rows, ids, weights, block))
    return cases


@dataclass(frozen=True)
class Draw:
    """Random tensors on the CPU, so that every device measures the same numbers."""

    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def routing(self, tokens: int, experts: int, top: int) -> tuple[Tensor, Tensor]:
        """(ids, weights) [T, A]; no token chooses an expert twice."""
        ids = torch.rand(tokens, experts, generator=self.generator).topk(top).indices
        return ids, torch.rand(tokens, top, generator=self.generator).softmax(dim=-1)

    def blocks(self, t: Tensor, wide: float) -> Tensor:
        """t with each block of 16 made smaller by a factor of its own between 1 and 2^wide."""
        factor = torch.exp2(-wide * torch.rand(*t.shape[:-1], t.shape[-1] // BLOCK, 1, generator=self.generator))
        return (t.unflatten(-1, (-1, BLOCK)) * factor).flatten(-2)

    def experts(self, x: Tensor, inner: int, count: int, situation: Situation) -> tuple[NVFP4Weight, NVFP4Weight]:
        """Gate with up, and down, calibrated on rows x [T, K] as if each expert saw all of them."""
        hidden, apart = x.shape[1], situation.apart
        gate, up = (self.blocks(self.normal(count, inner, hidden) / hidden**0.5, situation.wide) for _ in range(2))
        down = self.blocks(self.normal(count, hidden, inner) / inner**0.5, situation.wide)
        up = up * apart
        h = F.silu(x @ gate.mT) * (x @ up.mT)
        spread = torch.logspace(0, 1, count, apart, dtype=torch.float64)  # 1 .. apart
        both = torch.cat((gate, up), dim=1)
        return _packed(both, x.abs().amax() * spread, halves=apart != 1), _packed(down, h.abs().amax() * spread)


def _packed(weight: Tensor, act_amax: Tensor, halves: bool = False) -> NVFP4Weight:
    """W4A4 experts [E, N, K], with a global scale for each weight or each half of its rows."""
    parts = weight.chunk(2 if halves else 1, dim=1)
    scales = [p.abs().amax(dim=(1, 2), keepdim=True).squeeze(-1).expand(p.shape[:2]) / TWO_LEVEL_MAX for p in parts]
    return NVFP4Weight.from_dense(weight, "static", act_amax / TWO_LEVEL_MAX, global_scale=torch.cat(scales, dim=1))


def _scales_differ(p: Projection) -> bool:
    several = p.act.scale is not None and bool((p.act.scale != p.act.scale.max()).any())
    return several or bool((p.global_scale != p.global_scale[..., :1]).any())


def _merge(p: Projection) -> Projection:
    """One global scale a weight, that of its first row (the gate's); the largest of the experts' activation scales."""
    scale = None if p.act.scale is None else p.act.scale.max()
    global_scale = p.global_scale[..., :1].expand_as(p.global_scale).contiguous()
    return replace(p, global_scale=global_scale, act=replace(p.act, scale=scale))


def _unrounded(p: Projection) -> Projection:
    return replace(p, act=replace(p.act, mode="none", scale=None))
