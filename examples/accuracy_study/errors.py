"""Where the error comes from: layer by layer, and expert by expert, on what enters them in the bf16 model."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .evaluate import compile_emulated


@dataclass(frozen=True)
class Trace:
    """What the bf16 model computes for one batch.

    Attributes:
        layers: hidden states that enter each layer, and the result of the last.
        keywords: what each layer is called with besides.
        experts: of each layer, rows that enter the experts, one a slot [T * A, H], the expert of each slot, and what
            it gives.
    """

    layers: list[Tensor]
    keywords: list[dict[str, Any]]
    experts: list[tuple[Tensor, Tensor, Tensor]]


def trace(model: Any, ids: Tensor) -> Trace:
    """Run a batch through the bf16 model, eagerly."""
    entered: list[Tensor] = []
    keywords: list[dict[str, Any]] = []
    routed: list[tuple[Tensor, Tensor]] = []

    def layer(_: nn.Module, args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        entered[-1:] = [args[0], result]  # what entered is what the layer before gave
        keywords.append(kwargs)

    def experts(_: nn.Module, args: tuple, __: Tensor) -> None:
        x, chosen, _weights = args
        routed.append((x.repeat_interleave(chosen.shape[1], dim=0), chosen.reshape(-1, 1)))

    layers = model.model.layers
    handles = [m.register_forward_hook(layer, with_kwargs=True) for m in layers]
    handles += [m.mlp.experts.register_forward_hook(experts) for m in layers]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    given = [_slots(m.mlp.experts, *slots) for m, slots in zip(layers, routed, strict=True)]
    return Trace(entered, keywords, [(x, e, y) for (x, e), y in zip(routed, given, strict=True)])


def _slots(experts: Any, x: Tensor, chosen: Tensor) -> Tensor:
    """The result of one expert for each row, unweighted."""
    return experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))


def layer_errors(model: Any, found: Trace, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Relative errors of each layer alone, given the bf16 model's input, and of the hidden states after each.

    That of a layer alone is relative to what the layer adds to its input.
    """
    alone, after, state = [], [], found.layers[0]
    for layer, (x, y), keywords in zip(model.model.layers, pairwise(found.layers), found.keywords, strict=True):
        compiled = compile_emulated(layer, options)
        alone.append(_norm(compiled(x, **keywords) - y) / _norm(y - x))
        state = compiled(state, **keywords)
        after.append(_norm(state - y) / _norm(y))
    return alone, after


def expert_errors(model: Any, found: Trace, options: dict[str, Any]) -> list[list[float | None]]:
    """Relative error of the results of each expert of each layer, on the rows that the bf16 model sends to it.

    None for an expert without a row.
    """
    errors: list[list[float | None]] = []
    for layer, (x, chosen, y) in zip(model.model.layers, found.experts, strict=True):
        difference = _slots(compile_emulated(layer.mlp.experts, options), x, chosen) - y
        rows = [(chosen == e).flatten() for e in range(layer.mlp.experts.num_experts)]
        errors.append([_norm(difference[r]) / _norm(y[r]) if r.any() else None for r in rows])
    return errors


def _norm(t: Tensor) -> float:
    return float(t.float().norm())
