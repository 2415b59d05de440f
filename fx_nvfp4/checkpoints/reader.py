"""The files of a checkpoint folder: JSON and safetensors, single or in shards, and nothing else."""

from __future__ import annotations

import json
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, mismatch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPLETE = "copy or download the checkpoint again, completely"
# safetensors' names; what is not here is not read.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor; dtype in safetensors' own names ("U8", "F8_E4M3", "BF16").

    offset, size: where its bytes begin in the file, and how many they are.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """KeyError for dtypes that torch does not have."""
        return DTYPES[self.dtype]

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
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)
        if (folder / SINGLE).is_file():
            self._add(folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._add_shards(folder)
        else:
            raise _no_safetensors(folder)

    def read(self, tensor: StoredTensor) -> Tensor:
        """The whole tensor on the CPU.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if tensor.dtype not in DTYPES:
            raise mismatch(tensor.name, tensor, f"one of {', '.join(DTYPES)}", "export the checkpoint again")
        whole = torch.empty(tensor.shape, dtype=tensor.torch_dtype)
        self.read_into(tensor, whole)
        return whole

    def read_into(self, tensor: StoredTensor, part: Tensor, start: int = 0) -> None:
        """Fill a contiguous CPU tensor with the bytes of a stored one from byte ``start`` on; several threads may.

        No part of the file stays mapped, so that reading takes no memory but the part's own.

        Raises:
            CheckpointError: the file cannot be read.
        """
        view = memoryview(part.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            done = 0
            while done < len(view):
                count = os.preadv(self._open[tensor.file], [view[done:]], tensor.offset + start + done)
                if not count:
                    raise OSError("the file ends before it")
                done += count
        except OSError as error:
            raise mismatch(f"{tensor.name} in {tensor.file}", f"an error ({error})", str(tensor), _COMPLETE) from error

    def _add(self, file: Path) -> set[str]:
        try:
            with safe_open(file, framework="pt", device="cpu"):
                pass  # it checks the header, and that the file is as long as it says
            self._open[file] = os.open(file, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise mismatch(file, f"an error ({error})", "a whole safetensors file", _COMPLETE) from error
        header, data = _read_header(file)
        self.metadata.update(header.pop("__metadata__", None) or {})
        for name in sorted(header):
            if name in self.tensors:
                raise mismatch(
                    name,
                    f"it in {self.tensors[name].file.name} and in {file.name}",
                    "it in one shard",
                    "delete shards that are left over from another version of the checkpoint",
                )
            entry = header[name]
            if not isinstance(entry, dict):
                raise mismatch(f"{name} in {file}", repr(entry), "a dtype, a shape and data_offsets by name", _COMPLETE)
            start, end = entry["data_offsets"]
            self.tensors[name] = StoredTensor(
                name, file, entry["dtype"], tuple(entry["shape"]), data + start, end - start
            )
        return set(header)

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


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(entries by name, where the data begins) of a safetensors file: u64 length, JSON, data."""
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        return json.loads(raw.read(length)), 8 + length


def _close(files: dict[Path, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: no such file, or it is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise mismatch(file, f"no readable file ({error.strerror})", "a JSON file", _COMPLETE) from error
    except (ValueError, RecursionError) as error:
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
