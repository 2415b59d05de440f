"""lm-evaluation-harness runs NVFP4 checkpoints: its model "fx_nvfp4", and its command line with that model known.

The harness finds models by a registry in its own process, which its command cannot be told to fill from outside. So
``python -m fx_nvfp4 lm-eval`` takes the arguments of ``lm_eval`` and registers first. Importing this module does it for
scripts that call ``lm_eval.simple_evaluate(model="fx_nvfp4", ...)``. ``pip install "fx_nvfp4[lm-eval]"``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor

from .checkpoint import load
from .prepare import prepare

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f'lm-eval: pip install "fx_nvfp4[lm-eval]", or -e ".[lm-eval]" in a checkout ({error})'
    ) from error


@register_model("fx_nvfp4")
class NVFP4LM(HFLM):  # type: ignore[misc]  # untyped
    """An NVFP4 checkpoint as a model of the harness, compiled by ``nvfp4_emu``.

    Args of ours, as ``--model_args`` has them, but for the device, which is an option of the harness:
        pretrained: folder of the checkpoint, see :func:`fx_nvfp4.load`.
        dtype: float32, bfloat16 or float16; "auto" as the checkpoint says.
        activations: "checkpoint", or "none" for its weights alone (W4A16).
        dialect: the rule that rounds activations; "hardware", "producer", or one of its names.
        prepare: whether to call :func:`fx_nvfp4.prepare`, for models that hold their experts as lists.
        mode: torch.compile's; "eager" does not compile.
        strict: raise where a packed weight is not emulated.
        tokenizer: default the one in the folder.

    All others (batch_size, max_length, add_bos_token, ...) are those of the harness' "hf" model.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        activations: str | None = "checkpoint",
        dialect: str = "hardware",
        prepare: bool = False,
        mode: str = "default",
        strict: bool = True,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # The harness reads activations=none as None.
        model = load(pretrained, target, _dtype(dtype), activations=activations or "none", dialect=dialect)
        super().__init__(_compiled(model, prepare, mode, strict), tokenizer=tokenizer or pretrained, **others)
        self.pretrained = pretrained  # in the harness' records a path, not a model

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        # Of constant size, so that all steps of decoding share one graph; compiled already, so not by transformers.
        settings = {"cache_implementation": "static", "disable_compile": True, **settings}
        return super()._model_generate(context, max_length, stop, **settings)


def _compiled(model: Any, fuse: bool, mode: str, strict: bool) -> Any:
    """The model with a compiled forward; a cache is made where generation asks for it, and not for likelihoods."""
    model = prepare(model) if fuse else model
    model.config.use_cache = False
    if mode != "eager":
        # torch.compile takes a mode or options, not both.
        options = {**torch._inductor.list_mode_options(mode), "strict": strict}
        model.forward = torch.compile(model.forward, backend="nvfp4_emu", options=options)
    return model


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return dtype


def main(arguments: Sequence[str]) -> None:
    """The harness' own command line."""
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
