"""Says by which rule a graph quantises activations: evaluated on boundary cases, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from fx_nvfp4.dialects import DIALECTS, E2M1_MAX, E4M3_MAX
from fx_nvfp4.format import BLOCK, fake_quantize

from .activation_worlds import Worlds, around, finite, not_finite
from .boundaries import with_boundaries
from .coords import Coords, unravel
from .nodes import elements, flat_index, shape_of
from .sample import Sampler, Unsupported

Op = Literal["multiply", "divide", "amax"]
Per = Literal["tensor", "row", "expert"]
_JUNK = 7.3  # what other blocks, rows and experts hold: a rule that looks at them gives other numbers
_JUNK_SCALE = 0.37


@dataclass(frozen=True)
class Cut:
    """A stretch of the graph: from x [.., K], and a scale or none, to `out`, as large as x.

    per: one scale for all of x, one for each row, or one for each slice of the first dimension. `computed`: from x
    itself, so that no block overflows.
    """

    x: Node
    out: Node
    scale: Node | None
    per: Per
    computed: bool


@dataclass(frozen=True)
class Rule:
    """out = fake_quantize(x in `dtype`, s) of a dialect, in out's dtype.

    s is the scale (op "multiply"), its reciprocal ("divide"), the scale / 2688 in fp32 ("amax"), or without a scale the
    number `factor`. `signs`: zeros
    have the same signs too; `special`: NaN and infinities too become the same.
    """

    dialect: str
    dtype: torch.dtype
    op: Op
    factor: float
    signs: bool
    special: bool


def rule_of(
    cut: Cut, factors: tuple[float, ...], thresholds: tuple[float, ...], constants: Mapping[Node, Tensor]
) -> Rule | None:
    """The rule that gives the same bits as the graph in every boundary case, or None.

    Args:
        factors: without a scale, the numbers that may stand for one.
        thresholds: numbers that the graph compares something with.
        constants: known values of small tables.
    """
    ops: tuple[Op, ...] = ("divide", "multiply") if cut.scale is not None else ("multiply",)
    with unset_fake_temporarily():
        found = (_matching(cut, op, factor, thresholds, constants) for op in ops for factor in factors)
        return next((rule for rule in found if rule is not None), None)


def _matching(
    cut: Cut, op: Op, factor: float, thresholds: tuple[float, ...], constants: Mapping[Node, Tensor]
) -> Rule | None:
    try:
        x, exact, got, at = _evaluate(cut, _finite(cut, factor) + _around(cut, factor, thresholds), op, constants)
        odd = _evaluate(cut, _not_finite(cut, factor), op, constants)
    except (Unsupported, RuntimeError):
        return None
    found = []
    for dialect, dtype in _candidates(cut):
        want = _values(cut, x, exact, dialect, dtype, at)
        if _equal(got, want, signs=False):
            special = _equal(odd[2], _values(cut, odd[0], odd[1], dialect, dtype, odd[3]), signs=False)
            found.append(Rule(dialect, dtype, op, factor, _equal(got, want, signs=True), special))
    return max(found, key=lambda r: (r.special, r.signs), default=None)


def _candidates(cut: Cut) -> Iterator[tuple[str, torch.dtype]]:
    own = cut.x.meta["val"].dtype
    for dtype in dict.fromkeys((own, torch.float32)):
        for dialect in DIALECTS:
            yield dialect, dtype


def _finite(cut: Cut, factor: float) -> Worlds:
    worlds = finite()
    if cut.scale is not None:
        return worlds
    one = worlds.where(worlds.scales == 1.0)
    return Worlds(one.blocks * factor, one.scales * factor)


def _around(cut: Cut, factor: float, thresholds: tuple[float, ...]) -> Worlds:
    worlds = around(thresholds)
    return worlds if cut.scale is not None else Worlds(worlds.blocks, torch.full_like(worlds.scales, factor))


def _not_finite(cut: Cut, factor: float) -> Worlds:
    worlds = not_finite()
    if cut.computed:  # then the scale is not finite either
        worlds = worlds.where(worlds.blocks.isfinite().all(1))
    return worlds if cut.scale is not None else Worlds(worlds.blocks, torch.full_like(worlds.scales, factor))


def _evaluate(
    cut: Cut, worlds: Worlds, op: Op, constants: Mapping[Node, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks [B, 16] in x's dtype, multipliers [B] (float64), and what the graph made of elements [S] at [S, 2].

    An element is (block, position in it). Every position of every block of a row is looked at, in some row; and both
    sides of each edge of the graph, as where it leaves out a row or a column.
    """
    shape, generator = shape_of(cut.x), torch.Generator().manual_seed(19)
    blocks, rows = shape[-1] // BLOCK, elements(cut.x) // shape[-1]
    x, scale, exact = _as_given(cut, worlds.repeated(-(-blocks // max(1, len(worlds.blocks)))), op)
    if cut.computed:
        fits = x.double().abs().amax(1) <= E2M1_MAX * E4M3_MAX * exact
        x, scale, exact = x[fits], scale[fits], exact[fits]
    if not len(x):
        return x, exact, torch.zeros(0), torch.zeros(0, 2, dtype=torch.int64)
    every = torch.arange(len(x)).repeat_interleave(BLOCK)
    step = 7919 if rows % 7919 else 7907
    flat = (every * step % rows * blocks + every % blocks) * BLOCK + torch.arange(BLOCK).repeat(len(x))
    index = torch.stack(unravel(flat, shape), 1)
    one = torch.zeros(1, dtype=torch.int64)
    search = lambda: Sampler(_leaf(cut, x, scale, constants, one, one))  # noqa: E731
    edges = with_boundaries(cut.out, search, index[::BLOCK], generator)[len(x) :]
    index = torch.cat((index, edges))
    flat = flat_index(cut.x, index)
    block = torch.cat((every, torch.arange(len(edges)) % len(x)))
    out = Sampler(_leaf(cut, x, scale, constants, block, flat)).evaluate(cut.out, index)
    return x, exact, out, torch.stack((block, flat % BLOCK), 1)


def _leaf(
    cut: Cut, x: Tensor, scale: Tensor, constants: Mapping[Node, Tensor], block: Tensor, flat: Tensor
) -> Callable[[Node, Coords], Tensor | None]:
    """Values of leaves, where sample i looks at element flat[i], whose block of 16 holds x[block[i]]; the rest is junk.

    Of one element alone, all samples are about it.
    """
    shape = shape_of(cut.x)
    row = flat // shape[-1]
    owner = row // (elements(cut.x) // shape[-1] // shape[0]) if cut.per == "expert" else row * (cut.per == "row")

    def leaf(node: Node, at: Coords) -> Tensor | None:
        sample = at.sample if len(flat) > 1 else torch.zeros_like(at.sample)
        if node is cut.x:
            place = flat_index(node, at.index)
            mine = place // BLOCK == flat[sample] // BLOCK
            return torch.where(mine, x[block[sample], place % BLOCK], _JUNK).to(x.dtype)
        if node is cut.scale:
            mine = flat_index(node, at.index) == owner[sample]
            return torch.where(mine, scale[block[sample]], _JUNK_SCALE).to(scale.dtype)
        if node in constants:
            return constants[node].reshape(-1)[flat_index(node, at.index)]
        return None

    return leaf


def _as_given(cut: Cut, worlds: Worlds, op: Op) -> tuple[Tensor, Tensor, Tensor]:
    """x in its dtype, the scale in its own, and the multiplier that it stands for, to which ties in x are relative."""
    dtype = cut.x.meta["val"].dtype
    if cut.scale is None:
        return worlds.blocks.to(dtype), worlds.scales, worlds.scales
    scale = (1 / worlds.scales if op == "divide" else worlds.scales).to(cut.scale.meta["val"].dtype)
    exact = 1 / scale.double() if op == "divide" else scale.double()
    return (worlds.blocks * (exact / worlds.scales)[:, None]).to(dtype), scale, exact


def _values(cut: Cut, x: Tensor, exact: Tensor, dialect: str, dtype: torch.dtype, at: Tensor) -> Tensor:
    """What a rule makes of elements at [S, 2], (block, position in it)."""
    values = fake_quantize(x.to(dtype), exact[:, None], dialect).to(cut.out.meta["val"].dtype)
    return values[at[:, 0], at[:, 1]]


def _equal(a: Tensor, b: Tensor, signs: bool) -> bool:
    same = (a == b) | (a.isnan() & b.isnan())
    return bool((same & (torch.signbit(a) == torch.signbit(b)) if signs else same).all())
