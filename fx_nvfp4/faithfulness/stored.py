"""Cases from a checkpoint: the packed weights of one layer, as stored, with random activations of calibrated size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..block import Block
from ..checkpoint import StoredWeights, read_weights
from ..checkpoints.names import layer_index
from ..format import TWO_LEVEL_MAX
from ..tensor import NVFP4Weight
from .arithmetic import of_expert
from .cases import SWIGLU, Case, Draw, LinearCase, MoECase, projection

_TOP = 2
_UP, _DOWN = "gate_up_proj", "down_proj"
_SIGMAS = 4.0  # the largest of a few hundred thousand normal numbers lies a little beyond


def checkpoint_cases(
    path: str | Path,
    tokens: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    layer: int | None = None,
) -> list[Case]:
    """Every packed linear weight of one decoder layer (default: the middle one), and its experts as a SwiGLU block.

    Biases are left out, and a block with another activation function is measured as if it were SwiGLU's: what is
    compared are products and their rounding.

    Raises:
        CheckpointError: no NVFP4 checkpoint.
        ValueError: the layer holds no packed weight.
    """
    stored = read_weights(path, device, lambda names: _of_layer(names, layer))
    draw = Draw(torch.Generator().manual_seed(seed))
    cases: list[Case] = []
    for name, weight in stored.weights.items():
        owner, _, leaf = name.rpartition(".")
        down = stored.weights.get(f"{owner}.{_DOWN}")
        if weight.dim() == 3 and leaf == _UP and down is not None:
            cases.append(_block(owner, weight, down, stored, tokens, draw))
        elif weight.dim() == 2 or f"{owner}.{_UP}" not in stored.weights:
            whole = projection(weight)
            alone = whole if weight.dim() == 2 else of_expert(whole, 0)
            x = _activations(tokens, weight, draw)
            cases.append(LinearCase(name.removesuffix(".weight"), x, alone))
    return cases


def _of_layer(names: Mapping[str, object], layer: int | None) -> list[str]:
    layers = sorted({layer_index(name) for name in names})
    chosen = layers[len(layers) // 2] if layer is None and layers else layer
    found = [name for name in names if layer_index(name) == chosen]
    if not found:
        raise ValueError(f"layer {chosen} holds no packed weight; there are some in layers {layers}")
    return found


def _block(name: str, up: NVFP4Weight, down: NVFP4Weight, stored: StoredWeights, tokens: int, draw: Draw) -> MoECase:
    layout = "interleaved" if f"{name}.{_UP}" in stored.interleaved else "concatenated"
    block = Block((projection(up),), projection(down), SWIGLU, layout, "output")
    ids, weights = draw.routing(tokens, block.experts, min(_TOP, block.experts))
    return MoECase(name, _activations(tokens, up, draw), ids.to(up.device), weights.to(up.device), block)


def _activations(tokens: int, weight: NVFP4Weight, draw: Draw) -> Tensor:
    """Normal numbers, rounded to bf16, that just fill the range for which the input was calibrated."""
    x = draw.normal(tokens, weight.sizes[-1]).to(weight.device)
    if weight.act_scale is not None:
        x = x * (weight.act_scale.median() * TWO_LEVEL_MAX / _SIGMAS).float()
    return x.bfloat16().float()
