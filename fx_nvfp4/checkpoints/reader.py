"""The files of a checkpoint folder: JSON and safetensors, single or in shards, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, mismatch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPLETE = "copy or download the checkpoint again, completely"


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor; dtype in safetensors' own names ("U8", "F8_E4M3", "BF16")."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Reader:
    """All tensors of a folder by name. Headers are read and cross-checked at once, contents on demand.

    Args:
        folder: holds model.safetensors, or shards and model.safetensors.index.json.

    Attributes:
        tensors: header entries by tensor name.
        metadata: the safetensors metadata of all files, merged.

    Raises:
        CheckpointError: a file is missing, damaged, or disagrees with the index.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        if (folder / SINGLE).is_file():
            self._add(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._add_shards(folder)
        else:
            raise _no_safetensors(folder)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor on the CPU, backed by the mapped file: copy what is to be kept.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            return self._open[tensor.file].get_tensor(tensor.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise mismatch(f"{tensor.name} in {tensor.file}", f"an error ({error})", str(tensor), _COMPLETE) from error

    def _add(self, file: Path) -> set[str]:
        try:
            handle = safe_open(file, framework="pt", device="cpu")
            names = set(handle.keys())
            self.metadata.update(handle.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise mismatch(file, f"an error ({error})", "a whole safetensors file", _COMPLETE) from error
        self._open[file] = handle
        for name in sorted(names):
            if name in self.tensors:
                raise mismatch(
                    name,
                    f"it in {self.tensors[name].file.name} and in {file.name}",
                    "it in one shard",
                    "delete shards that are left over from another version of the checkpoint",
                )
            entry = handle.get_slice(name)
            self.tensors[name] = StoredTensor(name, file, entry.get_dtype(), tuple(entry.get_shape()))
        return names

    def _add_shards(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise mismatch(folder / INDEX, "no weight_map", "a map of tensor names to shards", _COMPLETE)
        listed: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise mismatch(f"{folder / INDEX}: {name}", repr(shard), "the name of a shard", _COMPLETE)
            listed.setdefault(shard, set()).add(name)
        for shard in sorted(listed):
            file = folder / shard
            if file.parent != folder or not file.is_file():
                raise mismatch(file, "no such file", f"a shard that {INDEX} lists", _COMPLETE)
            for name in sorted(listed[shard] - self._add(file)):
                raise mismatch(name, f"no such tensor in {shard}", f"it there, as {INDEX} says", _COMPLETE)
        for name in sorted(self.tensors.keys() - weight_map.keys()):
            found = f"it in {self.tensors[name].file.name} but not in {INDEX}"
            raise mismatch(name, found, "every tensor of the shards in the index", _COMPLETE)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: no such file, or it is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise mismatch(file, f"no readable file ({error.strerror})", "a JSON file", _COMPLETE) from error
    except ValueError as error:
        raise mismatch(file, f"no JSON ({error})", "a JSON object", _COMPLETE) from error
    if not isinstance(content, dict):
        raise mismatch(file, f"a JSON {type(content).__name__}", "a JSON object", _COMPLETE)
    return content


def checkpoint_folder(path: str | Path) -> Path:
    """path as a folder that exists.

    Raises:
        CheckpointError: it does not; nothing is downloaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise mismatch(
            folder,
            "a file" if folder.exists() else "nothing",
            "a folder with config.json and safetensors files",
            "load() downloads nothing: fetch the checkpoint first, for example with `hf download`",
        )
    return folder


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        found, fix = f"only pickles ({', '.join(pickles[:3])})", "pickles can run code: convert it to safetensors"
    else:
        found, fix = "neither", _COMPLETE
    return mismatch(folder, found, f"{SINGLE} or {INDEX}", fix)
