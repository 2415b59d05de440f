"""Products of rows with one packed weight, each a few lines of plain PyTorch: what is compared with our ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block import Block, Projection
from ..reference import rows_by_ids, unscaled_weight

# Rows x [M, K], a weight [N, K] (a Projection without the experts' dim) -> [M, N], not yet rounded to an output dtype.
Product = Callable[[Tensor, Projection], Tensor]


def exact(x: Tensor, p: Projection) -> Tensor:
    """Products of code * block scale, their sum and the global scales in float64.

    Products are whole multiples of 2^-20 below 2^23, so that sums of up to 1024 of them are exact in 53 bits, and
    longer ones unless they reach 2^33.
    """
    operand, multiplier = p.act.enter(x)
    y = (operand.double() @ _weight(p).double().T) * p.global_scale.double()
    return y if multiplier is None else y * multiplier.double()


def reordered(seed: int) -> Product:
    """The same exact products added in fp32 one by one, in a random order of K, and then scaled."""

    def product(x: Tensor, p: Projection) -> Tensor:
        operand, multiplier = p.act.enter(x)
        columns, rows = operand.T.contiguous(), _weight(p).T.contiguous()
        total = operand.new_zeros(x.shape[0], rows.shape[1])
        for k in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
            total += columns[k].unsqueeze(-1) * rows[k]
        return total * (p.global_scale if multiplier is None else p.global_scale * multiplier)

    return product


def dequantized(x: Tensor, p: Projection) -> Tensor:
    """Both operands with their global scales, rounded to bf16, and multiplied with a sum in fp32.

    This is how engines emulate NVFP4 where they lack a kernel for it: dequantise, then a product of the 16-bit kind.
    """
    operand, multiplier = p.act.enter(x)
    x = operand if multiplier is None else operand * multiplier
    weight = _weight(p) * p.global_scale.unsqueeze(-1)
    return x.bfloat16().float() @ weight.bfloat16().float().T


def moe(
    product: Product, x: Tensor, ids: Tensor, weights: Tensor, block: Block, dtype: torch.dtype, wide: torch.dtype
) -> Tensor:
    """A SwiGLU block with another product, rounded to dtype where ``fx_nvfp4::moe`` rounds, but for its result.

    x [T, K], ids and weights [T, A] -> [T, H] in wide, in which the activation and the weighted sum are computed.
    """
    out = torch.zeros(x.shape[0], block.down.n, dtype=wide, device=x.device)
    for e, slot in rows_by_ids(ids.reshape(-1), block.experts):
        token = slot // ids.shape[1]
        gate, up = block.split([product(x[token], of_expert(p, e)).to(dtype) for p in block.up])
        assert gate is not None
        h = (F.silu(gate.to(wide)) * up.to(wide)).to(dtype)
        y = product(h, of_expert(block.down, e)).to(dtype)
        out.index_add_(0, token, y.to(wide) * weights.reshape(-1)[slot].unsqueeze(-1).to(wide))
    return out


def of_expert(p: Projection, e: int) -> Projection:
    """The weight [N, K] of one expert, without a bias."""
    qdata, block_scale, global_scale, act = p.of_expert(e)
    return Projection(qdata, block_scale, global_scale, None, act)


def _weight(p: Projection) -> Tensor:
    return unscaled_weight(p.qdata, p.block_scale)
