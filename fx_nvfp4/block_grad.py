"""Gradients of the routed block, composed of the op set: what the kernels serve, they serve here too."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .block import Block


def moe_backward(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the routing weights for grad [T, H]; the hidden rows are computed again.

    Rounding counts as the identity. Rows are sorted by expert, those of nobody last; the host never waits.
    """
    key, order, offs = _sorted(ids, block)
    expert, token = key.clamp(max=block.experts - 1), order // ids.shape[1]
    weight = weights.reshape(-1)[order].float()

    gate, up = block.split(_ups(block.enter(x[token], weight), expert, offs, block))
    h = block.activation.evaluate(gate, up).to(x.dtype)

    # Gradients of rows come in its dtype, which the block's own (out_dtype) may be too short for.
    grad_y = grad[token].to(torch.promote_types(grad.dtype, x.dtype))
    grad_h = ops.input_grad(grad_y, *block.down.weight, offs=offs).float()
    if block.weighted == "output":
        grad_weight = _by_routing_weight(grad_y, grad_h, h, block, expert, offs)
        grad_h = grad_h * weight.unsqueeze(-1)
    by_gate, by_up = block.activation.partials(gate, up)
    parts = block.join((grad_h * by_gate).to(x.dtype), (grad_h * by_up).to(x.dtype))
    grad_rows = torch.stack(
        [ops.input_grad(part, *p.weight, offs=offs).float() for part, p in zip(parts, block.up, strict=True)]
    ).sum(dim=0)
    if block.weighted == "input":
        grad_weight = (grad_rows * x[token].float()).sum(dim=-1)
        grad_rows = grad_rows * weight.unsqueeze(-1)

    mine = key < block.experts
    grad_x = torch.empty_like(grad_rows).index_copy_(0, order, torch.where(mine.unsqueeze(-1), grad_rows, 0.0))
    grad_weights = torch.empty_like(grad_weight).index_copy_(0, order, torch.where(mine, grad_weight, 0.0))
    return grad_x.view(*ids.shape, x.shape[1]).sum(dim=1).to(x.dtype), grad_weights.view_as(weights).to(weights.dtype)


def hidden(x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> Tensor:
    """The activations between the products, [T, A, I] in x's dtype; zeros for slots of nobody."""
    key, order, offs = _sorted(ids, block)
    rows = block.enter(x[order // ids.shape[1]], weights.reshape(-1)[order])
    ups = _ups(rows, key.clamp(max=block.experts - 1), offs, block)
    h = block.activation.evaluate(*block.split(ups)).to(x.dtype)
    h = torch.where((key < block.experts).unsqueeze(-1), h, 0.0)
    return torch.empty_like(h).index_copy_(0, order, h).view(*ids.shape, h.shape[1])


def _sorted(ids: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(expert, E for nobody, and number of each slot, sorted by expert; the ends of the experts' slots)."""
    key, order = torch.where(block.inside(ids), ids, block.experts).reshape(-1).sort(stable=True)
    offs = torch.searchsorted(key, torch.arange(block.experts, dtype=key.dtype, device=key.device), right=True)
    return key, order, offs


def _ups(rows: Tensor, expert: Tensor, offs: Tensor, block: Block) -> list[Tensor]:
    """The up products of sorted rows."""
    return [p.add_bias(ops.grouped(rows, *p.weight, offs, *p.quantisation), expert) for p in block.up]


def _by_routing_weight(grad_y: Tensor, grad_h: Tensor, h: Tensor, block: Block, expert: Tensor, offs: Tensor) -> Tensor:
    """Row by row the product of grad_y and y, the expert's output, which only quantised activations compute again."""
    down = block.down
    if down.act.mode != "none":
        y = down.add_bias(ops.grouped(h, *down.weight, offs, *down.quantisation), expert)
        return (grad_y.float() * y.float()).sum(dim=-1)
    product = (grad_h * h.float()).sum(dim=-1)  # grad_y . (W h) = (W^T grad_y) . h
    return product if down.bias is None else product + (grad_y.float() * down.bias[expert].float()).sum(dim=-1)
