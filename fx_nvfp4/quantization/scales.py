"""The global scales of a weight: from the largest magnitude of what shares one, by the dialect's formula."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoints.skeleton import experts_layout
from ..dialects import get_dialect
from .config import NVFP4Config

_GATE_UP = re.compile(r"gate_?up|gate_and_up|w13|w1_w3")
# Linear layers, or 3-D weights, of one module that engines multiply as one weight.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def row_scales(weight: Tensor, parts: tuple[slice, ...], config: NVFP4Config, where: str) -> Tensor:
    """float64 global scales [.., N] of a weight [.., N, K], parts of whose rows have one each.

    Raises:
        ValueError: a number in the weight is not finite; where names it.
    """
    amax = weight.new_empty(weight.shape[:-1])
    for matrix, rows in zip(as_matrices(weight), amax.view(-1, weight.shape[-2]), strict=True):
        for part in parts:
            rows[part] = largest_magnitude(matrix[part], where)
    if config.global_scale == "parameter":
        amax = amax.amax().expand(amax.shape)
    return get_dialect(config.dialect).global_scale(amax)


def as_matrices(weight: Tensor) -> Tensor:
    """A weight as [E, N, K], a view."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def largest_magnitude(weight: Tensor, where: str) -> Tensor:
    """Scalar in the weight's dtype, without a copy of it; arguments and errors as :func:`row_scales`."""
    low, high = torch.aminmax(weight)
    largest = torch.maximum(-low, high)
    if not torch.isfinite(largest):
        raise ValueError(f"{where}: a weight of {largest.item()} cannot be quantised; find out where it comes from")
    return largest


def projections(module: nn.Module, name: str, rows: int, config: NVFP4Config) -> tuple[slice, ...]:
    """The rows that have a global scale of their own: all, or those of gate and of up."""
    if config.global_scale != "projection" or isinstance(module, nn.Linear) or not _GATE_UP.search(name):
        return (slice(None),)
    if experts_layout(module).interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, rows // 2), slice(rows // 2, None)


def experts_amax(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Of each expert [E], the largest magnitude of all 3-D weights that share its global scale, where several do.

    Args:
        weights: those that a module holds side by side, by their names in it.
        where: the module, for messages.
    """
    found: dict[str, Tensor] = {}
    for names in _FUSED:
        together = [name for name in names if name in weights]
        if len(together) > 1 and len({weights[name].shape[0] for name in together}) == 1:
            each = [torch.stack([largest_magnitude(m, f"{where}.{n}") for m in weights[n]]) for n in together]
            found.update(dict.fromkeys(together, torch.stack(each).amax(dim=0)))
    return found


def shared_amax(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> dict[nn.Module, Tensor]:
    """Largest magnitude of all that shares a global scale with a chosen linear layer, where others do."""
    found: dict[nn.Module, Tensor] = {}
    for path, parent in model.named_modules():
        for names in _FUSED:
            children = {name: parent._modules.get(name) for name in names}
            layers = {name: m for name, m in children.items() if isinstance(m, nn.Linear) and chosen(m)}
            if len(layers) > 1:
                where = [f"{path}.{name}.weight".strip(".") for name in layers]
                largest = [largest_magnitude(m.weight.detach(), w) for m, w in zip(layers.values(), where, strict=True)]
                found.update(dict.fromkeys(layers.values(), torch.stack(largest).amax()))
    return found
