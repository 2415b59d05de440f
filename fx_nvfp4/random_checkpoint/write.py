"""Writes a checkpoint folder shard by shard, tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..checkpoints.shards import file_names, write_index, write_json
from . import qwen3_moe
from .qwen3_moe import LAYOUTS, Sizes
from .tensors import RandomTensor

# safetensors writes wide dtypes first, so that everything is aligned.
_DTYPES = ("F32", "BF16", "F8_E4M3", "U8")


def write_checkpoint(
    folder: str | Path,
    like: str,
    sizes: Sizes | None = None,
    *,
    shard_size: int = 5_000_000_000,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Write a W4A4 checkpoint of random weights; a few MB of memory are used, whatever its size.

    Args:
        folder: a new or empty one.
        like: whose names, dtypes, shapes and config: "modelopt" or "compressed-tensors".
        sizes: of the model; default Qwen3-30B-A3B's.
        shard_size: most bytes of a shard, but for single larger tensors.
        seed: equal seeds give equal bytes.
        progress: show a bar.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: unknown layout, shard_size below 1, or the folder is not empty.
    """
    folder, sizes = Path(folder), sizes or Sizes()
    if like not in LAYOUTS:
        raise ValueError(f"like must be one of {sorted(LAYOUTS)}, got {like!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1 byte, got {shard_size}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    generator = np.random.default_rng(seed)
    shards = list(_shards(qwen3_moe.tensors(sizes, like, generator), shard_size))
    total = sum(t.size for shard in shards for t in shard)
    with tqdm(total=total, desc="random checkpoint", unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in zip(file_names(len(shards)), shards, strict=True):
            _write_shard(folder / name, shard, generator, bar)
    if len(shards) > 1:
        write_index(folder, [[t.name for t in shard] for shard in shards], total)
    for name, content in qwen3_moe.configs(sizes, like).items():
        write_json(folder / name, content)
    return total


def _shards(tensors: Iterable[RandomTensor], shard_size: int) -> Iterator[list[RandomTensor]]:
    shard: list[RandomTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size > shard_size:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size
    yield shard


def _write_shard(file: Path, shard: Sequence[RandomTensor], generator: np.random.Generator, bar: Any) -> None:
    """A safetensors file: length of the header (u64), header as JSON padded to 8 bytes, tensors back to back."""
    ordered = sorted(shard, key=lambda t: (_DTYPES.index(t.dtype), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for piece in tensor.pieces(generator):
                out.write(piece)
                bar.update(len(piece))
