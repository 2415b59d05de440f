"""Checks of stored tensors against the parameter that they are to fill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import BLOCK
from .errors import CheckpointError, mismatch
from .formats import TORCHAO, weight_multiplier
from .input_scales import WEIGHT_ONLY, InputScales
from .names import Place
from .reader import Reader, StoredTensor
from .skeleton import Layout
from .sources import Source
from .torchao_files import TorchaoWeight

_OTHER_CONFIG = "config.json and tensors are of different models, or the export was cut short"
_FLOATS = ("BF16", "F16", "F32", "F64")
_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class PackedPiece:
    """A stored weight, its place, and its multipliers: float32 for weights, float64 for activations (or None)."""

    place: Place
    source: Source
    global_scale: Tensor
    act_scale: Tensor | None


def check_packed_piece(piece: PackedPiece, shape: tuple[int, ...], layout: Layout) -> None:
    """Raise unless codes and scales fit a parameter of canonical shape (N, K) or (E, N, K).

    Raises:
        CheckpointError: a shape that does not fit, an expert that the model does not have, experts that are
            neither one by one nor fused in 3-D.
    """
    place, source = piece.place, piece.source
    *experts, rows, cols = shape
    if place.expert is not None:
        _check_expert(place, shape, source["codes"])
        experts = []
    for part, per in (("codes", 2), ("block_scale", BLOCK)):
        lead = (*experts, rows // 2 if place.half else rows)
        expected = (*lead, cols // per)
        if experts and layout.transposed:
            expected = (*experts, cols // per, rows)
        if source[part].shape != expected:
            raise mismatch(source[part].name, source[part], f"{list(expected)} for {place.parameter}", _OTHER_CONFIG)
    allowed = {1, *experts}
    for part in ("global_scale", "input_scale"):
        if part in source.parts and source[part].numel not in allowed:
            raise mismatch(
                source[part].name, source[part], f"{' or '.join(map(str, sorted(allowed)))} element(s)", _OTHER_CONFIG
            )


def check_activations(parameter: str, pieces: Iterable[PackedPiece]) -> None:
    """Raise unless gate and up of one expert quantise their common input by one scale.

    Raises:
        CheckpointError: two scales for one input; no choice between them is right.
    """
    first: dict[int | None, PackedPiece] = {}
    for piece in pieces:
        if piece.act_scale is None:
            continue
        other = first.setdefault(piece.place.expert, piece)
        if other.act_scale is not None and not torch.equal(other.act_scale, piece.act_scale):
            raise mismatch(
                piece.source["input_scale"].name,
                f"a multiplier of {piece.act_scale.tolist()}",
                f"{other.act_scale.tolist()} as {other.source['input_scale'].name}, both scale one input",
                f"calibrate gate and up projections together, or {WEIGHT_ONLY}",
            )


def check_torchao(
    weight: TorchaoWeight, shape: tuple[int, ...], layout: Layout, reader: Reader, input_scales: InputScales
) -> None:
    """Raise unless a torchao weight fits a parameter of the model's shape and its weight scales are usable.

    Its input scale is left to input_scales.check().
    """
    codes = weight.parts["qdata"]
    if layout.transposed and len(shape) == 3:
        raise mismatch(
            codes.name,
            "torchao codes of experts that multiply x @ weight",
            "experts stored [E, out, in]",
            "torchao packs along the last dim, which is not the contracted one here: quantise with another producer",
        )
    expected = (*shape[:-1], shape[-1] // 2)
    if codes.shape != expected:
        raise mismatch(codes.name, codes, f"{list(expected)} for {weight.name}", _OTHER_CONFIG)
    _check_torchao_scales(weight, shape, reader)
    act_scale = weight.parts.get("act_per_tensor_scale")
    if act_scale is not None:
        if act_scale.numel != 1:
            raise mismatch(act_scale.name, act_scale, "one scale", _OTHER_CONFIG)
        input_scales.multiplier(act_scale)


def _check_torchao_scales(weight: TorchaoWeight, shape: tuple[int, ...], reader: Reader) -> None:
    rows, cols = torch.Size(shape[:-1]).numel(), shape[-1] // BLOCK
    tiles = -(-rows // 128) * 128 * (-(-cols // 4) * 4)
    stored, expected = weight.parts["scale"], tiles if weight.swizzled else rows * cols
    if stored.numel != expected:
        layout = "128 x 4 tiles" if weight.swizzled else "rows"
        raise mismatch(stored.name, stored, f"{expected} scales in {layout} for {weight.name}", _OTHER_CONFIG)
    allowed = {1, shape[0]} if len(shape) == 3 else {1}
    tensor = weight.parts.get("per_tensor_scale")
    if tensor is not None:
        if tensor.numel not in allowed:
            raise mismatch(tensor.name, tensor, "one scale, or one per expert", _OTHER_CONFIG)
        weight_multiplier(reader, tensor, TORCHAO)


def check_dense(tensor: StoredTensor, place: Place, parameter: Tensor, layout: Layout) -> None:
    """Raise unless a plain tensor fits its parameter, or its part of it.

    Raises:
        CheckpointError: wrong shape or dtype, or an expert that the model does not have.
    """
    floating = parameter.is_floating_point()
    if (tensor.dtype not in _FLOATS) if floating else (_DTYPES.get(tensor.dtype) != parameter.dtype):
        wanted = "a floating-point tensor (bfloat16, float16 or float32)" if floating else str(parameter.dtype)
        raise mismatch(
            tensor.name, tensor, wanted, "only NVFP4 weights may be packed, and those need their scales beside them"
        )
    canonical = parameter.mT if layout.transposed and parameter.dim() == 3 else parameter
    expected = tuple(canonical.shape) if place.expert is not None else tuple(parameter.shape)
    if place.expert is not None:
        _check_expert(place, expected, tensor)
        rows = expected[1] // 2 if place.half else expected[1]
        expected = (rows, *expected[2:])
    if tensor.shape != expected:
        raise mismatch(tensor.name, tensor, f"{list(expected)} for {place.parameter}", _OTHER_CONFIG)


def _check_expert(place: Place, shape: tuple[int, ...], tensor: StoredTensor) -> None:
    assert place.expert is not None
    if place.expert >= shape[0]:
        raise _no_such_expert(place.expert, shape[0], tensor)


def _no_such_expert(expert: int, experts: int, tensor: StoredTensor) -> CheckpointError:
    return mismatch(tensor.name, f"expert {expert}", f"experts 0 to {experts - 1}", _OTHER_CONFIG)
