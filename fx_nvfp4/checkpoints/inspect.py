"""What a checkpoint holds, read without its model: format, packed weights, their scales, what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .formats import weight_multiplier
from .input_scales import InputScales
from .names import is_kv_scale
from .reader import Reader, StoredTensor, checkpoint_folder, read_json
from .scheme import Scheme, read_scheme
from .sources import Source, check, gather
from .torchao_files import TorchaoWeight, collect_torchao

SCHEMA = 1  # of to_dict(); a change that breaks readers counts it up
_GATE_UP = re.compile(r"(?P<owner>.+)\.(?P<role>gate_proj|up_proj|w1|w3)(\.weight)?")
_GATES = ("gate_proj", "w1")


@dataclass(frozen=True)
class PackedWeight:
    """One weight as stored: a linear layer's, one expert's, or those of all experts.

    Attributes:
        name: as in the checkpoint.
        shape: dense, [N, K] or [E, N, K] (ModelOpt's 3-D experts: [E, K, N], as stored).
        activations: "W4A16", "W4A4 static" or "W4A4 dynamic".
        global_scale: smallest and largest multiplier of the weight; None if there is none to read.
        input_scale: the same of its activations.
        size: bytes with all scales.
    """

    name: str
    shape: tuple[int, ...]
    activations: str
    global_scale: tuple[float, float] | None
    input_scale: tuple[float, float] | None
    size: int


@dataclass(frozen=True)
class Pair:
    """Gate and up projection of one input: the ratio of the larger global scale to the smaller, 1 if equal."""

    name: str
    ratio: float


@dataclass
class Inspection:
    """A checkpoint at a glance.

    Attributes:
        folder, model: where it lies; the class that config.json names.
        producer, activations: whose conventions it follows; "W4A16", "W4A4 static" or, of torchao, per weight.
        packed: packed weights in the order of their names.
        pairs: gate and up projections that are stored apart.
        plain: (dtype, number of tensors, bytes) of what is not packed.
        problems: what keeps it from being loaded, as :func:`fx_nvfp4.load` would say it.
        notes: what is not emulated.
    """

    folder: str
    model: str
    producer: str
    activations: str
    packed: list[PackedWeight] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    plain: list[tuple[str, int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def packed_bytes(self) -> int:
        return sum(w.size for w in self.packed)

    @property
    def dense_bytes(self) -> int:
        """What the packed weights would take in bfloat16."""
        return sum(2 * math.prod(w.shape) for w in self.packed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; "schema" says of which layout."""
        sizes = {"packed_bytes": self.packed_bytes, "dense_bytes": self.dense_bytes}
        return {"schema": SCHEMA, **asdict(self), **sizes}


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read headers and global scales of a checkpoint; its model is not needed.

    Raises:
        CheckpointError: no checkpoint, or one that is not NVFP4.
    """
    folder = checkpoint_folder(path)
    config = read_json(folder / "config.json")
    reader = Reader(folder)
    scheme = read_scheme(folder, config, reader.metadata)
    torchao = scheme.convention.method == "torchao"
    found = Inspection(
        folder=str(folder),
        model=", ".join(_list(config.get("architectures"))) or str(config.get("model_type")),
        producer=scheme.convention.method,
        activations="stated for each weight" if torchao else _activations(scheme.activations),
    )
    tensors = {name: t for name, t in reader.tensors.items() if not is_kv_scale(name)}
    kv_scales = len(reader.tensors) - len(tensors)
    if kv_scales:
        found.notes.append(f"{kv_scales} scales of a quantised KV cache are not applied")
    input_scales = InputScales(reader, scheme.convention)
    if torchao:
        plain = _add_torchao(found, reader, tensors, input_scales)
    else:
        plain = _add_sources(found, reader, scheme, tensors, input_scales)
    try:
        input_scales.check()
    except CheckpointError as error:
        found.problems.append(str(error))
    found.packed.sort(key=lambda w: _natural(w.name))
    found.pairs = list(_pairs(found.packed))
    for dtype in sorted({t.dtype for t in plain}):
        sizes = [t.size for t in plain if t.dtype == dtype]
        found.plain.append((dtype, len(sizes), sum(sizes)))
    return found


def _add_sources(
    found: Inspection,
    reader: Reader,
    scheme: Scheme,
    tensors: Mapping[str, StoredTensor],
    input_scales: InputScales,
) -> list[StoredTensor]:
    sources, plain = gather(tensors, scheme.convention)
    for source in sources:
        try:
            check(source, scheme.convention, scheme.activations)
            found.packed.append(_weight(reader, scheme, source, input_scales))
        except CheckpointError as error:
            found.problems.append(str(error))
    return plain


def _weight(reader: Reader, scheme: Scheme, source: Source, input_scales: InputScales) -> PackedWeight:
    # ModelOpt stores 3-D experts with K first of the two, and packs along it.
    packed_dim = -2 if source.fused else -1
    shape = list(source["codes"].shape)
    shape[packed_dim] *= 2
    input_scale = None
    if scheme.activations != "none":
        stored = source.parts.get("input_scale")
        if stored is None:
            input_scales.missing(source.part_name("input_scale", scheme.convention))
        else:
            input_scale = _range(input_scales.multiplier(stored))
    return PackedWeight(
        name=source.name,
        shape=tuple(shape),
        activations=_activations(scheme.activations),
        global_scale=_range(weight_multiplier(reader, source["global_scale"], scheme.convention)),
        input_scale=input_scale,
        size=sum(part.size for part in source.parts.values()),
    )


def _add_torchao(
    found: Inspection, reader: Reader, tensors: Mapping[str, StoredTensor], input_scales: InputScales
) -> list[StoredTensor]:
    try:
        weights, plain = collect_torchao(reader.metadata, tensors, input_scales)
    except CheckpointError as error:
        found.problems.append(str(error))
        return list(tensors.values())
    found.packed += [_torchao_weight(reader, weight) for weight in weights]
    return plain


def _torchao_weight(reader: Reader, weight: TorchaoWeight) -> PackedWeight:
    def scale(part: str) -> tuple[float, float] | None:
        return _range(reader.read(weight.parts[part])) if part in weight.parts else None

    *rows, packed = weight.parts["qdata"].shape
    mode = "none" if not weight.activations else "dynamic" if weight.dynamic else "static"
    return PackedWeight(
        name=weight.name,
        shape=(*rows, packed * 2),
        activations=_activations(mode),
        global_scale=scale("per_tensor_scale"),
        input_scale=scale("act_per_tensor_scale"),
        size=sum(part.size for part in weight.parts.values()),
    )


def _pairs(packed: Sequence[PackedWeight]) -> Iterator[Pair]:
    roles: dict[str, dict[bool, PackedWeight]] = {}
    for weight in packed:
        match = _GATE_UP.fullmatch(weight.name)
        if match and weight.global_scale:
            roles.setdefault(match["owner"], {})[match["role"] in _GATES] = weight
    for owner, found in roles.items():
        if len(found) == 2:
            (gate, _), (up, _) = (found[True].global_scale or (1.0, 1.0)), (found[False].global_scale or (1.0, 1.0))
            yield Pair(owner, max(gate, up) / min(gate, up))


def _activations(mode: str) -> str:
    return "W4A16" if mode == "none" else f"W4A4 {mode}"


def _range(scale: Tensor) -> tuple[float, float]:
    return scale.min().item(), scale.max().item()


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _list(value: object) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)] if value else []
