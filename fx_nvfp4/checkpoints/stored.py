"""A model's tensors as a producer would have stored them: the inverse of plan and assembly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tensor import NVFP4Weight
from . import skeleton
from .errors import CheckpointError, mismatch
from .formats import COMPRESSED_TENSORS, Convention
from .names import Names, Place
from .skeleton import Layout
from .sources import Source

logger = logging.getLogger("fx_nvfp4.checkpoint")

_SHORT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(.+\.experts\.\d+\.)(w[123])")
_FUSED = re.compile(r"(?P<experts>.+)\.(?P<projection>gate_up_proj|up_proj|down_proj)(?P<bias>_bias)?")


@dataclass(frozen=True)
class Piece:
    """What is stored as one packed weight: canonical [N, K] of a module, or [E, N, K] under a parameter's name."""

    name: str
    weight: NVFP4Weight
    fused: bool = False
    transposed: bool = False

    def tensors(self, convention: Convention) -> dict[str, Tensor]:
        """Codes and scales by their names in the file.

        Raises:
            CheckpointError: rows that share a global scale in this form have different ones.
        """
        turn = (lambda t: t.mT) if self.transposed else (lambda t: t)
        parts = {
            "codes": turn(self.weight.qdata),
            "block_scale": turn(self.weight.block_scale.view(torch.uint8)).contiguous().view(torch.float8_e4m3fn),
            "global_scale": _stored_weight_scale(self._global_scale(), convention),
        }
        if self.weight.act_scale is not None:
            parts["input_scale"] = _stored_activation_scale(_as_one(self.weight.act_scale), convention)
        source = Source(self.name, self.fused)
        return {source.part_name(part, convention): tensor for part, tensor in parts.items()}

    def moves(self) -> bool:
        """Whether no fp32 reciprocal leads back to a global scale."""
        scale = self.weight.global_scale
        return not torch.equal(1.0 / _reciprocal(scale), scale)

    def _global_scale(self) -> Tensor:
        """fp32 [], or [E] of experts that differ."""
        scale = self.weight.global_scale
        if not torch.equal(scale, scale[..., :1].expand(scale.shape)):
            raise mismatch(
                self.name,
                "rows with different global scales",
                "one for each weight, or each expert of a fused one, in a file",
                'NVFP4Config(global_scale="fused") gives gate and up of an expert one in common; '
                'producer="compressed-tensors" stores them apart',
            )
        return _as_one(scale[..., 0])


def stored_tensors(model: Any, convention: Convention) -> Iterator[dict[str, Tensor]]:
    """All tensors of a transformers model by their names in a checkpoint, those of one weight together.

    Raises:
        CheckpointError: a packed weight that the convention, or transformers' naming, has no form for.
    """
    state = skeleton.without_tied(model)
    dense = {name: t if not _is_packed(t) else torch.empty(t.shape, device="meta") for name, t in state.items()}
    names = Names(skeleton.renaming(model), model.state_dict().keys(), model.base_model_prefix)
    split = convention is COMPRESSED_TENSORS
    moved: list[str] = []
    for name, tensor in skeleton.original_form(model, dense).items():
        place = names.place(name)
        packed = None if place is None else state.get(place.parameter)
        if place is not None and isinstance(packed, NVFP4Weight):
            for piece in _pieces(name, place, packed, model, split):
                moved += [piece.name] if convention.reciprocal and piece.moves() else []
                yield piece.tensors(convention)
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: transformers stores a packed weight here, and no place is known for it")
        elif split and place is not None and _beside_packed(name, state):
            yield dict(_biases(name, tensor, _layout(model, place.parameter)))
        else:
            yield {name: tensor}
    _warn_of_moved(moved)


def _pieces(name: str, place: Place, weight: NVFP4Weight, model: Any, split: bool) -> Iterator[Piece]:
    layout = _layout(model, place.parameter) if weight.dim() == 3 else Layout()
    canonical = weight.replace(transposed=False)
    if weight.dim() == 2:
        yield Piece(name.removesuffix(".weight"), canonical)
    elif place.expert is not None:
        module = name.removesuffix(".weight")
        yield Piece(_long(module) if split else module, _part(canonical, place.expert, place, layout))
    elif split:
        for expert in range(weight.shape[0]):
            for module, part in _halves(name, expert):
                yield Piece(module, _part(canonical, expert, part, layout))
    else:
        yield Piece(name, canonical, fused=True, transposed=layout.transposed)


