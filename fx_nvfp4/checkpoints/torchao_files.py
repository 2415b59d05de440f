"""torchao's safetensors form: tensors named after their part, and each one's type as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..format import BLOCK
from ..tensor import NVFP4Weight
from ..torchao_interop import from_torchao_parts
from .errors import CheckpointError, mismatch
from .input_scales import InputScales
from .reader import StoredTensor

_TYPE = "NVFP4Tensor"
_ACT_SCALE = "act_per_tensor_scale"
_PARTS = {"qdata": "U8", "scale": "F8_E4M3", "per_tensor_scale": "F32", _ACT_SCALE: "F32"}
_SERVED = "fx_nvfp4 loads torchao checkpoints of NVFP4Tensor and plain tensors"


@dataclass(frozen=True)
class TorchaoWeight:
    """The stored parts of one NVFP4Tensor, by torchao's part names, and its attributes."""

    name: str
    parts: dict[str, StoredTensor]
    swizzled: bool
    activations: bool
    dynamic: bool

    def assemble(self, parts: Mapping[str, Tensor], **attributes: Any) -> NVFP4Weight:
        """The weight of the parts read; attributes (orig_dtype, dialect) as for NVFP4Weight.

        Raises:
            CheckpointError: the scales' size is not that of the codes.
        """
        try:
            return from_torchao_parts(
                parts["qdata"],
                parts["scale"],
                self.swizzled,
                parts.get("per_tensor_scale"),
                parts.get(_ACT_SCALE),
                self.activations,
                self.dynamic,
                **attributes,
            )
        except ValueError as error:
            raise CheckpointError(f"{self.parts['scale'].name}: {error}; export the checkpoint again") from error


def holds_torchao(metadata: Mapping[str, str]) -> bool:
    """Whether any tensor is described as torchao's NVFP4Tensor."""
    return any(f'"{_TYPE}"' in text for text in metadata.values())


def collect_torchao(
    metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor], input_scales: InputScales | None
) -> tuple[list[TorchaoWeight], list[StoredTensor]]:
    """(packed weights, plain tensors) of a torchao checkpoint.

    input_scales is told which of them are missing; None drops all that the checkpoint says of activations.

    Raises:
        CheckpointError: a tensor type that is not served, or a part that is missing or of the wrong dtype.
    """
    weights = []
    if input_scales is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(f"_{_ACT_SCALE}")}
    for name, text in sorted(metadata.items()):
        described = _parse(name, text)
        kind = described.get("_type", "Tensor")
        if kind == _TYPE:
            weights.append(_weight(name, described, tensors, input_scales))
        elif kind != "Tensor":
            raise mismatch(name, f"torchao type {kind}", f"{_TYPE} or Tensor", _SERVED)
    used = {part.name for weight in weights for part in weight.parts.values()}
    return weights, [tensor for name, tensor in tensors.items() if name not in used]


def _parse(name: str, text: str) -> dict[str, Any]:
    """Metadata of one tensor; entries that describe no tensor ("format", "tensor_names") come out empty."""
    try:
        described = json.loads(text)
    except ValueError:
        described = None
    return described if isinstance(described, dict) else {}


def _weight(
    name: str, described: Mapping[str, Any], tensors: Mapping[str, StoredTensor], input_scales: InputScales | None
) -> TorchaoWeight:
    attributes = described.get("_data", {})
    if attributes.get("block_size") != BLOCK:
        raise mismatch(f"{name}: block_size", attributes.get("block_size"), BLOCK, _SERVED)
    owner, _, leaf = name.rpartition(".")
    stated = described.get("_tensor_data_names", ["qdata", "scale"])
    names = {part: f"{owner}._{leaf}_{part}".lstrip(".") for part in stated}
    if _ACT_SCALE in names and names[_ACT_SCALE] not in tensors:
        act_scale = names.pop(_ACT_SCALE)
        if input_scales is not None:
            input_scales.missing(act_scale)
    parts = {part: _part(tensor, part, tensors) for part, tensor in names.items()}
    quantize_activations = None if input_scales is None else (attributes.get("act_quant_kwargs") or {}).get("_data")
    return TorchaoWeight(
        name,
        parts,
        bool(attributes.get("is_swizzled_scales")),
        quantize_activations is not None,
        bool((quantize_activations or {}).get("use_dynamic_per_tensor_scale")),
    )


def _part(name: str, part: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    wanted = _PARTS.get(part)
    if wanted is None:
        raise mismatch(name, f"part {part!r}", f"one of {sorted(_PARTS)}", _SERVED)
    if name not in tensors:
        raise mismatch(name, "no such tensor", f"{wanted}, which the metadata announces", "export the checkpoint again")
    if tensors[name].dtype != wanted:
        raise mismatch(name, tensors[name], wanted, "export the checkpoint again")
    return tensors[name]
