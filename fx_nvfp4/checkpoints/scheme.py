"""What config.json (or ModelOpt's hf_quant_config.json, or torchao's metadata) says the quantisation is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..format import BLOCK
from .errors import CheckpointError, mismatch
from .formats import COMPRESSED_TENSORS, CONVENTIONS, MODELOPT, QUARK, TORCHAO, Convention
from .reader import read_json
from .torchao_files import holds_torchao

logger = logging.getLogger("fx_nvfp4.checkpoint")

_HF_QUANT_CONFIG = "hf_quant_config.json"
_WANTED = f"NVFP4 (4-bit float, groups of {BLOCK})"
_SERVED = "fx_nvfp4 loads NVFP4 checkpoints (W4A16, or W4A4 with static global scales) only"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


@dataclass(frozen=True)
class Scheme:
    """A checkpoint's quantisation: who wrote it, and "none" (W4A16) or "static" (W4A4) activations.

    torchao states activations tensor by tensor; for it the field is "none" and is not read.
    weight_only: activations are "none" whatever the checkpoint says, and its input scales are not looked at.
    """

    convention: Convention
    activations: str
    weight_only: bool = False

    def without_activations(self) -> Scheme:
        """The scheme of the same checkpoint's weights alone."""
        return replace(self, activations="none", weight_only=True)


def read_scheme(folder: Path, config: Mapping[str, Any], metadata: Mapping[str, str]) -> Scheme:
    """The scheme of a checkpoint.

    Args:
        folder: the checkpoint, for hf_quant_config.json of older ModelOpt exports.
        config: config.json.
        metadata: the safetensors metadata.

    Raises:
        CheckpointError: not quantised, or by a method or algorithm that is not NVFP4.
    """
    key, quantization = _find(config)
    if quantization is None:
        return _without_config(folder, metadata)
    where = str(folder / "config.json")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if _is_fp8(quantization) and _hf_quant_config(folder).get("quant_algo") in _ALGORITHMS:
        # An FP8 checkpoint was quantised again, and its config.json left as it was.
        logger.info("%s overrules config.json, which says FP8", _HF_QUANT_CONFIG)
        return _modelopt(str(folder / _HF_QUANT_CONFIG), _hf_quant_config(folder))
    if method == MODELOPT.method:
        return _modelopt(where, quantization)
    if method == COMPRESSED_TENSORS.method:
        return _compressed_tensors(where, quantization)
    if method == QUARK.method:
        return _quark(where, quantization)
    if method == TORCHAO.method:
        if holds_torchao(metadata):
            return Scheme(TORCHAO, "none")
        raise mismatch(where, "torchao without NVFP4Tensor metadata", "NVFP4Tensor in safetensors metadata", _SERVED)
    raise mismatch(f"{where}: {key}.quant_method", repr(method), f"one of {sorted(CONVENTIONS)}", _SERVED)


def _find(config: Mapping[str, Any], prefix: str = "") -> tuple[str, Any]:
    """(key, quantization_config), the outermost; multimodal models may have it in a nested config."""
    if config.get("quantization_config") is not None:
        return f"{prefix}quantization_config", config["quantization_config"]
    for key, nested in config.items():
        if key.endswith("_config") and isinstance(nested, dict):
            where, found = _find(nested, f"{prefix}{key}.")
            if found is not None:
                return where, found
    return "quantization_config", None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without quantization_config, nested ones too: the model is built as if it were not quantised."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    nested = {k: without_quantization(v) for k, v in kept.items() if k.endswith("_config") and isinstance(v, dict)}
    return kept | nested


def _is_fp8(quantization: Any) -> bool:
    if not isinstance(quantization, dict):
        return False
    algorithm = str(_modelopt_section(quantization).get("quant_algo"))
    return quantization.get("quant_method") == "fp8" or algorithm.startswith("FP8")


def _hf_quant_config(folder: Path) -> Mapping[str, Any]:
    """What ModelOpt's own file says; empty if there is none."""
    file = folder / _HF_QUANT_CONFIG
    return _modelopt_section(read_json(file)) if file.is_file() else {}


