"""Sorts a checkpoint's tensors into packed weights with their scales, and plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import CheckpointError, mismatch
from .formats import Convention
from .input_scales import WEIGHT_ONLY
from .reader import StoredTensor
from .scheme import Scheme

_EXPORT = "export the checkpoint again"
# The parameters of experts fused in 3-D; their scales' names begin with these.
FUSED = ("gate_up_proj", "up_proj", "down_proj")
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

    def part_name(self, part: str, convention: Convention) -> str:
        """The name of a part by a convention, also of one that is not there."""
        leaf = {
            "codes": convention.codes,
            "block_scale": convention.block_scale,
            "global_scale": convention.global_scale,
            "input_scale": convention.input_scales[0],
        }[part]
        if self.fused:
            return self.name if part == "codes" else f"{self.name}_{leaf}"
        return f"{self.name}.{leaf}"


def collect(tensors: Mapping[str, StoredTensor], scheme: Scheme) -> tuple[list[Source], list[StoredTensor]]:
    """(packed weights, plain tensors), the former of the right dtypes and complete but for input scales.

    Raises:
        CheckpointError: a part is missing, superfluous or of the wrong dtype.
    """
    convention = scheme.convention
    if scheme.weight_only:
        tensors = {name: t for name, t in tensors.items() if not _is_input_scale(name, convention)}
    sources, plain = gather(tensors, convention)
    for tensor in (*plain, *(source["codes"] for source in sources if "codes" in source.parts)):
        if tensor.dtype.startswith("F8_"):
            fix = "mixed FP8/NVFP4 checkpoints are not served"
            raise mismatch(tensor.name, f"{tensor}, an FP8 weight", "NVFP4, bfloat16, float16 or float32", fix)
    for source in sources:
        check(source, convention, scheme.activations)
    return sources, plain


def gather(tensors: Mapping[str, StoredTensor], convention: Convention) -> tuple[list[Source], list[StoredTensor]]:
    """(packed weights, plain tensors) by their names alone: parts may be missing.

    Raises:
        CheckpointError: two tensors are the same part of one weight.
    """
    sources: dict[str, Source] = {}
    rest = {name: t for name, t in tensors.items() if not _add_scale(sources, t, convention)}
    plain = [t for t in rest.values() if not _add_codes(sources, t, convention)]
    return list(sources.values()), plain


def _scale_part(convention: Convention, leaf: str) -> str | None:
    if leaf == convention.block_scale:
        return "block_scale"
    if leaf == convention.global_scale:
        return "global_scale"
    return "input_scale" if leaf in convention.input_scales else None


def _scale_of(name: str, convention: Convention) -> tuple[str, bool, str] | None:
    """(weight, whether it is fused, part) of the scale of that name; None: no scale."""
    owner, _, leaf = name.rpartition(".")
    part = _scale_part(convention, leaf)
    if part is not None:
        return owner, False, part
    for weight in FUSED:
        part = _scale_part(convention, leaf.removeprefix(f"{weight}_")) if leaf.startswith(f"{weight}_") else None
        if part is not None:
            return f"{owner}.{weight}", True, part
    return None


def _is_input_scale(name: str, convention: Convention) -> bool:
    scale = _scale_of(name, convention)
    return scale is not None and scale[2] == "input_scale"


def _add_scale(sources: dict[str, Source], tensor: StoredTensor, convention: Convention) -> bool:
    """File a scale under its weight."""
    scale = _scale_of(tensor.name, convention)
    if scale is not None:
        _file(sources, *scale, tensor)
    return scale is not None


def _add_codes(sources: dict[str, Source], tensor: StoredTensor, convention: Convention) -> bool:
    """File codes under their weight: what has scales, or integers where weights should be."""
    owner, _, leaf = tensor.name.rpartition(".")
    if tensor.name in sources and sources[tensor.name].fused:
        _file(sources, tensor.name, True, "codes", tensor)
    elif leaf == convention.codes and (owner in sources or tensor.dtype in _INTEGERS):
        _file(sources, owner, False, "codes", tensor)
    elif leaf in FUSED and tensor.dtype in _INTEGERS:
        _file(sources, tensor.name, True, "codes", tensor)
    else:
        return False
    return True


def _file(sources: dict[str, Source], name: str, fused: bool, part: str, tensor: StoredTensor) -> None:
    source = sources.setdefault(name, Source(name, fused))
    if part in source.parts:
        raise mismatch(tensor.name, f"it beside {source[part].name}", "one of the two", _EXPORT)
    source.parts[part] = tensor


def check(source: Source, convention: Convention, activations: str) -> None:
    """Raise unless all parts of a packed weight but its input scale are there, with the right dtypes.

    Raises:
        CheckpointError: a part is missing, superfluous or of the wrong dtype.
    """
    for part, dtype in _DTYPES.items():
        tensor = source.parts.get(part)
        if part == "input_scale" and activations == "none":
            if tensor is not None:
                raise mismatch(tensor.name, "an input scale", "none, the config says W4A16", WEIGHT_ONLY)
        elif tensor is None:
            if part == "input_scale":
                continue  # Whoever reads the input scales names all that are missing.
            raise _missing(source, part, convention)
        elif tensor.dtype != dtype:
            raise mismatch(tensor.name, tensor, f"{dtype}, as an NVFP4 weight's {part.replace('_', ' ')}", _EXPORT)


def _missing(source: Source, part: str, convention: Convention) -> CheckpointError:
    beside = next(iter(source.parts.values())).name
    return mismatch(source.part_name(part, convention), "no such tensor", f"{_DTYPES[part]}, beside {beside}", _EXPORT)
