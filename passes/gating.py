"""Which rows of the up weights are gate and which are up, and what the activation makes of them.

Before:  grouped(x, qdata [E, 2 I, K/2]) -> split -> silu of one half, times the other
After:   layout "concatenated", activation "silu(g) * u", weight qdata
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fx_nvfp4.activation import describe, parse, simplify

from .coords import Coords
from .expert_products import ExpertProduct, Parts, own_parts
from .expression import Operand, Traced
from .found import Refused
from .nodes import elements, flat_index, shape_of, weight_shape

# Rounding errors of an activation in units of the last place, which its steps in bfloat16 add up.
_TOLERANCE = 16


@dataclass(frozen=True)
class Up:
    """An up weight: parts [E, N, ..] (or [N, ..] of one expert that is by itself), bias, and the product it is of."""

    parts: Parts
    bias: Node | None
    product: ExpertProduct


@dataclass(frozen=True)
class Gating:
    """activation over g and u; layout as the moe op names it; one up weight, or gate and up."""

    activation: str
    layout: str
    ups: tuple[Up, ...]

    def same_as(self, other: Gating) -> bool:
        return (self.activation, self.layout) == (other.activation, other.layout)


@dataclass(frozen=True)
class Half:
    """An operand of the activation: rows of an up weight, in order.

    place: where row i of I lies among the weight's rows: "same" (i), "second" (I + i), "even" (2 i), "odd" (2 i + 1).
    values: what the samples read of it.
    """

    product: ExpertProduct
    place: str
    bias: Node | None
    values: Tensor

    @property
    def whole(self) -> int:
        """Rows of the weight it is of."""
        return weight_shape(self.product.parts[0])[-2]


def half(
    operand: Operand,
    product: ExpertProduct,
    expert: Tensor,
    feature: Tensor,
    column: Tensor,
    width: int,
    values: Tensor,
) -> Half:
    """What an operand is, read at `expert` and `feature` of a product for elements `column` of rows of `width`."""
    row = feature + product.first
    places = {"same": column, "second": column + width, "even": 2 * column, "odd": 2 * column + 1}
    place = next((name for name, wanted in places.items() if torch.equal(row, wanted)), None)
    if place is None:
        raise Refused(
            f"the activation takes rows of {product.node.name} out of order",
            "let gate and up be the halves of its rows, or every other row",
        )
    return Half(product, place, _bias(operand, product, expert, feature), values)


def _bias(operand: Operand, product: ExpertProduct, expert: Tensor, feature: Tensor) -> Node | None:
    """The parameter that holds the bias, checked to be read at the row's expert and feature."""
    bias = operand.bias
    if bias is None:
        return None
    assert isinstance(operand.bias_at, Coords)
    read, size, whole = flat_index(bias, operand.bias_at.index), elements(bias), weight_shape(product.parts[0])[-2]
    experts = max(product.experts, 1)
    if product.experts == 0:
        expert = torch.zeros_like(expert)
    for rows, first in ((whole, product.first), (product.rows, 0)):
        if size == experts * rows and torch.equal(read, expert * rows + feature + first):
            return bias
    raise Refused(
        f"{bias.name} {list(shape_of(bias))} is added to the up product, but is no bias of its rows",
        "add [experts, rows] by the expert and the row of each product",
    )


def read_gating(traced: Traced, halves: Sequence[Half], width: int, got: Tensor) -> Gating:
    """What the activation of `width` features is, given the operands it has and the values that it `got`."""
    layout, order = _layout(halves, width)
    text = _named(traced, order)
    if len(order) == 2 and describe(text) == text and describe(swapped := _named(traced, order[::-1])) != swapped:
        if layout == "separate":
            order, text = order[::-1], swapped
        else:  # the first rows are called the gate, whatever they do
            text = re.sub(r"\b[gu]\b", lambda name: "u" if name[0] == "g" else "g", swapped)
    ordered = [halves[i] for i in order]
    expression = parse(text)
    gate = None if layout == "plain" else ordered[0].values
    expected = expression.evaluate(gate, ordered[-1].values)
    # What cancels in 1 + erf(x) is absolute in x, and grows with what it is multiplied by.
    size = (1 + ordered[0].values.float().abs()) * (1 + ordered[-1].values.float().abs())
    limit = torch.finfo(got.dtype).eps * _TOLERANCE * torch.maximum(size, expected.abs())
    if not bool(((got.float() - expected).abs() <= limit).all()):
        raise Refused(
            f"the activation is not {text}, as which it was read",
            "spell it by pointwise ops, the same for all elements",
        )
    return Gating(text, layout, _weights(ordered, layout))


def _named(traced: Traced, order: Sequence[int]) -> str:
    names = {order[0]: "u"} if len(order) == 1 else {order[0]: "g", order[1]: "u"}
    try:
        return simplify(traced.text(names))
    except ValueError as error:
        raise Refused(f"the activation cannot be one of the op's: {error}", "use a pointwise function") from error


def _layout(halves: Sequence[Half], width: int) -> tuple[str, tuple[int, ...]]:
    """(layout, numbers of gate and up, or of up alone)."""
    places = [h.place for h in halves]
    if len(halves) == 1 and places == ["same"] and halves[0].whole == width:
        return "plain", (0,)
    if len(halves) == 2:
        shared = _operands(halves[0]) == _operands(halves[1])
        for layout, pair in (("concatenated", ["same", "second"]), ("interleaved", ["even", "odd"])):
            if shared and halves[0].whole == 2 * width and sorted(places) == sorted(pair):
                return layout, tuple(places.index(p) for p in pair)
        if all(h.product.rows == width for h in halves) and halves[0].product is not halves[1].product:
            return "separate", (0, 1)
    used = ", ".join(f"{h.product.node.name} ({h.place} of {h.whole} rows)" for h in halves)
    raise Refused(f"the activation of {width} features takes {used or 'no product'}", "use all rows as gate or up")


def _operands(half: Half) -> tuple[object, ...]:
    """What the halves of one fused weight share."""
    p = half.product
    return *p.parts, p.act_scale, p.activations, p.dialect, half.bias


def _weights(halves: Sequence[Half], layout: str) -> tuple[Up, ...]:
    if layout != "separate":
        return (Up(halves[0].product.parts, halves[0].bias, halves[0].product),)
    # Of a fused weight whose halves are two products, each op has its own part.
    return tuple(
        Up(h.product.parts if h.whole == h.product.rows else own_parts(h.product), h.bias, h.product) for h in halves
    )
