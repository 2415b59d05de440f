"""The ops on a CPU, by a C++ library that reads packed weights.

An expert's codes are read once, and decoded at most 32 rows at a time; those of an expert that no row chose are not
touched. Arithmetic and rounding are those of :mod:`fx_nvfp4.reference` and :mod:`fx_nvfp4.block`; only the order of
the fp32 sum differs, and on a CPU that multiplies pairs of bf16, numbers below 2^-126 count as zero in bf16. What the
library does not compute, the plain bodies do. Weights in tiles are unpacked at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block import Block, Projection
from ..format import scale_pair
from ..reference import Activations, dequantize, experts_by_offsets, fake_quantize, input_grad
from .library import Library, Product, Rounding, Sum, description, load

__all__ = [
    "available",
    "batched",
    "dequantize",
    "description",
    "fake_quantize",
    "grouped",
    "indexed",
    "input_grad",
    "linear",
    "moe",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNK = 1 << 16  # elements of the activation that are computed at a time


def available() -> bool:
    """Whether there is a library: else the plain bodies serve."""
    return load() is not None


def linear(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    operand, multiplier = _enter(rows, act, None, 1)
    one = Projection(qdata.unsqueeze(0), block_scale.unsqueeze(0), global_scale.unsqueeze(0), None, act)
    return _product(operand, multiplier, one, None).reshape(*x.shape[:-1], one.n)


def batched(x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    ids = torch.arange(x.shape[0]).repeat_interleave(x.shape[1])
    y = indexed(x.reshape(-1, x.shape[-1]), qdata, block_scale, global_scale, ids, act)
    return y.view(*x.shape[:2], y.shape[-1])


def indexed(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, ids: Tensor, act: Activations
) -> Tensor:
    return _routed(x, Projection(qdata, block_scale, global_scale, None, act), ids.long())


def grouped(
    x: Tensor, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, offs: Tensor, act: Activations
) -> Tensor:
    return indexed(x, qdata, block_scale, global_scale, experts_by_offsets(offs, x.shape[0]), act)


def moe(x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> Tensor:
    if ids.numel() == 0:
        return x.new_zeros(x.shape[0], block.down.n, dtype=block.out_dtype)
    top, slot_ids = ids.shape[1], ids.reshape(-1).long()
    if block.rows_apart:
        x, top = x.repeat_interleave(top, dim=0), 1
    rows = block.enter(x, weights.reshape(-1))
    h = _activated([_routed(rows, p, slot_ids, top) for p in block.up], block)
    return _combined(_routed(h, block.down, slot_ids), slot_ids, weights, block)


def _activated(ups: list[Tensor], block: Block) -> Tensor:
    """The activation of up products [S, N] in their dtype, in chunks: large fp32 tensors cost more than they hold."""
    h = ups[0].new_empty(ups[0].shape[0], block.down.k)
    size = max(1, _CHUNK // max(1, h.shape[1]))
    for i in range(0, h.shape[0], size):
        h[i : i + size] = block.activation.evaluate(*block.split([up[i : i + size] for up in ups]))
    return h


def _combined(slots: Tensor, ids: Tensor, weights: Tensor, block: Block) -> Tensor:
    """Slots [T * A, H] of experts ids [T * A] summed with weights [T, A], or with ones, to [T, H]."""
    tokens, top = weights.shape
    if block.out_dtype not in (None, slots.dtype):
        slots = slots.float()  # whose sum is rounded to nothing
    factor = weights.float().contiguous() if block.weighted == "output" else None
    ids = ids.contiguous()  # by a name that outlives the call, which gets an address alone
    out = slots.new_empty(tokens, slots.shape[1])
    _library().combine(
        Sum(
            *(_address(t) for t in (slots, ids, factor, out)),
            *(tokens, top, block.experts, slots.shape[1], _DTYPES[slots.dtype], torch.get_num_threads()),
        )
    )
    return out.to(block.out_dtype or out.dtype)


def _routed(x: Tensor, p: Projection, ids: Tensor, top: int = 1) -> Tensor:
    """Slot s, which takes row s / top of x [S / top, K], through expert ids[s] (int64 [S]), bias added -> [S, N]."""
    # Rows that several experts share are all rounded alike.
    operand, multiplier = _enter(x, p.act, ids if p.act.needs_experts else None, p.qdata.shape[0])
    return _product(operand, multiplier, p, ids, top)


def _enter(x: Tensor, act: Activations, group: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    """As Activations.enter_rows for x [R, K]. The producers' own rules serve comparisons, and stay plain."""
    if act.mode == "none" or act.dialect != "hardware":
        return act.enter_rows(x, group, groups)
    scale, x = act.scale_of_groups(x, group, groups), _rows(x)
    pair = [t.contiguous() for t in scale_pair(scale, x.device)]
    group = group.contiguous() if group is not None and scale.dim() else None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _library().round(
        Rounding(
            *(_address(t) for t in (x, group, *pair, out)),
            *(x.stride(0), x.shape[0], scale.numel(), x.shape[1], _DTYPES[x.dtype], torch.get_num_threads()),
        )
    )
    return out, pair[0]


def _product(x: Tensor, multiplier: Tensor | None, p: Projection, ids: Tensor | None, top: int = 1) -> Tensor:
    """x [R, K] by the experts of slots, ids int64 [R * top], or all by expert 0 -> [R * top, N] in x's dtype."""
    p = p.canonical()
    experts, n, k = p.qdata.shape[0], p.n, x.shape[1]
    x, codes, scales = _rows(x), _rows(p.qdata), _rows(p.block_scale)
    ids = None if ids is None else ids.contiguous()
    bias = None if p.bias is None else p.bias.float()
    multiplier = None if multiplier is None else multiplier.expand(experts)
    y = x.new_empty(x.shape[0] * top, n)
    _library().product(
        Product(
            *(_address(t) for t in (x, codes, scales, p.global_scale, multiplier, bias, ids, y)),
            *(x.stride(0), *codes.stride()[:2], *scales.stride()[:2], *p.global_scale.stride()),
            *(0 if multiplier is None else multiplier.stride(0), *((0, 0) if bias is None else bias.stride())),
            *(y.shape[0], top, experts, n, k, _DTYPES[x.dtype], torch.get_num_threads()),
        )
    )
    return y


def _library() -> Library:
    built = load()
    assert built is not None
    return built


def _rows(t: Tensor) -> Tensor:
    """t with adjacent elements in its last dim; others may be strided."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _address(t: Tensor | None) -> int | None:
    if t is not None and t.device.type != "cpu":
        raise ValueError(f"fx_nvfp4: x is on the CPU and another operand, {t.dtype} {list(t.shape)}, on {t.device}")
    return None if t is None else t.data_ptr()
