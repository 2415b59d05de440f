"""Where the real checkpoints lie, and how tests write edited copies of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
_MORE = Path(os.environ.get("FX_NVFP4_FIXTURES", REPOSITORY.parent / "shared" / "fixtures")) / "checkpoints"

# The small one in the repository, and every further one that is there.
CHECKPOINTS = {SMALL.name: SMALL} | (
    {p.name: p for p in sorted(_MORE.iterdir()) if p.name != SMALL.name} if _MORE.is_dir() else {}
)

Tensors = dict[str, torch.Tensor]


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """(config, tensors) of a single-file checkpoint."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Any], Tensors], None], source: Path = SMALL) -> Path:
    """A copy of a checkpoint in folder, changed in place by edit(config, tensors)."""
    config, tensors = read(source)
    edit(config, tensors)
    return write(folder, config, tensors)


def sharded(folder: Path, shards: int = 3, source: Path = SMALL) -> Path:
    """A copy of a checkpoint in several shards with an index; neighbours go to different shards."""
    config, tensors = read(source)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(sorted(tensors.items())[shard::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
