"""What the backend does under a torch that it was not tested with: it says so, once, and stays right.

Private names of torch may be gone, or mean something else. Where one that is needed is gone, or compiling fails, the
graph goes to Inductor as it is: packed tensors still run the ops, by dispatch, and dequantisation that a model spells
is computed as it is written. Where Inductor fails as well, the graph runs op by op.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .lowering import versions
from .report import NotEmulatedError, NVFP4Warning
from .torchao_dispatch import emulated

Compiled = Callable[..., Any]


def compile_untested(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    emulate: Callable[[], Compiled],
    patches: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Compiled:
    """What emulate returns, or the graph compiled without any pass of ours.

    Args:
        gm, example_inputs: as Dynamo calls a backend.
        emulate: compiles with the pass.
        patches: of Inductor's config.
        options: ours; "strict" raises where there would be a fall-back.

    Raises:
        NotEmulatedError: strict, and a private name is gone.
    """
    missing = versions.missing_names()
    if missing and options["strict"]:
        raise NotEmulatedError(_doubt(missing))
    _warn_once(_doubt(missing))
    if not missing:
        original = copy.deepcopy(gm)  # a compilation that fails may have changed it
        try:
            return emulate()
        except Exception as error:
            # Dynamo's own are no failures: they make it trace anew.
            if options["strict"] or type(error).__module__.startswith("torch._dynamo"):
                raise
            _warn_once(f"{_doubt([])} Recognising NVFP4 failed ({type(error).__name__}: {error}); {_CONSEQUENCE}")
            gm = original
    return _without_pass(gm, example_inputs, patches, options["codegen"])


_CONSEQUENCE = (
    "packed tensors still run NVFP4 ops, and dequantisation that the model spells runs as it is written, more slowly"
)


def _doubt(missing: Sequence[str]) -> str:
    text = (
        f"nvfp4_emu: torch {torch.__version__} is none of the releases that it was tested with, {versions.tested()}; "
        "install one of these, or compare with eager."
    )
    return f"{text} It lacks {', '.join(missing)}: {_CONSEQUENCE}" if missing else text


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, NVFP4Warning, stacklevel=5)


def _without_pass(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any], codegen: bool
) -> Compiled:
    if not codegen:
        return gm.forward
    try:
        with emulated():
            return torch._inductor.compile(gm, list(example_inputs), options=dict(patches))
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo"):
            raise
        _warn_once(f"{_doubt([])} Inductor failed ({type(error).__name__}: {error}); the graph runs op by op")
        return gm.forward
