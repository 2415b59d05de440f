"""What goes where: the tensors of a checkpoint matched with a model's parameters, checked before any is read.

Only headers and global scales are looked at here. A plan that was made is one that can be carried out, but for
block scales that are NaN or negative, which are found when they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..format import BLOCK
from . import skeleton
from .checks import PackedPiece, check_activations, check_dense, check_packed_piece, check_torchao
from .errors import mismatch
from .formats import Convention, weight_multiplier
from .input_scales import InputScales
from .names import Names, Place, is_kv_scale, layer_index, sibling
from .reader import Reader, StoredTensor
from .scheme import Scheme
from .skeleton import Layout
from .sources import FUSED, Source, collect
from .torchao_files import TorchaoWeight, collect_torchao

logger = logging.getLogger("fx_nvfp4.checkpoint")


@dataclass
class PackedPlan:
    """One packed parameter: shape canonical, (N, K) or (E, N, K), and the pieces that fill it."""

    shape: tuple[int, ...]
    layout: Layout
    activations: str
    pieces: list[PackedPiece] = field(default_factory=list)


@dataclass
class DensePlan:
    """One parameter or buffer that is not packed, of the model's shape; several pieces where experts are stacked."""

    shape: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    pieces: list[tuple[Place, StoredTensor]] = field(default_factory=list)


@dataclass
class Plan:
    """All parameters by name, and those that stay empty because they are tied to another."""

    packed: dict[str, PackedPlan] = field(default_factory=dict)
    torchao: dict[str, TorchaoWeight] = field(default_factory=dict)
    dense: dict[str, DensePlan] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)


def make_plan(reader: Reader, scheme: Scheme, model: Any) -> Plan:
    """Match the checkpoint's tensors with the parameters of an empty model.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of the wrong shape or dtype, or a scale is unusable.
    """
    return _Planner(reader, scheme, model).plan()