def _part(weight: NVFP4Weight, expert: int, place: Place, layout: Layout) -> NVFP4Weight:
    return weight[expert][place.rows(layout.interleaved, weight.shape[1])]


def _halves(name: str, expert: int) -> list[tuple[str, Place]]:
    """Modules that one expert of a fused parameter becomes, each with its place."""
    match = _FUSED.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: not a name of experts that compressed-tensors could store one by one")
    experts, projection = match["experts"], match["projection"]
    if projection != "gate_up_proj":
        return [(f"{experts}.{expert}.{projection}", Place(name, expert))]
    return [(f"{experts}.{expert}.{half}_proj", Place(name, expert, half)) for half in ("gate", "up")]


def _beside_packed(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the stacked biases of experts whose weight is packed."""
    match = _FUSED.fullmatch(name)
    return match is not None and match["bias"] is not None and _is_packed(state.get(name.removesuffix("_bias")))


def _biases(name: str, bias: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for expert in range(bias.shape[0]):
        for module, place in _halves(name, expert):
            yield f"{module}.bias", bias[expert][place.rows(layout.interleaved, bias.shape[1])]


def _long(module: str) -> str:
    """gate_proj for w1, as llm-compressor names all experts' projections."""
    match = _EXPERT.fullmatch(module)
    return module if match is None else match[1] + _SHORT[match[2]]


def _layout(model: Any, parameter: str) -> Layout:
    return skeleton.experts_layout(model.get_submodule(parameter.rpartition(".")[0]))


def _is_packed(tensor: Tensor | None) -> bool:
    return isinstance(tensor, NVFP4Weight)


def _as_one(scale: Tensor) -> Tensor:
    """[] where all experts have the same scale."""
    return scale.reshape(-1)[0] if scale.numel() and bool((scale == scale.reshape(-1)[0]).all()) else scale


def _stored_activation_scale(scale: Tensor, convention: Convention) -> Tensor:
    return (1.0 / scale).float().reshape(-1) if convention.reciprocal else scale.float()


def _stored_weight_scale(scale: Tensor, convention: Convention) -> Tensor:
    return _reciprocal(scale).reshape(-1) if convention.reciprocal else scale


def _reciprocal(scale: Tensor) -> Tensor:
    """The fp32 number whose reciprocal is scale; of several the roundest, as producers compute theirs in bfloat16."""
    near = 1.0 / scale
    candidates = torch.stack([near, *(torch.nextafter(near, torch.full_like(near, to)) for to in (0.0, torch.inf))])
    bits = candidates.view(torch.int32)
    trailing_zeros = (bits & -bits).double().log2()
    return candidates.gather(0, torch.where(1.0 / candidates == scale, trailing_zeros, -1.0).argmax(0, keepdim=True))[0]


def _warn_of_moved(names: list[str]) -> None:
    if names:
        logger.warning(
            "%d global scales (%s, ...) move by a unit in the last place: this form stores fp32 reciprocals, and none "
            "leads back to them",
            len(names),
            names[0],
        )


def dense_modules(model: Any, convention: Convention) -> list[str]:
    """Modules, as a checkpoint names them, whose 2-D weights stay dense; embeddings count for ModelOpt alone."""
    state = skeleton.without_tied(model)
    plain = {name: t for name, t in state.items() if not _is_packed(t)}
    names = Names(skeleton.renaming(model), model.state_dict().keys(), model.base_model_prefix)
    found = []
    for name, tensor in skeleton.original_form(model, plain).items():
        place = names.place(name)
        owner = None if place is None else model.get_submodule(place.parameter.rpartition(".")[0])
        table = convention is COMPRESSED_TENSORS and isinstance(owner, nn.Embedding)
        if name.endswith(".weight") and tensor.dim() == 2 and not table:
            found.append(name.removesuffix(".weight"))
    return sorted(found)
