"""A model's tensors as a producer would have stored them: the inverse of plan and assembly."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tensor import NVFP4Weight
from . import skeleton
from .errors import CheckpointError, mismatch
from .formats import COMPRESSED_TENSORS, Convention
from .names import Names, Place
from .pieces import Piece
from .skeleton import Layout

logger = logging.getLogger("fx_nvfp4.checkpoint")

_SHORT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(.+\.experts\.\d+\.)(w[123])")
_FUSED = re.compile(r"(?P<experts>.+)\.(?P<projection>gate_up_proj|up_proj|down_proj)(?P<bias>_bias)?")


def stored_tensors(model: Any, convention: Convention) -> Iterator[dict[str, Tensor]]:
    """All tensors of a transformers model by their names in a checkpoint, those of one weight together.

    Raises:
        CheckpointError: a packed weight that the convention, or transformers' naming, has no form for.
    """
    state = skeleton.without_tied(model)
    dense = {n: torch.empty(t.shape, device="meta") if isinstance(t, NVFP4Weight) else t for n, t in state.items()}
    names = Names(skeleton.renaming(model), model.state_dict(keep_vars=True).keys(), model.base_model_prefix)
    split = convention is COMPRESSED_TENSORS
    moved: list[str] = []
    for name, tensor in skeleton.original_form(model, dense).items():
        place = names.place(name)
        packed = None if place is None else state.get(place.parameter)
        if place is not None and isinstance(packed, NVFP4Weight):
            for piece in _pieces(name, place, packed, model, split):
                moved += [piece.name] if piece.moves(convention) else []
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
    canonical = weight.canonical().replace(transposed=False)
    if weight.dim() == 2:
        yield Piece(name.removesuffix(".weight"), canonical)
    elif place.expert is not None:
        module = name.removesuffix(".weight")
        yield Piece(_long(module) if split else module, _part(canonical, place.expert, place, layout))
    elif split:
        for expert in range(weight.shape[0]):
            for module, part in _halves(name, expert):
                yield Piece(module, _part(canonical, expert, part, layout))
    elif _FUSED.fullmatch(name):
        yield Piece(name, canonical, fused=True, transposed=layout.transposed)
    else:
        raise _no_form(name)


def _part(weight: NVFP4Weight, expert: int, place: Place, layout: Layout) -> NVFP4Weight:
    return weight[expert][place.rows(layout.interleaved, weight.shape[1])]


def _halves(name: str, expert: int) -> list[tuple[str, Place]]:
    """Modules that one expert of a fused parameter becomes, each with its place."""
    match = _FUSED.fullmatch(name)
    if match is None:
        raise _no_form(name)
    experts, projection = match["experts"], match["projection"]
    if projection != "gate_up_proj":
        return [(f"{experts}.{expert}.{projection}", Place(name, expert))]
    return [(f"{experts}.{expert}.{half}_proj", Place(name, expert, half)) for half in ("gate", "up")]


def _no_form(name: str) -> CheckpointError:
    return mismatch(
        name,
        "packed experts of a name that loaders of packed checkpoints do not know",
        "gate_up_proj, up_proj or down_proj, or one tensor an expert",
        "let quantize_'s filter_fn leave these experts dense, or store the state dict with fx_nvfp4.save_file",
    )


def _beside_packed(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the stacked biases of experts whose weight is packed."""
    match = _FUSED.fullmatch(name)
    stacked = match is not None and match["bias"] is not None
    return stacked and isinstance(state.get(name.removesuffix("_bias")), NVFP4Weight)


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
    plain = {name: t for name, t in skeleton.without_tied(model).items() if not isinstance(t, NVFP4Weight)}
    names = Names(skeleton.renaming(model), model.state_dict(keep_vars=True).keys(), model.base_model_prefix)
    found = []
    for name, tensor in skeleton.original_form(model, plain).items():
        place = names.place(name)
        owner = None if place is None else model.get_submodule(place.parameter.rpartition(".")[0])
        table = convention is COMPRESSED_TENSORS and isinstance(owner, nn.Embedding)
        if name.endswith(".weight") and tensor.dim() == 2 and not table:
            found.append(name.removesuffix(".weight"))
    return sorted(found)
