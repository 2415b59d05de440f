"""Conversion between NVFP4Weight and torchao's NVFP4Tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .format import BLOCK, unswizzle
from .tensor import NVFP4Weight


def is_torchao_nvfp4(tensor: object) -> bool:
    """Whether tensor is torchao's NVFP4Tensor, without importing torchao's prototypes."""
    return type(tensor).__name__ == "NVFP4Tensor" and type(tensor).__module__.startswith("torchao.")


def from_torchao(weight: Any) -> NVFP4Weight:
    """See :meth:`NVFP4Weight.from_torchao`."""
    if not is_torchao_nvfp4(weight):
        raise TypeError(f"from_torchao: expected torchao's NVFP4Tensor, got {type(weight).__name__}")
    # A transposed torchao tensor is one whose codes have the strides swapped.
    transposed = weight.qdata.stride(-2) < weight.qdata.stride(-1)
    qdata = weight.qdata.transpose(-2, -1) if transposed else weight.qdata
    scale = weight.scale.transpose(-2, -1) if transposed else weight.scale
    return from_torchao_parts(
        qdata.contiguous(),
        scale,
        weight.is_swizzled_scales,
        weight.per_tensor_scale,
        weight.act_per_tensor_scale,
        weight.act_quant_kwargs is not None,
        getattr(weight.act_quant_kwargs, "use_dynamic_per_tensor_scale", False),
        weight.dtype,
        transposed=transposed,
    )


def from_torchao_parts(
    qdata: Tensor,
    scale: Tensor,
    swizzled: bool,
    per_tensor_scale: Tensor | None,
    act_per_tensor_scale: Tensor | None,
    quantize_activations: bool,
    dynamic_activation_scale: bool,
    orig_dtype: torch.dtype,
    dialect: str = "torchao",
    transposed: bool = False,
) -> NVFP4Weight:
    """Assemble an NVFP4Weight from an NVFP4Tensor's parts, as it and its safetensors form hold them.

    qdata uint8 [.., N, K/2]; scale float8_e4m3fn linear or in 128 x 4 tiles over all rows; per_tensor_scale None,
    [] or [E, 1, 1] (multipliers, fp32; [E] means the same); act_per_tensor_scale None or [] (None: no second level,
    which is 1).
    """
    scale = _unswizzled(qdata, scale) if swizzled else scale
    scale = scale.contiguous().view(*qdata.shape[:-1], -1).detach()
    global_scale = torch.ones((), device=qdata.device) if per_tensor_scale is None else per_tensor_scale.float()
    if global_scale.numel() > 1:
        global_scale = global_scale.reshape(-1, 1)
    activations, act_scale = "none", None
    if quantize_activations:
        activations = "dynamic" if dynamic_activation_scale else "static"
    if activations == "static":
        one = torch.ones((), device=qdata.device)
        act_scale = (one if act_per_tensor_scale is None else act_per_tensor_scale).double().reshape(())
    return NVFP4Weight(
        qdata,
        scale,
        global_scale.expand(qdata.shape[:-1]).contiguous(),
        orig_dtype,
        activations,
        dialect,
        transposed,
        act_scale,
    )


def _unswizzled(qdata: Tensor, scale: Tensor) -> Tensor:
    """Linear block scales [rows of all experts, K/16] of codes [.., N, K/2].

    Each expert may have tiles of its own, padded to 128 rows, as grouped products read them; or all experts' rows are
    tiled as one matrix, as torchao quantises 3-D weights. They differ where N is no multiple of 128.
    """
    n, cols = qdata.shape[-2], qdata.shape[-1] * 2 // BLOCK
    experts = qdata.shape[:-2].numel()
    padded = -(-n // 128) * 128
    if n != padded and scale.numel() == experts * padded * (-(-cols // 4) * 4):
        return unswizzle(scale.reshape(-1), experts * padded, cols).view(experts, padded, cols)[:, :n]
    return unswizzle(scale.reshape(-1), experts * n, cols)


def to_torchao(weight: NVFP4Weight) -> Tensor:
    """See :meth:`NVFP4Weight.to_torchao`."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs

    weight = weight.canonical()
    if weight.transposed or weight.expert_ids is not None:
        raise ValueError("to_torchao: convert the stored weight, not a transposed or indexed view of it")
    first = weight.global_scale[..., :1]
    if not torch.equal(first.expand_as(weight.global_scale), weight.global_scale):
        raise ValueError(
            "to_torchao: rows of one weight have different global scales (gate and up keep their own), "
            "torchao holds one per expert; convert the projections separately"
        )
    if weight.act_scale is not None and weight.act_scale.dim():
        raise ValueError("to_torchao: torchao holds one activation scale, this weight has one per expert")
    kwargs = None
    if weight.activations != "none":
        kwargs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=weight.activations == "dynamic")
    return NVFP4Tensor(
        weight.qdata,
        weight.block_scale,
        BLOCK,
        weight.orig_dtype,
        per_tensor_scale=first[0].reshape(()) if weight.qdata.dim() == 2 else first.unsqueeze(-1),
        act_per_tensor_scale=None if weight.act_scale is None else weight.act_scale.float(),
        act_quant_kwargs=kwargs,
    )
