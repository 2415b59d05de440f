"""Moves stored tensors to where they belong, in pieces and in parallel, so that loading needs no memory of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reader import Reader, StoredTensor

PIECE = 1 << 24  # bytes that a worker reads at once, unless one row of a tensor is longer
_WORKERS = 8

# Given a piece in its stored dtype and the number of its first row in dim 0; raises if the numbers are not right.
Check = Callable[[Tensor, int], None]


@dataclass(frozen=True)
class Move:
    """A stored tensor and its place: a view of the stored shape, on any device, in any dtype and with any strides."""

    stored: StoredTensor
    place: Tensor
    check: Check | None = None


class Mover:
    """One worker: reads into the place itself where it can, else through a buffer, which is pinned for CUDA."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def move(self, job: Move) -> None:
        """Fill the place.

        Raises:
            CheckpointError: the file cannot be read, or the check failed.
        """
        place = job.place if job.place.dim() else job.place.view(1)
        if not place.numel():
            return
        row = job.stored.size // len(place)
        step = max(1, PIECE // max(row, 1))
        for first in range(0, len(place), step):
            part = place[first : first + step]
            piece = part if _is_plain(part, job.stored) else self._staged(part, job.stored)
            self._reader.read_into(job.stored, piece, first * row)
            if job.check is not None:
                job.check(piece, first)
            if piece is not part:
                part.copy_(piece)

    def _staged(self, part: Tensor, stored: StoredTensor) -> Tensor:
        size = part.numel() * stored.torch_dtype.itemsize
        if self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, PIECE), dtype=torch.uint8, pin_memory=part.is_cuda)
        return self._buffer[:size].view(stored.torch_dtype).view(part.shape)


def move_all(reader: Reader, jobs: Iterable[Move], bar: Any) -> None:
    """Carry all jobs out, in the order of the files, several at once.

    Args:
        bar: tqdm's, counting bytes.

    Raises:
        CheckpointError: as :meth:`Mover.move`, for the first job that failed.
    """
    ordered = sorted(jobs, key=lambda job: (job.stored.file, job.stored.offset))
    waiting, lock, failed = iter(ordered), threading.Lock(), threading.Event()

    def work() -> None:
        mover = Mover(reader)
        while not failed.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                mover.move(job)
            except BaseException:
                failed.set()
                raise
            with lock:
                bar.update(job.stored.size)

    workers = max(1, min(_WORKERS, os.cpu_count() or 1, len(ordered)))
    with ThreadPoolExecutor(workers, "fx_nvfp4-load") as pool:
        try:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        except BaseException:  # an interrupt reaches this thread alone
            failed.set()
            raise


def _is_plain(part: Tensor, stored: StoredTensor) -> bool:
    """Whether the file's bytes are the part's own."""
    return part.device.type == "cpu" and part.dtype == stored.torch_dtype and part.is_contiguous()
