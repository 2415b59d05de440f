"""Packed weights in safetensors files: each part a plain tensor, the rest as JSON in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from .tensor import LAYOUT, NVFP4Weight

_TYPE = "NVFP4Weight"
_ATTRIBUTES = {"orig_dtype": str, "activations": str, "dialect": str, "transposed": bool}
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}


def save_file(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict, packed weights included, to one safetensors file.

    A weight ``name`` becomes the tensors ``name.qdata``, ``name.block_scale``, ``name.global_scale`` and, where it
    has one, ``name.act_scale``; in the canonical layout, also of tiles.

    Raises:
        ValueError: a packed weight is a view of another shape or of chosen experts; store what it shows.
    """
    plain: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.data
        if not isinstance(packed, NVFP4Weight):
            plain[name] = _own(tensor.detach(), seen)
            continue
        if packed.expert_ids is not None or packed.view_dims is not None:
            raise ValueError(f"save_file: {name} is a view {list(packed.shape)}; save the weight that it shows")
        packed = packed.canonical()
        parts, attributes = packed.__tensor_flatten__()
        plain.update({f"{name}.{part}": _own(getattr(packed, part), seen) for part in parts})
        attributes.pop(LAYOUT)
        attributes = {key: str(value) if key == "orig_dtype" else value for key, value in attributes.items()}
        metadata[name] = json.dumps({"type": _TYPE, **attributes})
    safetensors.torch.save_file(plain, path, metadata)


def load_file(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read back what :func:`save_file` wrote.

    Raises:
        ValueError: the metadata names a packed weight whose parts are missing or do not fit; names it.
    """
    with safe_open(path, framework="pt", device=device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    for name, text in metadata.items():
        attributes = _attributes(name, text)
        if attributes is None:
            continue
        names = (*NVFP4Weight.tensor_data_names, *NVFP4Weight.optional_tensor_data_names)
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in names}
        missing = [part for part in NVFP4Weight.tensor_data_names if parts[part] is None]
        if missing:
            raise ValueError(f"load_file: {path}: packed weight {name} lacks {', '.join(missing)}")
        tensors[name] = NVFP4Weight(**parts, **attributes)  # type: ignore[arg-type]
    return tensors


def _own(tensor: Tensor, seen: set[int]) -> Tensor:
    """tensor with memory that no other entry shares, which safetensors refuses: tied weights are stored twice."""
    tensor = tensor.contiguous()
    storage = tensor.untyped_storage().data_ptr()
    if storage in seen:
        return tensor.clone()
    seen.add(storage)
    return tensor


def _attributes(name: str, text: str) -> dict[str, object] | None:
    """Constructor arguments of a packed weight, or None where the entry is something else."""
    try:
        attributes = json.loads(text)
    except ValueError:
        return None
    if not isinstance(attributes, dict) or attributes.pop("type", None) != _TYPE:
        return None
    if not isinstance(attributes.get("orig_dtype"), str) or attributes["orig_dtype"] not in _DTYPES:
        raise ValueError(f"load_file: {name}: orig_dtype {attributes.get('orig_dtype')!r} is none of {list(_DTYPES)}")
    attributes = {key: value for key, value in attributes.items() if value is not None}
    for key, value in attributes.items():
        if key not in _ATTRIBUTES or not isinstance(value, _ATTRIBUTES[key]):
            raise ValueError(f"load_file: {name}: {key} = {value!r} is no attribute that a stored weight has")
    return {**attributes, "orig_dtype": _DTYPES[attributes["orig_dtype"]]}
