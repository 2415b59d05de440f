"""Which kernel an op runs and with which launch parameters, in words for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from . import cpu, tuning
from .kernels.config import INDEXED, gemm_config, gradient_config
from .kernels.tile_config import by_load, fitted, for_rows, target_of_device
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
    if match.source.endswith(", tiles") and match.op in _PRODUCTS and dtype in (torch.bfloat16, torch.float16):
        return _tiles(match)
    if match.op in _TILED:
        text = _written(gemm_config(match.rows, dtype).meta())
    elif match.op == "indexed":
        text = _written(INDEXED.meta())
    elif match.op == "input_grad":
        text = _written(gradient_config(match.rows).meta())
    else:
        return ""
    return f"Triton {match.op}: {text} (heuristic, not tuned)"


def _tiles(match: Match) -> str:
    """Of a weight in tiles."""
    target = target_of_device(torch.cuda.current_device())
    if match.op != "moe":
        config = for_rows(match.rows, match.n, target) if match.op == "linear" else by_load(match.rows, target)
        return f"Triton tiles: {fitted(config, match.k).text} (default)"
    # Blocks alone are tuned, and take what the tokens of a call ask for: see tile_config.choose.
    how = "the fastest of those timed at the first call" if tuning.enabled() else "default, or tuned before"
    config = fitted(by_load(match.rows, target), match.k)
    return f"Triton tiles by the tokens of each call, of about {match.rows} slots an expert {config.text} ({how})"


def _written(parameters: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())
