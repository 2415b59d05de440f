"""The fx_nvfp4 ops of a graph as products of experts: whose weight meets which row.

Before:  y = fx_nvfp4.linear(x, select(qdata, 0, 3), select(block_scale, 0, 3), select(global_scale, 0, 3))
After:   expert 3 of the weight (qdata, block_scale, global_scale), for every row of x
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .nodes import arguments, is_tensor, shape_of, weight_shape

aten = torch.ops.aten
nvfp4 = torch.ops.fx_nvfp4

Parts = tuple[Node, Node, Node]  # qdata, block_scale, global_scale
_BYTES = (torch.uint8, torch.float8_e4m3fn)  # what the op takes for block scales; codes in other dtypes keep their view
KINDS = {getattr(nvfp4, name).default: name for name in ("linear", "batched", "indexed", "grouped")}


@dataclass(frozen=True)
class ExpertProduct:
    """One op as a product of rows of x with weights of experts.

    kind: the op's name, or "merged" for a linear on all experts' rows side by side.
    parts: the weight, [E, N, ..] where the op or what its operands are selected from knows experts, else [N, ..].
    expert: the one expert of a linear on one of several.
    rows: output features of one expert, from row `first` of the weight on.
    routing: ids or offs.
    act_scale: of all experts.
    """

    node: Node
    kind: str
    x: Node
    parts: Parts
    expert: int | None
    first: int
    rows: int
    routing: Node | None
    act_scale: Node | None
    activations: str
    dialect: str

    @property
    def experts(self) -> int:
        """Number of experts, 0 where the weight is one by itself."""
        *experts, _, _ = weight_shape(self.parts[0])
        return experts[0] if experts else 0

    @property
    def k(self) -> int:
        return shape_of(self.x)[-1]

    @property
    def inputs(self) -> list[Node]:
        """What it takes but the weight: x, and ids or offs."""
        return [self.x] if self.routing is None else [self.x, self.routing]

    def locate(self, index: Tensor, table: Callable[[Node], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(row of x counted over all of its leading dims, expert or -1 for none, output feature) of result elements.

        Args:
            index: [S, rank] coordinates of the op's result.
            table: values of ids or offs.
        """
        row = torch.zeros(len(index), dtype=torch.int64)
        for d, size in enumerate(shape_of(self.x)[:-1]):
            row = row * size + index[:, d]
        feature = index[:, -1]
        if self.kind == "merged":
            return row, feature // self.rows, feature % self.rows
        return row, self.experts_of(row, table), feature

    def experts_of(self, row: Tensor, table: Callable[[Node], Tensor]) -> Tensor:
        """The expert, or -1, that each row of x meets; not for "merged", where all do."""
        if self.kind == "batched":
            return row // shape_of(self.x)[1]
        if self.kind == "indexed":
            ids = table(self.routing)[row].to(torch.int64)  # type: ignore[arg-type]
            return torch.where((ids >= 0) & (ids < self.experts), ids, -1)
        if self.kind == "grouped":
            offs = table(self.routing).to(torch.int64).cummax(0).values  # type: ignore[arg-type]
            expert = torch.searchsorted(offs, row, right=True)
            return torch.where(expert < self.experts, expert, -1)
        return torch.full_like(row, self.expert if self.expert is not None else 0)


def expert_product(node: Node) -> ExpertProduct | None:
    """What an op node multiplies; None for any other node."""
    kind = KINDS.get(node.target)
    if kind is None:
        return None
    a = arguments(node)
    routing = {"indexed": getattr(a, "ids", None), "grouped": getattr(a, "offs", None)}.get(kind)
    parts, act_scale, expert, first = (a.qdata, a.block_scale, a.global_scale), a.act_scale, None, 0
    *lead, rows, _ = weight_shape(a.qdata)
    if sliced := _alike([_sliced(part, len(lead), rows) for part in parts]):
        parts, first = sliced
    if kind == "linear" and (merged := _alike([_merged(part) for part in parts])):
        (parts, (_, rows)), kind = merged, "merged"
    elif kind == "linear" and (selected := _alike([_selected(part) for part in parts])):
        scale = _selected(act_scale) or (act_scale, selected[1])  # one for all experts, if it is not selected
        if scale[1] == selected[1]:
            (parts, expert), act_scale = selected, scale[0]
    return ExpertProduct(node, kind, a.x, parts, expert, first, rows, routing, act_scale, a.activations, a.dialect)


def _alike(found: Sequence[tuple[Node, Any] | None]) -> tuple[Parts, Any] | None:
    """The wholes that parts are taken from, if all are taken alike, and how."""
    wholes, ways = [f[0] for f in found if f], [f[1] for f in found if f]
    same = len(ways) == len(found) and all(way == ways[0] for way in ways)
    return (tuple(wholes), ways[0]) if same else None  # type: ignore[return-value]


def own_parts(product: ExpertProduct) -> Parts:
    """The parts that the op itself takes."""
    a = arguments(product.node)
    return a.qdata, a.block_scale, a.global_scale


def _bare(part: Any) -> Any:
    """A part without the views that tell float8_e4m3fn from its bytes."""
    while is_tensor(part) and part.target is aten.view.dtype and part.args[0].meta["val"].dtype in _BYTES:
        part = part.args[0]
    return part


def _sliced(part: Node, dim: int, rows: int) -> tuple[Node, int] | None:
    """(what a part with so many rows along dim is some of the rows of, first of these)."""
    part = _bare(part)
    if part.target is not aten.slice.Tensor:
        return None
    a, shape = arguments(part), shape_of(part)
    start, each = a.start or 0, rows // max(shape[dim], 1)  # a tile has several
    fits = a.dim % len(shape) == dim and a.step == 1 and isinstance(start, int) and start >= 0
    return (_bare(a.self), start * each) if fits else None


def _selected(part: Any) -> tuple[Node, int] | None:
    """(what a part is one expert's of, the expert)."""
    part = _bare(part)
    if not is_tensor(part) or part.target is not aten.select.int:
        return None
    a, whole = arguments(part), shape_of(arguments(part).self)
    fits = a.dim == 0 and isinstance(a.index, int) and len(whole) == len(shape_of(part)) + 1
    return (_bare(a.self), a.index % whole[0]) if fits else None


def _merged(part: Node) -> tuple[Node, tuple[int, ...]] | None:
    """([E, N, ..], (E, N)) of a part that is a view [E * N, ..] of it."""
    part = _bare(part)
    if part.target not in (aten.view.default, aten.reshape.default):
        return None
    whole: Node = part.args[0]  # type: ignore[assignment]
    shape = shape_of(whole)
    fits = len(shape) == len(shape_of(part)) + 1 and (math.prod(shape[:2]), *shape[2:]) == shape_of(part)
    return (_bare(whole), shape[:2]) if fits else None
