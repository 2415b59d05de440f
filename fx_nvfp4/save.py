"""``save``: a packed transformers model as a checkpoint in ModelOpt's or compressed-tensors' form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .checkpoints import skeleton
from .checkpoints.describe import hf_quant_config, quantization_config
from .checkpoints.formats import COMPRESSED_TENSORS, MODELOPT, Convention
from .checkpoints.shards import as_json, write_shards, write_text
from .checkpoints.stored import dense_modules, stored_tensors
from .ops import UNCALIBRATED
from .parallel.experts import is_sharded
from .tensor import NVFP4Weight

_CONVENTIONS = {c.method: c for c in (MODELOPT, COMPRESSED_TENSORS)}


def save(model: Any, path: str | Path, producer: str = "modelopt", *, shard_size: int = 5_000_000_000) -> None:
    """Write a checkpoint that the producer's own loaders, and :func:`fx_nvfp4.load`, read: the same bytes come back.

    Tensors get the names of the original checkpoint of the model's family, as transformers knows them. ModelOpt's form
    stores Llama 4's and gpt-oss' experts fused in 3-D, compressed-tensors' stores all experts one by one. Tokenizer
    files are not written: tokenizer.save_pretrained(path) does it.

    Args:
        model: a transformers model whose packed weights (:class:`fx_nvfp4.NVFP4Weight`) are all weight-only, or all
            have static activation scales.
        path: a folder, made if need be; a checkpoint that it holds is replaced.
        producer: "modelopt" (global scales as multipliers) or "compressed-tensors" (as reciprocals).
        shard_size: bytes of one safetensors file, at most.

    Raises:
        ValueError: another producer, or activations that these forms do not have: dynamic, mixed, not yet calibrated;
            a model that holds some of its experts alone.
        TypeError: not a transformers model; :func:`fx_nvfp4.save_file` takes any state dict.
        CheckpointError: a weight that the form has no place for; names it.
    """
    if producer not in _CONVENTIONS:
        raise ValueError(f"save: producer must be one of {sorted(_CONVENTIONS)}, got {producer!r}")
    if not skeleton.is_pretrained(model):
        raise TypeError(
            f"save: expected a transformers model, got {type(model).__name__}; its state dict can be stored with "
            "fx_nvfp4.save_file(model.state_dict(), path)"
        )
    if getattr(getattr(model, "nvfp4_preparation", None), "fused", None):
        raise ValueError("save: prepare() changed the names of experts, which no loader knows: save, then prepare")
    if is_sharded(model):
        raise ValueError(
            "save: this rank holds a part of the model alone, of experts or linear layers: save the model before it is "
            "sharded, on one rank, or load fx_nvfp4.sharded_state_dict(model) into one that is whole"
        )
    convention, activations = _CONVENTIONS[producer], _activations(model)
    described = _description(model, convention, activations)  # before anything is written: it may fail
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, stored_tensors(model, convention), shard_size)
    for name, text in described.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_text(folder / name, text)


def _description(model: Any, convention: Convention, activations: str) -> dict[str, str | None]:
    """The files beside the weights, as text; None: one of an earlier checkpoint that would say what is no longer so."""
    ignore = dense_modules(model, convention)
    config = skeleton.written_config(model)
    config["quantization_config"] = quantization_config(convention, activations, ignore)
    return {
        "config.json": as_json(config),
        "hf_quant_config.json": as_json(hf_quant_config(activations, ignore)) if convention is MODELOPT else None,
        # Not by its save_pretrained, which refuses settings that published models have.
        "generation_config.json": model.generation_config.to_json_string() if model.can_generate() else None,
    }


def _activations(model: nn.Module) -> str:
    """How all packed weights treat activations: "none" or "static"."""
    found = {p.data.activations: name for name, p in model.named_parameters() if isinstance(p.data, NVFP4Weight)}
    if not found:
        raise ValueError("save: the model has no packed weight; quantize_ packs, save_pretrained stores dense models")
    for mode, fix in (
        (UNCALIBRATED, "run data with fx_nvfp4.calibrate(model)"),
        ("dynamic", 'these forms have static scales only: NVFP4Config(activations="static"), or "none"'),
    ):
        if mode in found:
            raise ValueError(f"save: {found[mode]} has {mode} activations; {fix}")
    if len(found) > 1:
        raise ValueError(f"save: {found['none']} is weight-only and {found['static']} is not; a file says one for all")
    return next(iter(found))
