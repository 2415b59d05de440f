# mypy: allow-untyped-defs
"""Kernels that start while the one before them ends, where the device can: its launch latency is hidden.

A kernel launched so has to wait before it touches memory that another kernel wrote or still reads: the wait is for
every kernel before it, as each of those has waited in its turn.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns when all kernels before this one have ended, and lets the next one start to wait; see the module."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def dependent_launch(tensor: Tensor) -> dict[str, bool]:
    """Keyword arguments of a launch on tensor's device: PDL, and what makes it true."""
    if not tensor.is_cuda or not _supported(tensor.device.index or 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@cache
def _supported(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
