"""A plan for some of the experts: what a rank that holds no others has to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .checks import PackedPiece
from .errors import CheckpointError
from .names import Place
from .plan import DensePlan, PackedPlan, Plan
from .reader import StoredTensor
from .sources import Source


def keep_experts(plan: Plan, kept: Mapping[str, range]) -> Plan:
    """The plan with only those experts of some modules, by the modules' names; each becomes the first, second, ...

    Raises:
        CheckpointError: experts in torchao's form, whose parts are read as wholes.
    """
    torchao = [name for name in plan.torchao if _owner(name) in kept]
    if torchao:
        raise CheckpointError(
            f"{torchao[0]}: torchao's form is read as a whole. Load without mesh=, on the CPU, then call "
            "fx_nvfp4.shard_experts(model, mesh) and move the model"
        )
    packed = {name: _packed(p, kept[_owner(name)]) if _owner(name) in kept else p for name, p in plan.packed.items()}
    dense = {name: _dense(p, kept[_owner(name)]) if _owner(name) in kept else p for name, p in plan.dense.items()}
    return replace(plan, packed=packed, dense=dense)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _packed(plan: PackedPlan, kept: range) -> PackedPlan:
    count = plan.shape[0]
    pieces = [_piece(p, kept, count) for p in plan.pieces if _is_kept(p.place, kept)]
    return replace(plan, shape=(len(kept), *plan.shape[1:]), pieces=pieces)


def _dense(plan: DensePlan, kept: range) -> DensePlan:
    pieces = [
        (_moved(place, kept), stored if place.expert is not None else _rows(stored, kept))
        for place, stored in plan.pieces
        if _is_kept(place, kept)
    ]
    return replace(plan, shape=(len(kept), *plan.shape[1:]), pieces=pieces)


def _is_kept(place: Place, kept: range) -> bool:
    return place.expert is None or place.expert in kept


def _moved(place: Place, kept: range) -> Place:
    return place if place.expert is None else replace(place, expert=place.expert - kept.start)


def _piece(piece: PackedPiece, kept: range, count: int) -> PackedPiece:
    if piece.place.expert is not None:
        return replace(piece, place=_moved(piece.place, kept))
    parts = {name: _rows(t, kept) if len(t.shape) == 3 else t for name, t in piece.source.parts.items()}
    source = Source(piece.source.name, piece.source.fused, parts)
    global_scale = _of_experts(piece.global_scale, kept, count)
    act_scale = None if piece.act_scale is None else _of_experts(piece.act_scale, kept, count)
    return replace(piece, source=source, global_scale=global_scale, act_scale=act_scale)


def _of_experts(scale: Tensor, kept: range, count: int) -> Tensor:
    """Of one scale an expert those that are kept; one for all stays."""
    return scale.reshape(-1)[kept.start : kept.stop] if scale.numel() == count > 1 else scale


def _rows(stored: StoredTensor, kept: range) -> StoredTensor:
    """Part of a stored tensor along its first dim, which is experts: contiguous in the file."""
    each = stored.size // stored.shape[0]
    shape = (len(kept), *stored.shape[1:])
    return replace(stored, shape=shape, offset=stored.offset + kept.start * each, size=len(kept) * each)
