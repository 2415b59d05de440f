"""Carries a plan out: tensors go from the file straight to their place in the stacked, packed parameter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..tensor import NVFP4Weight
from .checks import PackedPiece
from .errors import mismatch
from .formats import check_block_scales
from .plan import DensePlan, PackedPlan, Plan
from .reader import Reader, StoredTensor
from .torchao_files import TorchaoWeight
from .transfer import Check, Move, move_all


class Assembler:
    """Reads what a plan names, to a device.

    Args:
        reader: the checkpoint.
        device: where tensors go.
        dtype: the dtype that packed weights show.
        dialect: the rule that rounds their activations.
        progress: show a bar.
    """

    def __init__(self, reader: Reader, device: torch.device, dtype: torch.dtype, dialect: str, progress: bool) -> None:
        self._reader, self._device, self._dtype, self._dialect = reader, device, dtype, dialect
        self._progress = progress
        self._moves: list[Move] = []

    def tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Every parameter and buffer in the plan by name: all are allocated, then filled in the order of the files.

        Raises:
            CheckpointError: a file cannot be read, block scales are NaN or negative, or a value is too large for dtype.
        """
        self._moves = []
        found: dict[str, Tensor] = {name: self._packed(packed) for name, packed in plan.packed.items()}
        torchao = {name: self._parts(weight) for name, weight in plan.torchao.items()}
        found.update((name, self._dense(dense)) for name, dense in plan.dense.items())
        total = sum(move.stored.size for move in self._moves)
        with tqdm(total=total, desc="NVFP4 checkpoint", unit="B", unit_scale=True, disable=not self._progress) as bar:
            move_all(self._reader, self._moves, bar)
        self._moves = []  # nobody else is to hold on to the memory of weights
        for name, parts in torchao.items():
            found[name] = plan.torchao[name].assemble(parts, orig_dtype=self._dtype, dialect=self._dialect)
        return found

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _packed(self, plan: PackedPlan) -> NVFP4Weight:
        *lead, k = plan.shape
        qdata = self._empty((*lead, k // 2), torch.uint8)
        # Filled as bytes, which every device can copy into strided rows.
        block_scale = self._empty((*lead, k // 16), torch.uint8)
        global_scale = self._empty(tuple(lead), torch.float32)
        for piece in plan.pieces:
            self._fill(qdata, piece, plan, "codes")
            self._fill(block_scale, piece, plan, "block_scale")
            rows = _part(global_scale, piece, plan)
            rows.copy_(piece.global_scale.unsqueeze(-1) if rows.dim() == 2 else piece.global_scale)
        act_scale = _act_scale(plan)
        return NVFP4Weight(
            qdata,
            block_scale.view(torch.float8_e4m3fn).detach(),
            global_scale,
            self._dtype,
            plan.activations,
            self._dialect,
            plan.layout.transposed,
            None if act_scale is None else act_scale.to(self._device),
        )

    def _fill(self, whole: Tensor, piece: PackedPiece, plan: PackedPlan, part: str) -> None:
        fused = piece.place.expert is None and len(plan.shape) == 3
        place = _part(whole, piece, plan)
        stored = replace(piece.source[part], dtype="U8")
        check = _scales_check(piece.source[part]) if part == "block_scale" else None
        self._moves.append(Move(stored, place.mT if fused and plan.layout.transposed else place, check))

    def _parts(self, weight: TorchaoWeight) -> dict[str, Tensor]:
        """Places of the parts of a torchao tensor."""
        parts = {}
        for name, tensor in weight.parts.items():
            parts[name] = self._empty(tensor.shape, tensor.torch_dtype)
            self._moves.append(Move(tensor, parts[name], _scales_check(tensor) if name == "scale" else None))
        return parts

    def _dense(self, plan: DensePlan) -> Tensor:
        whole = self._empty(plan.shape, plan.dtype)
        canonical = whole.mT if plan.layout.transposed and whole.dim() == 3 else whole
        for place, tensor in plan.pieces:
            part = whole
            if place.expert is not None:
                part = canonical[place.expert, place.rows(plan.layout.interleaved, canonical.shape[1])]
            self._moves.append(Move(tensor, part, _range_check(plan.dtype, tensor)))
        return whole


def _scales_check(tensor: StoredTensor) -> Check:
    return lambda piece, first: check_block_scales(piece.view(torch.float8_e4m3fn), tensor, first)


def _range_check(dtype: torch.dtype, tensor: StoredTensor) -> Check:
    return lambda piece, first: _check_range(piece, dtype, tensor)


def _part(whole: Tensor, piece: PackedPiece, plan: PackedPlan) -> Tensor:
    """The view of codes or scales (E, N, ..) or (N, ..) that a piece fills."""
    place = piece.place
    if place.expert is None:
        return whole
    return whole[place.expert, place.rows(plan.layout.interleaved, plan.shape[1])]


def _check_range(stored: Tensor, dtype: torch.dtype, tensor: StoredTensor) -> None:
    """Raise if a finite value becomes infinite in dtype."""
    if not stored.is_floating_point() or not stored.numel() or not dtype.is_floating_point:
        return
    limit = torch.finfo(dtype).max
    if torch.finfo(stored.dtype).max <= limit:
        return
    # Two reductions, which need no memory, before any mask of the whole tensor; NaN hides the extremes.
    low, high = torch.aminmax(stored)
    if -limit <= low and high <= limit:
        return
    lost = stored.isfinite() & stored.to(dtype).isinf()
    if lost.any():
        found = f"{stored[lost][0].item()} ({int(lost.sum())} such)"
        fix = "load(..., dtype=torch.bfloat16), or torch.float32"
        raise mismatch(tensor.name, found, f"values up to {limit:g}, the largest {dtype}", fix)


def _act_scale(plan: PackedPlan) -> Tensor | None:
    """float64 [], or [E] where each expert has its own; gate and up were found to agree."""
    scales = {piece.place.expert: piece.act_scale for piece in plan.pieces if piece.act_scale is not None}
    if not scales:
        return None
    if None in scales:
        scale = scales[None]
        return scale.reshape(()) if scale.numel() == 1 else scale
    return torch.cat([scales[expert] for expert in range(plan.shape[0])])
