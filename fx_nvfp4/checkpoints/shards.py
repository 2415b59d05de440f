"""Writes tensors to safetensors files of a bounded size, holding one file's at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .reader import INDEX, SINGLE

Files = list[tuple[Path, list[str]]]  # a file, and the names of its tensors


def write_shards(folder: Path, groups: Iterable[dict[str, Tensor]], limit: int) -> None:
    """Write all tensors; those of one group share a file, and a file has limit bytes at most, or one group.

    One file is model.safetensors; several have an index. Files of these names that were there are gone afterwards;
    where this raises, they are as before.
    """
    files: Files = []
    try:
        total = _write_all(folder, groups, limit, files)
    except BaseException:
        for file, _ in files:
            file.unlink(missing_ok=True)
        raise
    _name(folder, files, total)


def _write_all(folder: Path, groups: Iterable[dict[str, Tensor]], limit: int, files: Files) -> int:
    """Write files of provisional names, and note them; returns the bytes of all tensors."""
    pending: dict[str, Tensor] = {}
    size = total = 0
    for group in groups:
        added = sum(t.numel() * t.itemsize for t in group.values())
        if pending and size + added > limit:
            _write(folder, files, pending)
            pending, size = {}, 0
        # Copies: what is stored are parts of larger tensors, which safetensors would take for shared memory.
        pending.update({name: t.detach().to("cpu", copy=True).contiguous() for name, t in group.items()})
        size, total = size + added, total + added
    _write(folder, files, pending)
    return total


def _write(folder: Path, files: Files, tensors: dict[str, Tensor]) -> None:
    file = folder / f"unfinished-{len(files) + 1:05}.safetensors"
    files.append((file, list(tensors)))
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def _name(folder: Path, files: Files, total: int) -> None:
    """Give the files the names that loaders look for, now that their number is known, in place of what was there."""
    for old in (folder / SINGLE, folder / INDEX, *folder.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    if len(files) == 1:
        files[0][0].replace(folder / SINGLE)
        return
    for (file, _), name in zip(files, file_names(len(files)), strict=True):
        file.replace(folder / name)
    write_index(folder, [names for _, names in files], total)


def file_names(count: int) -> list[str]:
    """The names that loaders look for, of a checkpoint in so many files."""
    return [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, tensors: Sequence[Sequence[str]], total: int) -> None:
    """Which file holds each tensor, from the names of those in each of several files, and the bytes of all."""
    weight_map = {name: file for file, held in zip(file_names(len(tensors)), tensors, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, as_json(content))


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def write_text(file: Path, text: str) -> None:
    """As a whole, or not at all."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
