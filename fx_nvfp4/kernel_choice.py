"""Which kernel an op runs and with which launch parameters, in words for the report."""

from __future__ import annotations

import dataclasses

import torch

from .kernels.config import INDEXED, gemm_config
from .report import Match

_TILED = ("linear", "batched", "grouped")


def with_choice(match: Match) -> Match:
    """match with ``config`` set: the parameters for the token count that was traced, and how they were chosen."""
    if match.config:
        return match
    return dataclasses.replace(match, config=_choice(match))


def _choice(match: Match) -> str:
    if match.device != "cuda":
        return f"plain PyTorch on {match.device}" if match.device else ""
    if match.op in _TILED:
        parameters = gemm_config(match.rows, getattr(torch, match.dtype)).meta()
    elif match.op == "indexed":
        parameters = INDEXED.meta()
    else:
        return ""
    text = " ".join(f"{name}={value}" for name, value in parameters.items())
    return f"Triton {match.op}: {text} (heuristic, not tuned)"
