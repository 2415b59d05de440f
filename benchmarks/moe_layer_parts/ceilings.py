"""What the device reaches in the same run: bytes read a second, and operations a second of a dense bf16 product.

Under load a GPU runs at its power cap, and slower than after a pause. Both are therefore measured at the start, and
again right after every cell, while the device is as warm as the cell left it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .shapes import Rates
from .timing import event_times


class Ceilings:
    """Measures :class:`Rates`; holds the buffers for it, and the rates ``at_start``."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        size, count = (8192, 1 << 28) if on_gpu else (512, 1 << 22)
        self.device, self.repeats = device, 20 if on_gpu else 3
        self.numbers = torch.randn(count, device=device)  # 1 GiB on a GPU, beyond any cache
        self.a, self.b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        self.out = torch.empty_like(self.a)
        self._matmul()
        self.read()
        self.at_start = self.measure()

    def measure(self) -> Rates:
        """Rates now; the product first, which depends on what the device has just done."""
        matmul = 2 * self.a.shape[0] ** 3 / self._median(self._matmul)
        return Rates(self.numbers.nbytes / self._median(self.read), matmul)

    def read(self) -> torch.Tensor:
        """A sum: reads every byte once, and writes next to none."""
        return self.numbers.sum()

    def _matmul(self) -> None:
        torch.mm(self.a, self.b.T, out=self.out)

    def _median(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            return statistics.median(event_times([call] * self.repeats))
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
