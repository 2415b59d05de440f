"""``load``: an NVFP4 checkpoint of ModelOpt, compressed-tensors, Quark or torchao as a transformers model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoints import skeleton
from .checkpoints.assemble import Assembler
from .checkpoints.errors import CheckpointError
from .checkpoints.local import keep_experts
from .checkpoints.plan import Plan, make_plan
from .checkpoints.reader import Reader, checkpoint_folder, read_json
from .checkpoints.scheme import Scheme, read_scheme
from .dialects import get_dialect
from .parallel.shard import Shards
from .prepack_model import tile_all
from .state_dict import keep_state_dicts_canonical
from .tensor import NVFP4Weight

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["CheckpointError", "StoredWeights", "load", "read_weights"]

logger = logging.getLogger("fx_nvfp4.checkpoint")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("checkpoint", "none")


def load(
    path: str | Path,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    *,
    dialect: str = "hardware",
    activations: str = "checkpoint",
    prepack: bool | None = None,
    progress: bool = True,
    mesh: DeviceMesh | None = None,
    tokens: str = "shared",
) -> Any:
    """Load an NVFP4 checkpoint; packed weights stay packed all the way (:class:`fx_nvfp4.NVFP4Weight`).

    Args:
        path: a folder with config.json and model.safetensors, or shards and model.safetensors.index.json.
            Nothing is downloaded and no pickle is read.
        device: where the weights go; default the CPU.
        dtype: float32, bfloat16 or float16: of everything that is not packed, and what packed weights show;
            default what config.json says. float32 makes the whole model compute in float32.
        dialect: the rule that rounds the activations of W4A4 models: "hardware", "producer" (the one that
            wrote the checkpoint), or a name in :data:`fx_nvfp4.dialects.DIALECTS`.
        activations: "checkpoint" quantises the activations of W4A4 models as the checkpoint says; "none" loads
            such a checkpoint's weights alone, and its input scales are not looked at.
        prepack: put packed weights into tiles, where they lie and can be (:func:`fx_nvfp4.prepack`); default on CUDA
            and ROCm devices, of models in 16 bits, alone: there kernels read tiles as they are.
        progress: show a progress bar.
        mesh: read this rank's experts alone; the model is then as :func:`fx_nvfp4.shard_experts` leaves it with
            dim="expert".
        tokens: as for that function.

    Returns:
        The transformers model that config.json names, in eval mode, nothing of it requiring a gradient.

    Raises:
        CheckpointError: the checkpoint is no NVFP4 checkpoint, or is incomplete or damaged. Everything but the
            contents of block scales and plain weights is checked before memory is allocated.
        ValueError: an unknown dialect, dtype or value of activations; a device that is not there; experts that cannot
            be shared among the ranks.
        ImportError: transformers is not installed.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"load: dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    if activations not in _ACTIVATIONS:
        raise ValueError(f"load: activations must be one of {_ACTIVATIONS}, got {activations!r}")
    if dialect != "producer":
        get_dialect(dialect)
    target = _device(device)
    opened = _open(path, dtype, activations)
    plan, model = opened.plan, opened.model
    shards = None if mesh is None else Shards(model, mesh, tokens, plan.packed)
    if shards is not None:
        plan = keep_experts(plan, shards.kept)
    generation_config = skeleton.read_generation_config(model, opened.folder)

    rule = opened.scheme.convention.dialect if dialect == "producer" else dialect
    weights = Assembler(opened.reader, target, model.config.dtype, rule, progress).tensors(plan)
    if prepack is None:
        prepack = target.type == "cuda" and model.config.dtype.itemsize == 2
    if prepack:
        logger.info("%s", tile_all(weights.items()))
    skeleton.initialize_buffers(model, target)
    _install(model, weights, plan)
    keep_state_dicts_canonical(model)
    if shards is not None:
        shards.install()
    if generation_config is not None:
        model.generation_config = generation_config
    return model


def _device(device: torch.device | str | int | None) -> torch.device:
    """Where weights go; raise ValueError for what is none here, before anything is read."""
    try:
        target = torch.device("cpu" if device is None else device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f'load: device {device!r}: {reason}; "cpu" and, with a GPU, "cuda" are there') from None
    return target


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose headers were read and checked, and the model without values that it is for."""

    folder: Path
    reader: Reader
    scheme: Scheme
    model: Any
    plan: Plan


def _open(path: str | Path, dtype: torch.dtype | None, activations: str) -> _Opened:
    folder = checkpoint_folder(path)
    config = read_json(folder / "config.json")
    reader = Reader(folder)
    scheme = read_scheme(folder, config, reader.metadata)
    if activations == "none":
        scheme = scheme.without_activations()
    skeleton.check_layers(config, len(reader.tensors), folder / "config.json")
    model = skeleton.build(config, dtype, folder / "config.json")
    return _Opened(folder, reader, scheme, model, make_plan(reader, scheme, model))


@dataclass(frozen=True)
class StoredWeights:
    """Some packed weights of a checkpoint by parameter name, and which of them interleave gate and up rows."""

    weights: dict[str, NVFP4Weight]
    interleaved: frozenset[str]


def read_weights(
    path: str | Path,
    device: torch.device | str,
    choose: Callable[[Mapping[str, Any]], Collection[str]],
) -> StoredWeights:
    """Read only those packed weights of a checkpoint whose parameter names ``choose`` picks from all.

    Raises:
        CheckpointError, ImportError: as :func:`load`.
    """
    opened = _open(path, None, "checkpoint")
    reader, plan, model = opened.reader, opened.plan, opened.model
    chosen = set(choose({**plan.packed, **plan.torchao}))
    some = replace(
        plan,
        packed={name: p for name, p in plan.packed.items() if name in chosen},
        torchao={name: w for name, w in plan.torchao.items() if name in chosen},
        dense={},
    )
    assembler = Assembler(reader, torch.device(device), model.config.dtype, "hardware", progress=False)
    weights = {name: weight for name, weight in assembler.tensors(some).items() if isinstance(weight, NVFP4Weight)}
    return StoredWeights(weights, frozenset(name for name, p in some.packed.items() if p.layout.interleaved))


def _install(model: Any, weights: dict[str, Tensor], plan: Plan) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        value = torch.nn.Parameter(weight, requires_grad=False) if name in parameters else weight
        skeleton.set_tensor(model, name, value)
    model.tie_weights(missing_keys=set(plan.tied), recompute_mapping=False)
