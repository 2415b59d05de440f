"""Carries a plan out: tensors go from the file straight to their place in the stacked, packed parameter."""

from __future__ import annotations

from collections.abc import Iterator

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

    def tensors(self, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter and buffer in the plan.

        Raises:
            CheckpointError: a file cannot be read, block scales are NaN or negative, or a value is too large for dtype.
        """
        with tqdm(
            total=_stored_tensors(plan), desc="NVFP4 checkpoint", unit="tensor", disable=not self._progress
        ) as bar:
            self._bar = bar
            for name, packed in plan.packed.items():
                yield name, self._packed(packed)
            for name, weight in plan.torchao.items():
                yield name, self._torchao(weight)
            for name, dense in plan.dense.items():
                yield name, self._dense(dense)

    def _read(self, tensor: StoredTensor) -> Tensor:
        self._bar.update()
        return self._reader.read(tensor)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _packed(self, plan: PackedPlan) -> NVFP4Weight:
        *lead, k = plan.shape
        qdata = self._empty((*lead, k // 2), torch.uint8)
        # Filled as bytes, which every device can copy into strided rows.
        block_scale = self._empty((*lead, k // 16), torch.uint8)
        global_scale = self._empty(tuple(lead), torch.float32)
        for piece in plan.pieces:
            self._fill(qdata, piece, plan, self._read(piece.source["codes"]))
            stored = self._read(piece.source["block_scale"])
            check_block_scales(stored, piece.source["block_scale"])
            self._fill(block_scale, piece, plan, stored.view(torch.uint8))
            rows = _part(global_scale, piece, plan)
            rows.copy_(piece.global_scale.unsqueeze(-1) if rows.dim() == 2 else piece.global_scale)
        act_scale = _act_scale(plan)
        return NVFP4Weight(
            qdata,
            block_scale.view(torch.float8_e4m3fn),
            global_scale,
            self._dtype,
            plan.activations,
            self._dialect,
            plan.layout.transposed,
            None if act_scale is None else act_scale.to(self._device),
        )

    def _fill(self, whole: Tensor, piece: PackedPiece, plan: PackedPlan, stored: Tensor) -> None:
        fused = piece.place.expert is None and len(plan.shape) == 3
        _part(whole, piece, plan).copy_(stored.mT if fused and plan.layout.transposed else stored)

    def _torchao(self, weight: TorchaoWeight) -> NVFP4Weight:
        parts = {name: self._read(tensor).to(self._device, copy=True) for name, tensor in weight.parts.items()}
        assembled = weight.assemble(parts, orig_dtype=self._dtype, dialect=self._dialect)
        check_block_scales(assembled.block_scale, weight.parts["scale"])
        return assembled

    def _dense(self, plan: DensePlan) -> Tensor:
        whole = self._empty(plan.shape, plan.dtype)
        canonical = whole.mT if plan.layout.transposed and whole.dim() == 3 else whole
        for place, tensor in plan.pieces:
            part = whole
            if place.expert is not None:
                part = canonical[place.expert, place.rows(plan.layout.interleaved, canonical.shape[1])]
            stored = self._read(tensor)
            _check_range(stored, plan.dtype, tensor)
            part.copy_(stored)
        return whole


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


def _stored_tensors(plan: Plan) -> int:
    packed = sum(2 * len(p.pieces) for p in plan.packed.values())
    torchao = sum(len(w.parts) for w in plan.torchao.values())
    return packed + torchao + sum(len(d.pieces) for d in plan.dense.values())
