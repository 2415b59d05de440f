"""Clock, power and temperature of a GPU while it works."""

from __future__ import annotations

import shutil
import subprocess
from types import TracebackType

import torch

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


class DeviceState:
    """Asks nvidia-smi, if there is one, beside what runs in the with block; then ``text`` is its answer, or ""."""

    def __init__(self, device: torch.device) -> None:
        self.text = ""
        self._command: list[str] = []
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            uuid = torch.cuda.get_device_properties(device).uuid
            query = f"--query-gpu={','.join(FIELDS)}"
            self._command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader"]

    def __enter__(self) -> DeviceState:
        self._process = None
        if self._command:
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(self._command, stdout=pipe, stderr=null, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.text = self._process.communicate()[0].strip()
