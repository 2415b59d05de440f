"""What loading a checkpoint takes: seconds, and the most memory on the host and on the device."""

from __future__ import annotations

import gc
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Loading:
    """One call of :func:`fx_nvfp4.load`.

    Attributes:
        seconds: of the call, to the end of the device's work.
        checkpoint: bytes of the files of tensors.
        size: bytes of the model's parameters and buffers.
        host_peak: bytes by which the process' resident memory grew at the most; None where Linux does not tell. A model
            on the CPU is part of it.
        device_peak: most bytes allocated on a CUDA device beside what was before; None elsewhere.
    """

    seconds: float
    checkpoint: int
    size: int
    host_peak: int | None
    device_peak: int | None


def measured_load(
    folder: Path, device: torch.device, activations: str, prepack: bool | None = None
) -> tuple[Any, Loading]:
    """The model in bfloat16, and what loading it took."""
    release(device)
    cuda = device.type == "cuda"
    before_host = _forget_peak()
    before_device = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    model = load(folder, device, torch.bfloat16, activations=activations, prepack=prepack, progress=False)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak_host = _resident("VmHWM")
    return model, Loading(
        seconds,
        checkpoint=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        size=model_bytes(model),
        host_peak=None if before_host is None or peak_host is None else peak_host - before_host,
        device_peak=torch.cuda.max_memory_allocated(device) - before_device if cuda else None,
    )


def model_bytes(model: torch.nn.Module) -> int:
    """A packed parameter counts with the tensors that it consists of."""
    parts = []
    for tensor in (*model.parameters(), *model.buffers()):
        names = getattr(tensor.data, "tensor_data_names", None)
        parts += [tensor] if names is None else [getattr(tensor.data, name) for name in names]
    return sum(part.numel() * part.element_size() for part in parts)


def release(device: torch.device) -> None:
    """Give memory back, and count the device's peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _forget_peak() -> int | None:
    """Resident bytes now, from which on the peak is counted; None where that cannot be had."""
    try:
        _CLEAR.write_text("5")  # see proc(5)
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
