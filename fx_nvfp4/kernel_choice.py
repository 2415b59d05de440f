"""Which kernel an op runs and with which launch parameters, in words for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from . import cpu
from .kernels.config import INDEXED, gemm_config, gradient_config
from .report import Match

_TILED = ("linear", "batched", "grouped", "moe")
_PRODUCTS = (*_TILED, "indexed")


def with_choice(match: Match) -> Match:
    """match with ``config`` set: the parameters for the token count that was traced, and how they were chosen."""
    if match.config:
        return match
    return dataclasses.replace(match, config=_choice(match))


def _choice(match: Match) -> str:
    if match.device == "cpu" and match.op in _PRODUCTS:
        return cpu.description()
    if match.device != "cuda":
        return f"plain PyTorch on {match.device}" if match.device else ""
    dtype = getattr(torch, match.dtype)
    if match.op in _TILED:
        text = _written(gemm_config(match.rows, dtype).meta())
    elif match.op == "indexed":
        text = _written(INDEXED.meta())
    elif match.op == "input_grad":
        text = _written(gradient_config(match.rows).meta())
    else:
        return ""
    return f"Triton {match.op}: {text} (heuristic, not tuned)"


def _written(parameters: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())
