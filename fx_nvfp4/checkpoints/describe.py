"""config.json's quantization_config, and ModelOpt's hf_quant_config.json, as the producers write them."""

from __future__ import annotations

from typing import Any

from ..format import BLOCK
from .formats import COMPRESSED_TENSORS, Convention

# The releases whose entries ours equal; loaders choose by the name.
_MODELOPT = {"name": "modelopt", "version": "0.47.0"}
_COMPRESSED_TENSORS = "0.19.0"


def quantization_config(convention: Convention, activations: str, ignore: list[str]) -> dict[str, Any]:
    """The entry of config.json; activations are "none" or "static", ignore names the modules that stay dense."""
    describe = _compressed_tensors if convention is COMPRESSED_TENSORS else _modelopt
    return describe(activations, ignore)


def hf_quant_config(activations: str, ignore: list[str], kv_cache: str | None = None) -> dict[str, Any]:
    """ModelOpt's own file; kv_cache names the format of a quantised KV cache."""
    quantization = {
        "quant_algo": _algorithm(activations),
        "kv_cache_quant_algo": kv_cache,
        "group_size": BLOCK,
        "exclude_modules": ignore,
    }
    return {"producer": _MODELOPT, "quantization": quantization}


def _algorithm(activations: str) -> str:
    return "NVFP4" if activations == "static" else "W4A16_NVFP4"


def _modelopt(activations: str, ignore: list[str]) -> dict[str, Any]:
    level = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    inputs = {"input_activations": level} if activations == "static" else {}
    return {
        "config_groups": {"group_0": {**inputs, "weights": level, "targets": ["Linear"]}},
        "ignore": ignore,
        "quant_algo": _algorithm(activations),
        "producer": _MODELOPT,
        "quant_method": "modelopt",
    }


def _compressed_tensors(activations: str, ignore: list[str]) -> dict[str, Any]:
    form = "nvfp4-pack-quantized"
    group = {
        "format": form,
        "input_activations": _level("local", "static_minmax") if activations == "static" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _level(False, "memoryless_minmax"),
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _COMPRESSED_TENSORS,
    }


def _level(dynamic: bool | str, observer: str) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": BLOCK,
        "num_bits": 4,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn",
        "strategy": "tensor_group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
