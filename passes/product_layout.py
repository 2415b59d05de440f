"""How a product uses the experts and rows of its weight, and hence which op computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .canonical import RowDims
from .emitter import CannotRewriteError, shape
from .experts import Site
from .found import Axis

Kind = Literal["linear", "side", "crossed", "batched", "folded", "grouped", "indexed"]


@dataclass(frozen=True)
class Layout:
    """How the operand's dimensions are made of the weight's experts [E] and rows [N]; n is the operand's one of rows.

    linear: one weight, of all experts if the operand has batches.
    side: the rows of all experts side by side, n = e * N + row.
    crossed: the same, rows first, n = row * E + e.
    batched: batch b is expert b.
    folded: batch b is expert b % E, or b // (B / E).
    grouped: rows of x grouped by expert.
    indexed: batch b, or slot n // N of batch b, is the expert that ids tell.
    """

    kind: Kind
    expert: Axis | None
    row: Axis

    @staticmethod
    def of(site: Site) -> Layout:
        """Raises CannotRewriteError if no op computes the product."""
        _check_operands(site)
        rows = RowDims.of(site.weight, site.product.offs is not None)
        return Layout(_kind(site, rows.expert, rows.row), rows.expert, rows.row)


def _kind(site: Site, expert: Axis | None, row: Axis) -> Kind:
    rank = len(shape(site.weight.operand))
    n_dim = 2 * rank - 3 - site.weight.k_dim
    by_row = row.kind in ("dim", "affine") and row.dim == n_dim
    by_batch = rank == 3 and expert is not None and expert.dim == 0
    if site.product.offs is not None:
        if by_row and by_batch and expert is not None and expert.kind == "dim":
            return "grouped"
    elif expert is None:
        if by_row:
            return "linear"
    elif expert.kind == "index":
        if expert.dims() <= ({0, n_dim} if rank == 3 else {n_dim}) and (by_row or _in_slots(row, n_dim)):
            return "indexed"
    elif by_row and by_batch:
        if expert.kind in ("dim", "affine"):
            return "batched"
        if expert.kind == "quotient" or (expert.kind == "remainder" and expert.value is None):
            return "folded"
    elif _in_slots(row, n_dim) and (expert.kind, expert.dim, expert.size) == ("quotient", n_dim, row.size):
        return "side"
    elif (row.kind, row.dim, row.size) == ("quotient", n_dim, expert.size) and _in_slots(expert, n_dim, whole=True):
        return "crossed"
    raise CannotRewriteError(
        f"experts are addressed by {text(expert)} and rows by {text(row)} in {site.product.node.target}",
        "linear, batched, grouped and indexed products of experts are served",
    )


def _in_slots(axis: Axis, n_dim: int, whole: bool = False) -> bool:
    return axis.kind == "remainder" and axis.dim == n_dim and (axis.value is None or not whole)


def _check_operands(site: Site) -> None:
    x, y = site.x.meta["val"], site.product.node.meta["val"]
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or y.dtype != x.dtype:
        raise CannotRewriteError(f"activations are {x.dtype}", "use float32, bfloat16 or float16 for both operands")
    if site.product.offs is not None and (x.dim() != 2 or len(shape(site.weight.operand)) != 3):
        raise CannotRewriteError("a grouped product whose groups lie along K or N", "group the rows of x")


def text(axis: Axis | None) -> str:
    """An axis in words, for reasons."""
    if axis is None:
        return "nothing"
    if axis.kind == "const":
        return f"place {axis.value}"
    if axis.kind == "pair":
        return f"{text(axis.parts[0])} and {text(axis.parts[1])} flattened"
    if axis.kind == "index":
        return f"{axis.node} at {', '.join(map(text, axis.index_axes)) or 'one place'}"
    forms = {"dim": "", "affine": f" * {axis.size} + {axis.value}", "quotient": f" // {axis.size}"}
    part = f" * {axis.step} + {axis.value}" if axis.value is not None else ""
    return f"dim {axis.dim}" + forms.get(axis.kind, f" % {axis.size}{part}")
