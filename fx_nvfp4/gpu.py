"""The ops on CUDA and ROCm: activations quantised, then one Triton product; no host synchronisation.

Weights in tiles have kernels of their own for 16-bit activations (:mod:`fx_nvfp4.gpu_tiled`). For fp32, and for
gradients, they are unpacked at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import format as nvfp4
from . import gpu_tiled
from .activation import parse
from .block import Block, Projection
from .kernels import batched as batched_kernels
from .kernels import dequantize as dequantize_kernels
from .kernels import fake_quantize as activation_kernels
from .kernels import grouped as grouped_kernels
from .kernels import indexed as indexed_kernels
from .kernels import input_grad as gradient_kernels
from .kernels import moe as moe_kernels
from .kernels import routing as routing_kernels
from .layouts import canonical
from .reference import Activations


def linear(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    if gpu_tiled.serves(x, qdata):
        return gpu_tiled.linear(x, qdata, block_scale, global_scale, act)
    qdata, block_scale = canonical(qdata, block_scale)
    operand, out_scale = _enter(x, act, None, 0)
    return batched_kernels.linear(operand, qdata, block_scale, global_scale, out_scale)


def batched(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    if gpu_tiled.serves(x, qdata):
        return gpu_tiled.batched(x, qdata, block_scale, global_scale, act)
    qdata, block_scale = canonical(qdata, block_scale)
    experts, rows = x.shape[:2]
    group = torch.arange(experts, device=x.device).unsqueeze(1).expand(experts, rows) if act.mode != "none" else None
    operand, out_scale = _enter(x, act, group, experts)
    return batched_kernels.batched(operand, qdata, block_scale, global_scale, out_scale)


def indexed(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, ids: Tensor, act: Activations
) -> Tensor:
    if gpu_tiled.serves(x, qdata):
        return gpu_tiled.indexed(x, qdata, block_scale, global_scale, ids, act)
    qdata, block_scale = canonical(qdata, block_scale)
    operand, out_scale = _enter(x, act, ids, qdata.shape[0])
    return indexed_kernels.indexed(operand, qdata, block_scale, global_scale, ids, out_scale)


def grouped(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, offs: Tensor, act: Activations
) -> Tensor:
    if gpu_tiled.serves(x, qdata):
        return gpu_tiled.grouped(x, qdata, block_scale, global_scale, offs, act)
    qdata, block_scale = canonical(qdata, block_scale)
    group = grouped_kernels.row_groups(offs, x.shape[0]) if act.mode != "none" else None
    operand, out_scale = _enter(x, act, group, qdata.shape[0])
    return grouped_kernels.grouped(operand, qdata, block_scale, global_scale, offs, out_scale)


def moe(x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> Tensor:
    if ids.numel() == 0:
        return x.new_zeros(x.shape[0], block.down.n, dtype=block.out_dtype)
    if gpu_tiled.supports(x, block):
        return gpu_tiled.moe(x, ids, weights, block)
    block = block.canonical()
    order, offs = routing_kernels.sort_slots(ids, block.experts)
    top, slot_ids = ids.shape[1], ids.reshape(-1)
    apart = block.rows_apart
    if apart:
        x, top = x.repeat_interleave(top, dim=0), 1
    x = block.enter(x, weights.reshape(-1))
    acts = [p.act for p in block.up]
    # Gate and up share the rounded rows unless each has a scale of its own.
    acts = acts[:1] if all(act.scale is acts[0].scale for act in acts) else acts
    entered = [_enter(x, act, slot_ids if apart else None, block.experts) for act in acts]
    *gate, up = (_operand(entered[i % len(entered)], p) for i, p in enumerate(_halves(block)))
    if not gate or moe_kernels.alike(gate[0], up):
        activation = block.activation.to_triton()
        h = moe_kernels.up(up, gate[0] if gate else None, order, offs, top, activation)
    else:
        # Rounded or laid out apart: each by itself, and the activation as plain operations.
        itself = parse("u").to_triton()
        parts = [moe_kernels.up(half, None, order, offs, top, itself) for half in (gate[0], up)]
        h = block.activation.evaluate(*parts).to(x.dtype)
    y = moe_kernels.down(_operand(_enter(h, block.down.act, slot_ids, block.experts), block.down), order, offs)
    weights_after = weights if block.weighted == "output" else None
    return moe_kernels.combine(y, ids, weights_after, block.experts, block.out_dtype)


def fake_quantize(x: Tensor, scale: Tensor, dialect: str) -> Tensor:
    if dialect != "hardware" or scale.dim() > 1:
        return nvfp4.fake_quantize(x, scale if scale.dim() == 0 else scale.unsqueeze(-1), dialect)
    rows = None if scale.dim() == 0 else torch.arange(x.shape[0], device=x.device)
    return activation_kernels.fake_quantize(x, scale, rows)


def dequantize(qdata: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_kernels.dequantize(*canonical(qdata, block_scale), global_scale, dtype)


def input_grad(
    grad: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    ids: Tensor | None = None,
    offs: Tensor | None = None,
) -> Tensor:
    qdata, block_scale = canonical(qdata, block_scale)
    if ids is not None:
        return gradient_kernels.indexed(grad, qdata, block_scale, global_scale, ids)
    if offs is not None:
        return gradient_kernels.grouped(grad, qdata, block_scale, global_scale, offs)
    product = gradient_kernels.linear if qdata.dim() == 2 else gradient_kernels.batched
    return product(grad, qdata, block_scale, global_scale)


def _halves(block: Block) -> list[Projection]:
    """Gate and up, or up alone, as views of the weights that hold them."""
    if block.layout in ("separate", "plain"):
        return list(block.up)
    both, middle = block.up[0], block.up[0].qdata.shape[1] // 2
    halves = slice(None, middle), slice(middle, None)
    if block.layout == "interleaved":
        halves = slice(None, None, 2), slice(1, None, 2)
    return [both.rows(half) for half in halves]


def _operand(entered: tuple[Tensor, Tensor | None], p: Projection) -> moe_kernels.Operand:
    return moe_kernels.Operand(entered[0], *p.weight, entered[1], p.bias)


def _enter(x: Tensor, act: Activations, group: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    """(operand in x's dtype, fp32 factor of the sum, [] or one per group); exact where activations are quantised."""
    if act.mode == "none" or act.dialect != "hardware":
        # The producers' own rules serve comparisons, and run as plain torch operations.
        return act.enter_rows(x, group, groups)
    scale = act.scale_of_groups(x, group, groups)
    return activation_kernels.fake_quantize_unscaled(x, scale, group if scale.dim() else None), scale.float()
