"""The C++ library behind the ops on a CPU: built at the first call, for this CPU, by the compiler that Inductor uses.

Environment variable FX_NVFP4_CPU: "c++" (default), or "plain" for the plain PyTorch bodies.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import NVFP4Warning

VARIABLE = "FX_NVFP4_CPU"
_SOURCE = Path(__file__).with_name("product.cpp")
_Fields = Sequence[tuple[str, Any]]


def _fields(pointers: str, numbers: str) -> _Fields:
    return [(n, ctypes.c_void_p) for n in pointers.split()] + [(n, ctypes.c_int64) for n in numbers.split()]


class Product(ctypes.Structure):
    """The arguments of one product; see product.cpp for each."""

    _fields_ = _fields(
        "x codes scales row_scale expert_scale bias ids y",
        "x_row codes_expert codes_row scales_expert scales_row row_scale_expert row_scale_row"
        " expert_scale_expert bias_expert bias_row slots top experts n k dtype threads",
    )


class Rounding(ctypes.Structure):
    """The arguments that round activations; see product.cpp for each."""

    _fields_ = _fields("x group scale inverse out", "x_row rows groups k dtype threads")


class Sum(ctypes.Structure):
    """The arguments of one weighted sum; see product.cpp for each."""

    _fields_ = _fields("y ids weights out", "tokens top experts n dtype threads")


@dataclass(frozen=True)
class Library:
    """isa: the instruction set that it was built for, in words."""

    isa: str
    _loaded: ctypes.CDLL

    def product(self, arguments: Product) -> None:
        if self._loaded.fx_nvfp4_product(ctypes.byref(arguments)):
            raise MemoryError(f"fx_nvfp4: no memory to lay out {arguments.slots // arguments.top} rows of activations")

    def round(self, arguments: Rounding) -> None:
        self._loaded.fx_nvfp4_round(ctypes.byref(arguments))

    def combine(self, arguments: Sum) -> None:
        self._loaded.fx_nvfp4_combine(ctypes.byref(arguments))


def load() -> Library | None:
    """The library, or None where the plain bodies are to run."""
    found = None if _plain_wanted() else _built()
    return found if isinstance(found, Library) else None


def description() -> str:
    """What runs, in words, and why where it is not the library."""
    if _plain_wanted():
        return f"plain PyTorch on cpu ({VARIABLE}=plain)"
    found = _built()
    return f"C++ for {found.isa}" if isinstance(found, Library) else f"plain PyTorch on cpu (no C++ body: {found})"


def _plain_wanted() -> bool:
    wanted = os.environ.get(VARIABLE, "c++")
    if wanted not in ("c++", "plain"):
        raise ValueError(f'environment variable {VARIABLE} must be "c++" or "plain", got {wanted!r}')
    return wanted == "plain"


def _built() -> Library | str:
    with _lock:
        return _build()


@functools.cache
def _build() -> Library | str:
    """The library, or in one line why there is none, which is also said as a warning."""
    from ..lowering.compat import build_cpp  # at the first call, as it imports Inductor

    try:
        loaded = build_cpp(_SOURCE.read_text())
    except Exception as error:  # no compiler, one that fails, a folder that cannot be written: all end alike
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"NVFP4 products on the CPU run as plain PyTorch, several times slower: their C++ body was not built "
            f"({reason}). Install a C++ compiler, g++ or clang++, or name one in CXX; "
            f"or set {VARIABLE}=plain, which silences this",
            NVFP4Warning,
            stacklevel=2,
        )
        return reason
    loaded.fx_nvfp4_isa.restype = ctypes.c_char_p
    return Library(loaded.fx_nvfp4_isa().decode(), loaded)


_lock = threading.Lock()
