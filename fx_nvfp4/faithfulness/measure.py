"""Errors of each way against the exact sum."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .arithmetic import dequantized, exact, reordered
from .cases import Case

SCHEMA = 1  # of Study.to_dict(); a change that breaks readers counts it up
OURS, FLOOR, DEQUANTIZED, MERGED, WEIGHT_ONLY = (
    "ours",
    "fp32, random orders",
    "dequantised to bf16",
    "merged scales",
    "W4A16",
)
_ORDERS = 5

Output = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Row:
    """One way to compute one case.

    Attributes:
        case, way: what, and how.
        fp32: error with float32 activations in and out: the median over rows of |y - exact| / |exact| (2-norms).
        fp32_worst: the largest of the rows.
        bf16: the median error with bfloat16 activations in and out; correct rounding alone costs some 1.7e-3.
        bf16_equal: share of the bfloat16 results that are the exact ones, rounded once.
    """

    case: str
    way: str
    fp32: float
    fp32_worst: float
    bf16: float
    bf16_equal: float


@dataclass(frozen=True)
class Study:
    """All rows, case by case, and where they were measured."""

    rows: list[Row]
    device: str
    torch: str

    def row(self, case: str, way: str) -> Row:
        """KeyError if that way was not measured for the case."""
        found = [r for r in self.rows if (r.case, r.way) == (case, way)]
        if not found:
            raise KeyError(f"{case}: {way}")
        return found[0]

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def to_floor(self, row: Row) -> float:
        """A row's fp32 error as a multiple of that of an fp32 sum in random order."""
        return row.fp32 / self.row(row.case, FLOOR).fp32

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def measure(cases: Iterable[Case], device: torch.device | str = "cpu") -> Study:
    """Compute every case in every way; cases live on that device.

    The random orders are five; the row shown is that of the median error.
    """
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    return Study([row for case in cases for row in _rows(case)], name, torch.__version__)


def _rows(case: Case) -> Iterator[Row]:
    truth = {dtype: case.by(exact, dtype, torch.float64) for dtype in (torch.float32, torch.bfloat16)}
    for way, output in _ways(case, truth[torch.float32]):
        y = {dtype: output(dtype) for dtype in truth}
        fp32, bf16 = (_errors(y[dtype], truth[dtype]) for dtype in truth)
        equal = (y[torch.bfloat16] == truth[torch.bfloat16].bfloat16()).float().mean().item()
        yield Row(case.name, way, fp32.median().item(), fp32.max().item(), bf16.median().item(), equal)


def _ways(case: Case, truth: Tensor) -> Iterator[tuple[str, Output]]:
    yield OURS, case.ours
    yield FLOOR, _median_order(case, truth)
    yield DEQUANTIZED, lambda dtype: case.by(dequantized, dtype, torch.float32).to(dtype)
    for way, other in ((MERGED, case.merged()), (WEIGHT_ONLY, case.weight_only())):
        if other is not None:
            yield way, other.ours


def _median_order(case: Case, truth: Tensor) -> Output:
    outputs = [case.by(reordered(seed), torch.float32, torch.float32) for seed in range(_ORDERS)]
    errors = [_errors(y, truth).median().item() for y in outputs]
    seed = errors.index(statistics.median(errors))

    def output(dtype: torch.dtype) -> Tensor:
        return outputs[seed] if dtype == torch.float32 else case.by(reordered(seed), dtype, torch.float32).to(dtype)

    return output


def _errors(y: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each row; rows that are exactly zero have none."""
    lost, size = (y.double() - truth).norm(dim=-1), truth.norm(dim=-1)
    return lost[size > 0] / size[size > 0]
