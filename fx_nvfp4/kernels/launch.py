# mypy: allow-untyped-defs
"""How kernels are started: at once, or kept as a list for a compiler that will start them itself.

Where the device can, a kernel starts while the one before it ends, which hides its launch latency. It has to wait
before it touches memory that another kernel wrote or still reads: the wait is for every kernel before it, as each of
those has waited in its turn.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

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


def dependent_launch(tensor: Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on tensor's device: PDL, and what makes it true."""
    if not tensor.is_cuda or not _supported(tensor.device.index or 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@cache
def _supported(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


class Launch(NamedTuple):
    """One start of a kernel: `programs` of it, with arguments in the order of its parameters that are no constants."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # and num_warps, num_stages, launch_pdl
    writes: tuple[str, ...]  # parameters that point to what the kernel writes


_recorded: ContextVar[list[Launch] | None] = ContextVar("fx_nvfp4_launches", default=None)


def launch(
    kernel: Any, programs: int, *arguments: Any, writes: tuple[str, ...] = ("out_ptr",), **constants: Any
) -> None:
    """Start a kernel on the device of its first tensor, or add it to the list of :func:`recording`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, programs, arguments, constants, writes))
        return
    with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[(programs,)](*arguments, **constants)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches of this thread inside the block, none of which happens."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
