"""Matrix products with a packed weight become the ops of :mod:`fx_nvfp4.ops`, whichever way the model spells them.

einsum, matmul and linear decompose into mm, bmm and views before they arrive here. A product that contracts K
is what the weight was packed for; one that contracts the rows, as gradients do, runs op input_grad.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchao.utils import fill_defaults

from .tensor import NVFP4Weight

aten = torch.ops.aten
nvfp4 = torch.ops.fx_nvfp4
implements = NVFP4Weight.implements

Merged = tuple[int, ...]  # the dims of [.., N, K] in one dim of a view


@implements([aten.linear.default])
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = fill_defaults(args, 3, [kwargs.get("bias")])
    if not isinstance(w, NVFP4Weight) or isinstance(x, NVFP4Weight):
        return func.decompose(*args, **kwargs)
    if _is_matrix(w):
        y = _plain(x, w, over_rows=w.transposed)
    else:
        y = _times(x.reshape(-1, x.shape[-1]), w.transpose(0, 1)).reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


@implements([aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default])
def _product(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """A product of two operands; with the weight on the left, the transposed product of the transposed operands."""
    a, b = args
    if isinstance(a, NVFP4Weight) and isinstance(b, NVFP4Weight):
        return _dense(func, args, kwargs)
    if isinstance(b, NVFP4Weight):
        return _times(a, b)
    y = _times(b.mT if b.dim() > 1 else b, a.transpose(-2, -1) if a.dim() > 1 else a)
    return y.mT if y.dim() > 1 else y


def _times(x: Tensor, w: NVFP4Weight) -> Tensor:
    """x [B, M, K] @ w, or either of them without its first dim or two."""
    if _is_matrix(w) and x.dim() == 2:
        return _plain(x, w, over_rows=not w.transposed)
    outer = () if w.dim() == 1 else w.dims[-1]
    inner, batch = w.dims[0 if w.dim() == 1 else -2], w.dims[0] if w.dim() == 3 else ()
    y = contract(x.reshape(*[1] * (3 - x.dim()), *x.shape), w, batch, inner, outer)
    y = y if w.dim() == 3 else y.squeeze(0)
    y = y.squeeze(-2) if x.dim() == 1 else y
    return y.squeeze(-1) if w.dim() == 1 else y


@implements([aten.addmm.default, aten.baddbmm.default, aten.addmv.default])
def _add_product(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, a, b = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    product = {aten.addmm.default: aten.mm, aten.baddbmm.default: aten.bmm, aten.addmv.default: aten.mv}[func].default
    if isinstance(bias, NVFP4Weight):
        return _dense(func, args, kwargs)
    y = product(a, b)
    y = y if alpha == 1 else y * alpha
    # With beta 0 torch ignores the bias, also where it is not a number.
    return y if beta == 0 else y + (bias if beta == 1 else bias * beta)


# transformers' own, which it uses where torch's is not to be had, exists only once it was imported: known by name.
@implements([aten._grouped_mm.default, "transformers::grouped_mm_fallback"])
def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    given = [kwargs.get(name) for name in ("offs", "bias", "out_dtype")]
    x, w, offs, bias, out_dtype = fill_defaults(args, 5, given)
    if offs is None and bias is None and x.dim() == 3 and w.dim() == 3:
        return aten.bmm.default(x, w)
    served = isinstance(w, NVFP4Weight) and isinstance(x, Tensor) and not isinstance(x, NVFP4Weight)
    served = served and len(w.lead) == 1 and w.expert_ids is None and w.view_dims is None and x.dim() == 2
    if not served or offs is None or bias is not None or out_dtype not in (None, x.dtype):
        return _dense(func, args, kwargs)
    if not w.transposed:
        return nvfp4.input_grad(x, *_operands(w), offs=offs)
    return nvfp4.grouped(x, *_operands(w), offs, *_activations(w))


def contract(x: Tensor, w: NVFP4Weight, batch: Merged, inner: Merged, outer: Merged) -> Tensor:
    """x [B, M, inner] times w shown as [batch, inner, outer] -> [B, M, outer].

    Each leading dim of w (experts) is in one of the three: a batch each, summed over, or side by side in the result.
    Whole K contracts, or the rows; anything else takes the dequantised weight, which a compiled graph reports.
    """
    lead = len(w.lead)
    rows, k = lead, lead + 1
    over_rows = k in outer
    contracted, free = (rows, k) if over_rows else (k, rows)
    if contracted not in inner or free in (*batch, *inner):
        return torch.matmul(x, w.show((batch, inner, outer)).dequantize())
    operand = _spread(x, w, batch, inner, contracted)
    if w.expert_ids is not None:
        y = _indexed(operand, w, over_rows)
    elif lead:
        y = _batched(operand.reshape(-1, *operand.shape[-2:]), w, over_rows)
    else:
        y = _plain(operand, w, over_rows)
    y = y.view(*operand.shape[:-1], y.shape[-1])
    # Now [*lead, M, free].
    summed = [d for d in range(lead) if d in inner]
    labels = [d for d in (*range(lead), -1, free) if d not in summed]
    if summed:
        y = y.float().sum(summed).to(x.dtype)
    order = [*batch, -1, *(d for d in outer if d in labels)]
    hidden = [d for d in labels if d not in order]
    y = y.permute([labels.index(d) for d in (*order, *hidden)])
    return y.reshape(*x.shape[:2], math.prod(w.sizes[d] for d in outer))


def _spread(x: Tensor, w: NVFP4Weight, batch: Merged, inner: Merged, contracted: int) -> Tensor:
    """x [B, M, inner] as what meets each expert: [*lead, M, K] or [*lead, M, N]."""
    lead, sizes = w.lead, w.sizes
    labels = [*batch, -1, *inner]
    missing = [d for d in range(len(lead)) if d not in labels]
    x = x.reshape(*(sizes[d] for d in batch), x.shape[1], *(sizes[d] for d in inner), *[1] * len(missing))
    labels += missing
    x = x.permute([labels.index(d) for d in (*range(len(lead)), -1, contracted)])
    return x.expand(*lead, *x.shape[-2:])


def _is_matrix(w: NVFP4Weight) -> bool:
    """Whether w shows [N, K] or [K, N] of one weight."""
    return not w.stored and w.view_dims is None


def _plain(x: Tensor, w: NVFP4Weight, over_rows: bool) -> Tensor:
    """x [.., K] or [.., N] by one weight."""
    if over_rows:
        return nvfp4.input_grad(x, *_operands(w))
    return nvfp4.linear(x, *_operands(w), *_activations(w))


def _batched(x: Tensor, w: NVFP4Weight, over_rows: bool) -> Tensor:
    """x [E, M, .] by the E stored experts."""
    if over_rows:
        return nvfp4.input_grad(x, *_operands(w))
    return nvfp4.batched(x, *_operands(w), *_activations(w))


def _indexed(x: Tensor, w: NVFP4Weight, over_rows: bool) -> Tensor:
    """x [*lead, M, .], M rows for each chosen expert."""
    assert w.expert_ids is not None
    m = x.shape[-2]
    ids = w.expert_ids.unsqueeze(-1).expand(*w.lead, m).reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    if over_rows:
        return nvfp4.input_grad(x, *_operands(w), ids=ids)
    return nvfp4.indexed(x, *_operands(w), ids, *_activations(w))


def _operands(w: NVFP4Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scales of one weight or of all stored experts in one dim."""
    parts = w.qdata, w.block_scale.view(torch.uint8), w.global_scale
    if len(w.stored) <= 1:
        return parts
    qdata, block_scale, global_scale = (t.flatten(0, len(w.stored) - 1) for t in parts)
    return qdata, block_scale, global_scale


def _activations(w: NVFP4Weight) -> tuple[Tensor | None, str, str]:
    scale = w.act_scale
    return scale.reshape(-1) if scale is not None and scale.dim() > 1 else scale, w.activations, w.dialect


def _dense(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The product on the dequantised weight: right, and reported as such by a compiled graph."""
    dense = [a.dequantize() if isinstance(a, NVFP4Weight) else a for a in args]
    return func(*dense, **kwargs)


@implements(["transformers::grouped_mm_fallback_backward"])
def _grouped_mm_backward(func: Any, types: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Gradient with respect to x; a packed weight is frozen, and what stands for its gradient takes no memory."""
    _, w, offs, grad = args
    return aten._grouped_mm.default(grad, w.transpose(-2, -1), offs), grad.new_zeros(()).expand(w.shape)
