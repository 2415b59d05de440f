"""Sorts a checkpoint's tensors into packed weights with their scales, and plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import CheckpointError, mismatch
from .formats import Convention
from .reader import StoredTensor

_EXPORT = "export the checkpoint again"
_FUSED = ("gate_up_proj", "up_proj", "down_proj")
_INTEGERS = ("U8", "I8", "I32")
_DTYPES = {"codes": "U8", "block_scale": "F8_E4M3", "global_scale": "F32", "input_scale": "F32"}


@dataclass
class Source:
    """A packed weight as stored: a linear layer's, one expert's, or (fused) all experts'."""

    name: str
    fused: bool
    parts: dict[str, StoredTensor] = field(default_factory=dict)

    def __getitem__(self, part: str) -> StoredTensor:
        return self.parts[part]

    @property
    def weight_name(self) -> str:
        """The name that the weight would have if it were not packed."""
        return self.name if self.fused else f"{self.name}.weight"


def collect(
    tensors: Mapping[str, StoredTensor], convention: Convention, activations: str
) -> tuple[list[Source], list[StoredTensor]]:
    """(packed weights, plain tensors), the former complete and of the right dtypes.

    Raises:
        CheckpointError: a part is missing, superfluous or of the wrong dtype.
    """
    sources: dict[str, Source] = {}
    rest = {name: t for name, t in tensors.items() if not _add_scale(sources, t, convention)}
    plain = [t for t in rest.values() if not _add_codes(sources, t, convention)]
    for source in sources.values():
        _check(source, convention, activations)
    return list(sources.values()), plain


def _scale_part(convention: Convention, leaf: str) -> str | None:
    if leaf == convention.block_scale:
        return "block_scale"
    if leaf == convention.global_scale:
        return "global_scale"
    return "input_scale" if leaf in convention.input_scales else None


def _add_scale(sources: dict[str, Source], tensor: StoredTensor, convention: Convention) -> bool:
    """File a scale under its weight."""
    owner, _, leaf = tensor.name.rpartition(".")
    part = _scale_part(convention, leaf)
    if part is not None:
        _file(sources, owner, False, part, tensor)
        return True
    for name in _FUSED:
        part = _scale_part(convention, leaf.removeprefix(f"{name}_")) if leaf.startswith(f"{name}_") else None
        if part is not None:
            _file(sources, f"{owner}.{name}", True, part, tensor)
            return True
    return False


def _add_codes(sources: dict[str, Source], tensor: StoredTensor, convention: Convention) -> bool:
    """File codes under their weight: what has scales, or integers where weights should be."""
    owner, _, leaf = tensor.name.rpartition(".")
    if tensor.name in sources and sources[tensor.name].fused:
        _file(sources, tensor.name, True, "codes", tensor)
    elif leaf == convention.codes and (owner in sources or tensor.dtype in _INTEGERS):
        _file(sources, owner, False, "codes", tensor)
    elif leaf in _FUSED and tensor.dtype in _INTEGERS:
        _file(sources, tensor.name, True, "codes", tensor)
    else:
        return False
    return True


def _file(sources: dict[str, Source], name: str, fused: bool, part: str, tensor: StoredTensor) -> None:
    source = sources.setdefault(name, Source(name, fused))
    if part in source.parts:
        raise mismatch(tensor.name, f"it beside {source[part].name}", "one of the two", _EXPORT)
    source.parts[part] = tensor


def _check(source: Source, convention: Convention, activations: str) -> None:
    for part, dtype in _DTYPES.items():
        tensor = source.parts.get(part)
        if part == "input_scale" and activations == "none":
            if tensor is not None:
                raise mismatch(tensor.name, "an input scale", "none, the config says W4A16", "correct config.json")
        elif tensor is None:
            raise _missing(source, part, convention)
        elif tensor.dtype != dtype:
            raise mismatch(tensor.name, tensor, f"{dtype}, as an NVFP4 weight's {part.replace('_', ' ')}", _EXPORT)


def _missing(source: Source, part: str, convention: Convention) -> CheckpointError:
    leaf = {
        "codes": convention.codes,
        "block_scale": convention.block_scale,
        "global_scale": convention.global_scale,
        "input_scale": convention.input_scales[0],
    }[part]
    name = f"{source.name}_{leaf}" if source.fused else f"{source.name}.{leaf}"
    if source.fused and part == "codes":
        name = source.name
    beside = next(iter(source.parts.values())).name
    fix = _EXPORT if part != "input_scale" else f"{_EXPORT}, or state in config.json that it is W4A16"
    return mismatch(name, "no such tensor", f"{_DTYPES[part]}, beside {beside}", fix)
