"""Plain PyTorch bodies of the ops: the truth in tests, and what runs on a CPU.

Arithmetic is the same everywhere: code * block_scale on both sides (exact), products summed in fp32, and the
global scales of weight row and activation multiplied into the fp32 sum once. An expert that no row chose is
never dequantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import format as nvfp4
from .format import TWO_LEVEL_MAX, code_times_scale, quantize
from .layouts import canonical, weight_sizes


@dataclass(frozen=True)
class Activations:
    """How the left operand is quantised before the product.

    mode: "none" (x enters as it is), "static" (with ``scale``, float64: one for all, or one per expert) or
    "dynamic" (amax / 2688 of the rows that one weight multiplies in this call).
    """

    mode: str
    scale: Tensor | None
    dialect: str

    def of_expert(self, expert: int) -> Activations:
        """The same with the scale of one expert."""
        if self.scale is None or self.scale.dim() == 0:
            return self
        return Activations(self.mode, self.scale[expert], self.dialect)

    @property
    def needs_experts(self) -> bool:
        """Whether rows of different experts are rounded differently."""
        return self.mode == "dynamic" or (self.mode == "static" and self.scale is not None and self.scale.dim() > 0)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(fp32 operand, fp32 multiplier of the sum or None) for rows x [M, K]."""
        if self.mode == "none":
            return x.float(), None
        scale = self.scale_of_groups(x, None, 1)
        return code_times_scale(*quantize(x, scale, self.dialect)), scale.float()

    def enter_rows(self, x: Tensor, group: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
        """enter() for rows x [.., K] of several groups at once, the operand in x's dtype, exact where it is quantised.

        group [..] is the expert of each row, one outside 0..groups-1 for rows of nobody; None: all rows are one's.
        The multiplier is [], or [groups] where groups differ.
        """
        if self.mode == "none":
            return x, None
        scale = self.scale_of_groups(x, group, groups)
        row_scale = scale
        if scale.dim() and group is not None:
            row_scale = scale[group.clamp(0, groups - 1)].unsqueeze(-1)
        return code_times_scale(*quantize(x, row_scale, self.dialect), x.dtype), scale.float()

    def scale_of_groups(self, x: Tensor, group: Tensor | None, groups: int) -> Tensor:
        """The float64 scale, [] or [groups]; a dynamic one is that of all finite values, or of each group's.

        NaN does not count for a maximum in hardware. Nor does infinity here: it would leave a scale that makes all else
        zero, and it becomes the largest code of its block either way.
        """
        if self.mode == "static":
            assert self.scale is not None
            return self.scale
        rows = (
            x.abs().nan_to_num(0.0, 0.0).amax(dim=-1).double()
            if x.numel()
            else x.new_zeros(x.shape[:-1], dtype=torch.float64)
        )
        if group is None:
            amax = rows.amax() if rows.numel() else rows.new_zeros(())
        else:
            # One more group takes the rows that belong to nobody.
            index = torch.where((group >= 0) & (group < groups), group, groups).long().reshape(-1)
            amax = rows.new_zeros(groups + 1).scatter_reduce(0, index, rows.reshape(-1), "amax")[:groups]
        scale = amax / TWO_LEVEL_MAX
        # What has no reciprocal in fp32, and zero, is zeros by any rule.
        return torch.where((1.0 / scale).float().isfinite(), scale, 1.0)


def matmul(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    """x [M, K] times one packed weight [N, K] transposed -> [M, N] in x's dtype."""
    operand, multiplier = act.enter(x)
    y = _product(operand, unscaled_weight(qdata, block_scale).T) * _merge(global_scale, multiplier)
    return y.to(x.dtype)


def linear(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    y = matmul(x.reshape(-1, x.shape[-1]), qdata, block_scale, global_scale, act)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def batched(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    y = x.new_empty(*x.shape[:2], weight_sizes(qdata)[1])
    for e in range(x.shape[0]):
        y[e] = matmul(x[e], qdata[e], block_scale.view(torch.uint8)[e], global_scale[e], act.of_expert(e))
    return y


def indexed(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, ids: Tensor, act: Activations
) -> Tensor:
    return _routed(x, qdata, block_scale, global_scale, rows_by_ids(ids, qdata.shape[0]), act)


def grouped(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, offs: Tensor, act: Activations
) -> Tensor:
    return _routed(x, qdata, block_scale, global_scale, rows_by_offsets(offs, x.shape[0]), act)


def fake_quantize(x: Tensor, scale: Tensor, dialect: str) -> Tensor:
    return nvfp4.fake_quantize(x, scale if scale.dim() == 0 else scale.unsqueeze(-1), dialect)


def dequantize(qdata: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    qdata, block_scale = canonical(qdata, block_scale)
    return nvfp4.dequantize(qdata, as_e4m3(block_scale), global_scale.unsqueeze(-1), dtype)


def _routed(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    rows: Iterator[tuple[int, Tensor]],
    act: Activations,
) -> Tensor:
    """Rows of x through the experts that ``rows`` assigns them to; a row of no expert is zero."""
    y = x.new_zeros(x.shape[0], weight_sizes(qdata)[1])
    for e, index in rows:
        y[index] = matmul(x[index], qdata[e], block_scale.view(torch.uint8)[e], global_scale[e], act.of_expert(e))
    return y


def rows_by_ids(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows) for each expert that occurs in ids [S]; ids outside 0..experts-1 belong to nobody."""
    for e in torch.unique(ids).tolist():
        if 0 <= e < experts:
            yield e, (ids == e).nonzero().squeeze(1)


def rows_by_offsets(offs: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows) for each non-empty group; offs [E] holds the groups' ends, which rows bounds."""
    start = 0
    for e, end in enumerate(min(end, rows) for end in offs.tolist()):
        if end > start:
            yield e, torch.arange(start, end, device=offs.device)
        start = end


def experts_by_offsets(offs: Tensor, rows: int) -> Tensor:
    """The expert of each of `rows` rows, int64, whose groups end at offs [E]; E for rows past the last."""
    offs = offs.contiguous()  # of others searchsorted makes copies, and warns
    return torch.searchsorted(offs, torch.arange(rows, dtype=offs.dtype, device=offs.device), right=True)


def input_grad(
    grad: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    ids: Tensor | None = None,
    offs: Tensor | None = None,
) -> Tensor:
    """The gradient times the global scales in fp32, multiplied with code * block_scale, and rounded once.

    The global scale belongs to the rows that are summed over, so here it cannot multiply the sum.
    """
    lead, _, k = weight_sizes(qdata)
    if not lead:
        return _grad(grad, qdata, block_scale, global_scale)
    rows: Iterable[tuple[int, Tensor | int]]
    if ids is not None:
        rows = rows_by_ids(ids, qdata.shape[0])
    elif offs is not None:
        rows = rows_by_offsets(offs, grad.shape[0])
    else:
        rows = ((e, e) for e in range(qdata.shape[0]))
    x = grad.new_zeros(*grad.shape[:-1], k)
    for e, index in rows:
        x[index] = _grad(grad[index], qdata[e], block_scale.view(torch.uint8)[e], global_scale[e])
    return x


def as_e4m3(block_scale: Tensor) -> Tensor:
    """Block scales as float8_e4m3fn; they may travel as bytes, which every device can index and copy."""
    return block_scale.view(torch.float8_e4m3fn) if block_scale.dtype == torch.uint8 else block_scale


def unscaled_weight(qdata: Tensor, block_scale: Tensor) -> Tensor:
    """Code * block scale in fp32 [.., N, K], of either layout."""
    codes, scales = canonical(qdata, block_scale)
    return code_times_scale(codes, as_e4m3(scales))


def _grad(grad: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    scaled = grad.float() * global_scale
    return _product(scaled, unscaled_weight(qdata, block_scale)).to(grad.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, also under autocast, which would round both to 16 bits."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _merge(global_scale: Tensor, multiplier: Tensor | None) -> Tensor:
    return global_scale if multiplier is None else global_scale * multiplier