def _modelopt_section(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's entries, which its own file and some config.json nest in "quantization"."""
    nested = quantization.get("quantization")
    return {**quantization, **nested} if isinstance(nested, dict) else quantization


def _object(where: str, value: Any) -> Mapping[str, Any]:
    """value, where config.json has an object or nothing."""
    if value is not None and not isinstance(value, dict):
        raise mismatch(where, f"a JSON {type(value).__name__}", "a JSON object", "export the checkpoint again")
    return value or {}


def _without_config(folder: Path, metadata: Mapping[str, str]) -> Scheme:
    if holds_torchao(metadata):
        return Scheme(TORCHAO, "none")
    if (folder / _HF_QUANT_CONFIG).is_file():
        where = folder / _HF_QUANT_CONFIG
        return _modelopt(str(where), _hf_quant_config(folder))
    raise mismatch(
        folder / "config.json",
        "no quantization_config",
        "a checkpoint quantised to NVFP4",
        "it is not quantised: load it with transformers",
    )


def _modelopt(where: str, quantization: Mapping[str, Any]) -> Scheme:
    quantization = _modelopt_section(quantization)
    algorithm = quantization.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise mismatch(f"{where}: quant_algo", repr(algorithm), f"one of {_ALGORITHMS}", _SERVED)
    group_size = quantization.get("group_size", BLOCK)
    if group_size != BLOCK:
        raise mismatch(f"{where}: group_size", group_size, BLOCK, _SERVED)
    stated = "none" if algorithm == "W4A16_NVFP4" else "static"
    groups = _object(f"{where}: config_groups", quantization.get("config_groups"))
    return Scheme(MODELOPT, _common_activations(where, groups) if groups else stated)


def _compressed_tensors(where: str, quantization: Mapping[str, Any]) -> Scheme:
    groups = _object(f"{where}: config_groups", quantization.get("config_groups"))
    if not groups:
        raise mismatch(f"{where}: config_groups", "none", _WANTED, _SERVED)
    for name, group in groups.items():
        layout = _object(f"{where}: config_groups.{name}", group).get("format") or quantization.get("format")
        if layout != "nvfp4-pack-quantized":
            raise mismatch(f"{where}: config_groups.{name}.format", repr(layout), "'nvfp4-pack-quantized'", _SERVED)
    for feature in ("transform_config", "sparsity_config"):
        if quantization.get(feature):
            raise mismatch(f"{where}: {feature}", "a value", "none", "rotated or sparse checkpoints are not served")
    return Scheme(COMPRESSED_TENSORS, _common_activations(where, groups))


def _common_activations(where: str, groups: Mapping[str, Any]) -> str:
    """How the groups treat activations; they have to agree."""
    found = {name: _group_activations(f"{where}: config_groups.{name}", group) for name, group in groups.items()}
    if len(set(found.values())) > 1:
        raise mismatch(
            f"{where}: config_groups", f"activations {found}", "one scheme for all groups", "mixtures are not served"
        )
    return next(iter(found.values()))


def _group_activations(where: str, group: Any) -> str:
    weights = _object(where, group).get("weights")
    if not _is_nvfp4(weights):
        raise mismatch(f"{where}.weights", _summary(weights), _WANTED, _SERVED)
    inputs = group.get("input_activations")
    if inputs is None:
        return "none"
    if not _is_nvfp4(inputs):
        raise mismatch(f"{where}.input_activations", _summary(inputs), f"{_WANTED} or null", _SERVED)
    if inputs.get("dynamic") not in (False, None, "local"):
        raise mismatch(
            f"{where}.input_activations.dynamic", inputs["dynamic"], "false or 'local' (a static global scale)", _SERVED
        )
    return "static"


def _is_nvfp4(spec: Any) -> bool:
    wanted = {"num_bits": 4, "type": "float", "group_size": BLOCK}
    return isinstance(spec, dict) and all(spec.get(key) == value for key, value in wanted.items())


def _summary(spec: Any) -> str:
    if not isinstance(spec, dict):
        return repr(spec)
    return f"{spec.get('num_bits')}-bit {spec.get('type')}, groups of {spec.get('group_size')}"


def _quark(where: str, quantization: Mapping[str, Any]) -> Scheme:
    for mixture in ("layer_quant_config", "layer_type_quant_config"):
        if quantization.get(mixture):
            raise mismatch(f"{where}: {mixture}", "a value", "one scheme for all layers", "mixtures are not served")
    overall = _object(f"{where}: global_quant_config", quantization.get("global_quant_config"))
    _check_quark(f"{where}: global_quant_config.weight", overall.get("weight"))
    if overall.get("input_tensors") is None:
        return Scheme(QUARK, "none")
    _check_quark(f"{where}: global_quant_config.input_tensors", overall["input_tensors"])
    return Scheme(QUARK, "static")


def _check_quark(where: str, levels: Any) -> None:
    """Quark lists the levels of scaling: fp4 in groups, whose scales are fp8 under one per-tensor scale."""
    found = levels if isinstance(levels, list) else [levels]
    objects = [_object(where, level) for level in found if level is not None]
    shown = [(level.get("dtype"), level.get("qscheme"), level.get("group_size")) for level in objects]
    if shown != [("fp4", "per_group", BLOCK), ("fp8_e4m3", "per_tensor", None)]:
        raise _quark_error(where, shown)


def _quark_error(where: str, shown: list[tuple[Any, Any, Any]]) -> CheckpointError:
    found = "; ".join(f"{dtype} {qscheme} group_size {group}" for dtype, qscheme, group in shown) or "nothing"
    return mismatch(where, found, f"fp4 per_group group_size {BLOCK} with fp8_e4m3 per_tensor scales", _SERVED)