class _Planner:
    def __init__(self, reader: Reader, scheme: Scheme, model: Any) -> None:
        self.reader, self.scheme, self.model = reader, scheme, model
        self.wanted: Mapping[str, torch.Tensor] = model.state_dict()
        self.names = Names(skeleton.renaming(model), self.wanted.keys(), model.base_model_prefix)
        self.dtype_of = skeleton.wanted_dtypes(model)
        self.input_scales = InputScales(reader, scheme.convention)
        self.result = Plan()
        self._layouts: dict[str, Layout] = {}

    def plan(self) -> Plan:
        tensors = self._relevant()
        if self.scheme.convention.method == "torchao":
            input_scales = None if self.scheme.weight_only else self.input_scales
            weights, plain = collect_torchao(self.reader.metadata, tensors, input_scales)
            for weight in weights:
                self._add_torchao(weight)
        else:
            sources, plain = collect(tensors, self.scheme)
            for source in sources:
                self._add_packed(source, self.scheme.convention)
        for tensor in plain:
            self._add_dense(tensor)
        self.input_scales.check()
        for name, packed in self.result.packed.items():
            check_activations(name, packed.pieces)
        self._check_complete()
        return self.result

    def _relevant(self) -> dict[str, StoredTensor]:
        """All tensors but those that the model's class ignores, those of extra layers, and KV cache scales."""
        ignored = skeleton.ignored_names(self.model)
        tensors = self.reader.tensors
        kept = {name: t for name, t in tensors.items() if not ignored(name) or self._has_use(name)}
        extra = self._of_extra_layers(kept)
        kept = {name: t for name, t in kept.items() if name not in extra}
        kv_scales = {name for name in kept if is_kv_scale(name)}
        if kv_scales:
            logger.warning(
                "KV cache is not emulated: %d scales of a quantised KV cache (%s, ...) are not applied, "
                "keys and values keep the model's precision",
                len(kv_scales),
                min(kv_scales),
            )
        return {name: t for name, t in kept.items() if name not in kv_scales}

    def _of_extra_layers(self, names: Iterable[str]) -> set[str]:
        """Tensors of the layers past the last that predict several tokens ahead (MTP), as many as the config states."""
        config = self.model.config.get_text_config()
        layers, ahead = (getattr(config, key, None) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers"))
        past = range(layers, layers + ahead)
        extra = {name for name in names if layer_index(name) in past and not self._has_use(name)}
        if extra:
            logger.warning(
                "%d tensors (%s, ...) are skipped: they are of layers for multi-token prediction, "
                "past the %d of the model",
                len(extra),
                min(extra),
                layers,
            )
        return extra

    def _has_use(self, name: str) -> bool:
        """Whether a tensor, or the weight it scales, has a place: some patterns of extra layers match real ones too."""
        owner, _, leaf = name.rpartition(".")
        fused = [f"{owner}.{weight}" for weight in FUSED if leaf.lstrip("_").startswith(weight)]
        return any(self.names.place(n) is not None for n in (name, f"{owner}.weight", *fused))

    def _place(self, name: str, stored_as: str) -> Place:
        place = self.names.place(name)
        if place is None:
            raise mismatch(
                stored_as,
                "a tensor that belongs nowhere",
                f"parameters of {type(self.model).__name__}",
                "check that config.json is this checkpoint's, and that transformers knows its names",
            )
        return place

    def _layout(self, parameter: str) -> Layout:
        """Found once for a module: hundreds of stored tensors fill one experts module."""
        name = parameter.rpartition(".")[0]
        if name not in self._layouts:
            owner = self.model.get_submodule(name)
            # Linear layers are 2-D; whatever holds 3-D weights, or the biases of them, is an experts module.
            experts = any(p.dim() == 3 for p in owner.parameters(recurse=False))
            self._layouts[name] = skeleton.experts_layout(owner) if experts else Layout()
        return self._layouts[name]

    def _add_packed(self, source: Source, convention: Convention) -> None:
        place = self._place(source.weight_name, source["codes"].name)
        layout, shape = self._packed_target(place, source["codes"])
        piece = PackedPiece(
            place,
            source,
            weight_multiplier(self.reader, source["global_scale"], convention),
            self._act_scale(source, convention),
        )
        check_packed_piece(piece, shape, layout)
        plan = self.result.packed.setdefault(place.parameter, PackedPlan(shape, layout, self.scheme.activations))
        plan.pieces.append(piece)

    def _act_scale(self, source: Source, convention: Convention) -> torch.Tensor | None:
        if self.scheme.activations == "none":
            return None
        if "input_scale" in source.parts:
            return self.input_scales.multiplier(source["input_scale"])
        self.input_scales.missing(source.part_name("input_scale", convention))
        return None

    def _packed_target(self, place: Place, codes: StoredTensor) -> tuple[Layout, tuple[int, ...]]:
        """Layout and canonical shape of a parameter that is to hold NVFP4."""
        parameter = self.wanted[place.parameter]
        owner = self.model.get_submodule(place.parameter.rpartition(".")[0])
        if parameter.dim() not in (2, 3) or isinstance(owner, torch.nn.Embedding):
            found = f"NVFP4 codes for a {type(owner).__name__} {list(parameter.shape)}"
            raise mismatch(codes.name, found, "packed linear layers and experts only", "export it unquantised")
        layout = self._layout(place.parameter)
        shape = tuple((parameter.mT if layout.transposed else parameter).shape)
        if shape[-1] % BLOCK:
            fix = f"only weights whose input dim is a multiple of {BLOCK} can be NVFP4"
            raise mismatch(codes.name, codes, f"a parameter {place.parameter} in blocks, it is {shape}", fix)
        return layout, shape

    def _add_torchao(self, weight: TorchaoWeight) -> None:
        place = self._place(weight.name, weight.parts["qdata"].name)
        layout, _ = self._packed_target(place, weight.parts["qdata"])
        check_torchao(weight, tuple(self.wanted[place.parameter].shape), layout, self.reader, self.input_scales)
        self.result.torchao[place.parameter] = weight

    def _add_dense(self, tensor: StoredTensor) -> None:
        place = self._place(tensor.name, tensor.name)
        parameter = self.wanted[place.parameter]
        layout = self._layout(place.parameter)
        check_dense(tensor, place, parameter, layout)
        dtype = self.dtype_of(place.parameter, parameter.dtype)
        plan = self.result.dense.setdefault(place.parameter, DensePlan(tuple(parameter.shape), layout, dtype))
        plan.pieces.append((place, tensor))

    def _check_complete(self) -> None:
        plans: dict[str, Any] = {**self.result.packed, **self.result.dense}
        for name in sorted(plans.keys() & self.result.packed.keys() & self.result.dense.keys()):
            dense = self.result.dense[name].pieces[0][1]
            raise mismatch(dense.name, f"{dense}, not packed", f"NVFP4 like the rest of {name}", "quantise all experts")
        for name, plan in plans.items():
            places = [piece.place if isinstance(piece, PackedPiece) else piece[0] for piece in plan.pieces]
            stored = [piece.source["codes"] if isinstance(piece, PackedPiece) else piece[1] for piece in plan.pieces]
            self._check_places(name, places, stored)
        missing = self.wanted.keys() - plans.keys() - self.result.torchao.keys()
        groups = [{target, source} for target, source in self.model.all_tied_weights_keys.items()]
        self.result.tied = {name for name in missing if any(name in g and g - missing for g in groups)}
        for name in sorted(missing - self.result.tied):
            shape = list(self.wanted[name].shape)
            fix = "the checkpoint is incomplete, or config.json is another model's"
            raise mismatch(name, "no tensor for it", f"a parameter {shape} of {type(self.model).__name__}", fix)

    def _check_places(self, name: str, places: list[Place], stored: list[StoredTensor]) -> None:
        """Every expert, and of it gate and up, exactly once."""
        seen: dict[Place, StoredTensor] = {}
        for place, tensor in zip(places, stored, strict=True):
            if place in seen:
                raise mismatch(tensor.name, f"it and {seen[place].name}", f"one tensor for {name}", "delete one")
            seen[place] = tensor
        if places[0].expert is None:
            return
        for place in _all_experts(name, self.wanted[name].shape[0], places):
            if place not in seen:
                raise self._missing_expert(place, seen)

    def _missing_expert(self, place: Place, seen: Mapping[Place, StoredTensor]) -> Exception:
        """Named after another expert's tensor of the same projection, where there is one."""
        like = next((t.name for p, t in seen.items() if p.half == place.half), None)
        assert place.expert is not None
        name = f"{place.parameter} ({place.half})" if like is None else sibling(like, place.expert)
        expected = f"expert {place.expert} of {self.wanted[place.parameter].shape[0]} in {place.parameter}"
        return mismatch(name, "no such tensor", expected, "export the checkpoint again")


def _all_experts(name: str, experts: int, places: Iterable[Place]) -> list[Place]:
    halves: tuple[str | None, ...] = ("gate", "up") if any(p.half for p in places) else (None,)
    return [Place(name, expert, half) for expert in range(experts) for half in halves]
