"""Packs the weights of one module in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dialects import get_dialect
from ..format import BLOCK
from ..ops import UNCALIBRATED
from ..tensor import NVFP4Weight
from .blocks import quantize
from .config import NVFP4Config
from .scales import as_matrices, experts_amax, projections, row_scales
from .targets import packable, stored_transposed

# Numbers that are quantised at a time: their fp32 copies are all that is in memory beside the weight.
_CHUNK = 1 << 22


# Parameters are ordinary tensors, also where this is called in inference mode.
@torch.inference_mode(False)
def pack_module(module: nn.Module, config: NVFP4Config, fqn: str = "", amax: Tensor | None = None) -> list[str]:
    """Replace a module's dense weights (of a linear layer, or 3-D ones) by packed ones, one at a time.

    Args:
        fqn: the module's path, for messages.
        amax: the largest magnitude of all that shares a global scale with this linear layer; default its own.

    Returns:
        Names of the parameters in the module.

    Raises:
        ValueError: as :func:`check_module`, or a weight is not finite.
    """
    transposed = check_module(module, config, fqn)
    names = [name for name, _ in packable(module)]
    shared = _shared_amax(module, names, config, fqn) if amax is None else dict.fromkeys(names, amax)
    for name in names:
        weight = getattr(module, name).detach()
        weight = weight.mT if transposed else weight
        if name in shared:
            scale = get_dialect(config.dialect).global_scale(shared[name].to(weight.device))
            scale = scale.unsqueeze(-1).expand(weight.shape[:-1])
        else:
            parts = projections(module, name, weight.shape[-2], config)
            scale = row_scales(weight, parts, config, _where(module, fqn, name))
        packed = pack(weight, scale, config).replace(transposed=transposed)
        module.register_parameter(name, nn.Parameter(packed, requires_grad=False))
    return names


def _shared_amax(module: nn.Module, names: list[str], config: NVFP4Config, fqn: str) -> dict[str, Tensor]:
    """Largest magnitudes [E] of gate and up weights that stand apart and share a global scale."""
    if config.global_scale != "fused" or isinstance(module, nn.Linear):
        return {}
    weights = {name: module.get_parameter(name).detach() for name in names}
    return experts_amax(weights, fqn or type(module).__name__)


def check_module(module: nn.Module, config: NVFP4Config, fqn: str) -> bool:
    """Whether a module's weights are stored transposed, once nothing forbids to pack them but what they hold.

    Raises:
        ValueError: it cannot be told which dim K is, K is not a multiple of 16, weights are on the meta device, or
            are not parameters but computed from some.
    """
    weights, linear = packable(module), isinstance(module, nn.Linear)
    transposed = False
    if weights and not linear:
        transposed = stored_transposed(module, fqn) if config.transposed is None else config.transposed
    for name, weight in weights:
        where, k = _where(module, fqn, name), weight.shape[-2 if transposed else -1]
        if name not in module._parameters:
            raise ValueError(
                f"{where}: computed from other parameters (weight_norm, a parametrization?), not one itself: remove "
                "that first (torch.nn.utils.parametrize.remove_parametrizations), or let filter_fn leave it out"
            )
        if weight.is_meta:
            raise ValueError(f"{where}: no values yet (meta device); load the weights first")
        if k % BLOCK:
            other = "" if linear else ", or pass NVFP4Config(transposed=...) if K is the other dim"
            raise ValueError(f"{where}: K = {k} is not a multiple of {BLOCK}; let filter_fn leave it out{other}")
    return transposed


def _where(module: nn.Module, fqn: str, name: str) -> str:
    return f"{fqn or type(module).__name__}.{name}"


def pack(weight: Tensor, scale: Tensor, config: NVFP4Config) -> NVFP4Weight:
    """A weight [.., N, K] packed with global scales float64 [.., N], some rows at a time."""
    *lead, k = weight.shape
    qdata = torch.empty((*lead, k // 2), dtype=torch.uint8, device=weight.device)
    # Filled as bytes, which every device can copy.
    block_scale = torch.empty((*lead, k // BLOCK), dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK // k)
    for matrix in zip(*map(as_matrices, (weight, scale.unsqueeze(-1), qdata, block_scale)), strict=True):
        for w, s, codes, scales in zip(*(t.split(rows) for t in matrix), strict=True):
            found = quantize(w, s, config.dialect, config.block_scale)
            codes.copy_(found[0])
            scales.copy_(found[1].view(torch.uint8))
    activations = UNCALIBRATED if config.activations == "static" else config.activations
    e4m3 = block_scale.view(torch.float8_e4m3fn)
    return NVFP4Weight(qdata, e4m3, scale.float().contiguous(), weight.dtype, activations, config.dialect)
