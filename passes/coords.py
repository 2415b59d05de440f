"""Coordinates of samples, and the places where they part ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Coords:
    """Coordinates of samples in one tensor: `index` [S, rank], and the number of the sample each belongs to, [S].

    `via` holds the graph's leaves whose values chose these coordinates: empty unless a gather was passed.
    """

    index: Tensor
    sample: Tensor
    via: frozenset[Node] = frozenset()

    def moved(self, index: Tensor) -> Coords:
        return replace(self, index=index)

    def column(self, dim: int, values: Tensor) -> Coords:
        index = self.index.clone()
        index[:, dim] = values
        return replace(self, index=index)

    def inserted(self, dim: int, value: int | Tensor) -> Coords:
        left, right = self.index[:, :dim], self.index[:, dim:]
        column = torch.as_tensor(value).expand(len(left))[:, None]
        return replace(self, index=torch.cat((left, column, right), 1))

    def without(self, dim: int) -> Coords:
        return replace(self, index=torch.cat((self.index[:, :dim], self.index[:, dim + 1 :]), 1))

    def take(self, mask: Tensor) -> Coords:
        return replace(self, index=self.index[mask], sample=self.sample[mask])

    def repeated(self, times: int, index: Tensor) -> Coords:
        return replace(self, index=index, sample=self.sample.repeat_interleave(times))


@dataclass
class Edge:
    """Where evaluation changes course: samples whose `column` is below `bound` take another way than the rest."""

    bound: int
    column: list[Tensor] = field(default_factory=list)
    sample: list[Tensor] = field(default_factory=list)


def stack_columns(columns: Sequence[Tensor], at: Coords) -> Tensor:
    """The index [S, rank] that columns [S] make up; `at` gives S where the rank is 0."""
    return torch.stack(list(columns), 1) if columns else at.index[:, :0]


def unravel(flat: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Coordinates, a column per dimension of `shape`, of elements numbered in row-major order."""
    columns = []
    for size in reversed(shape[1:]):
        columns.append(flat % size)
        flat = flat // size
    return [*([flat] if shape else []), *reversed(columns)]
