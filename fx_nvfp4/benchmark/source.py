"""The checkpoint that is timed: a given one, or random weights for a config."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.reader import read_json
from ..random_checkpoint import Sizes, write_checkpoint

# Of a Qwen3-MoE config, by the names of Sizes; transformers writes some in either of two ways.
_SIZES = {
    "layers": ("num_hidden_layers",),
    "experts": ("num_experts", "num_local_experts"),
    "top": ("num_experts_per_tok",),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
}


@contextmanager
def opened(model: Path, layers: int | None = None) -> Iterator[Path]:
    """The folder of a checkpoint: model itself if it holds weights, else a temporary one with random weights.

    Args:
        model: a folder, or a config.json. Random weights can be made for Qwen3-MoE configs.
        layers: so many of the config's layers.

    Raises:
        CheckpointError: there is no config.
        ValueError: random weights are needed, and the config is of another family, or lacks a size; layers are given
            for a checkpoint, or more than there are.
    """
    if model.is_dir() and any(model.glob("*.safetensors*")):
        if layers is not None:
            raise ValueError(f"layers are chosen of a config, and {model} is a checkpoint: give its config.json")
        yield model
        return
    sizes = sizes_of(read_json(model / "config.json" if model.is_dir() else model))
    if layers is not None:
        if not 1 <= layers <= sizes.layers:
            raise ValueError(f"expected 1 to {sizes.layers} layers, as the config has, found {layers}")
        sizes = replace(sizes, layers=layers)
    with tempfile.TemporaryDirectory(prefix="fx_nvfp4_bench_") as folder:
        write_checkpoint(folder, "modelopt", sizes)
        yield Path(folder)


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Raises ValueError as :func:`opened` says."""
    family = config.get("model_type")
    if family != "qwen3_moe":
        raise ValueError(f"random weights are made for configs of qwen3_moe, and not {family!r}: give a checkpoint")
    found = {name: next((config[key] for key in keys if key in config), None) for name, keys in _SIZES.items()}
    missing = [_SIZES[name][0] for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"the config has no {', '.join(missing)}")
    return Sizes(**{name: int(value) for name, value in found.items() if value is not None})
