"""What torch operations do with an NVFP4Weight: views stay packed, products become our ops, the rest is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from .tensor import NVFP4Weight, unsupported

aten = torch.ops.aten
nvfp4 = torch.ops.fx_nvfp4
implements = NVFP4Weight.implements


def _operands(w: NVFP4Weight) -> tuple[Tensor, Tensor, Tensor]:
    return w.qdata, w.block_scale.view(torch.uint8), w.global_scale


def _activations(w: NVFP4Weight) -> tuple[Tensor | None, str, str]:
    return w.act_scale, w.activations, w.dialect


def _map_parts(w: NVFP4Weight, fn: Callable[[Tensor], Tensor], **changes: Any) -> NVFP4Weight:
    """w with fn applied to codes, block scales (as bytes) and global scales."""
    block_scale = fn(w.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return w.replace(qdata=fn(w.qdata), block_scale=block_scale, global_scale=fn(w.global_scale), **changes)


def _view(func: Any, args: Any, kwargs: Any, view: NVFP4Weight) -> NVFP4Weight:
    """view, marked as an alias of its base; inference tensors carry no such mark."""
    return view if torch.is_inference_mode_enabled() else return_and_correct_aliasing(func, args, kwargs, view)


@implements([aten._to_copy.default])
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
    moved = w._apply_fn_to_data(lambda t: t.to(to["device"], non_blocking=to["non_blocking"], copy=True))
    return moved.replace(orig_dtype=to["dtype"])


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _transpose(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w = args[0]
    dims = list(range(w.dim()))
    if func is aten.permute.default:
        order = [d % w.dim() for d in args[1]]
    else:
        order = list(dims)
        a, b = (d % w.dim() for d in args[1:3]) if func is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
    if order == dims:
        return w.replace()
    if order != [*dims[:-2], dims[-1], dims[-2]]:
        raise unsupported(func, w, f"dims permuted to {order}, only the last two can be swapped")
    return _view(func, args, kwargs, w.replace(transposed=not w.transposed))


@implements([aten.select.int])
def _select(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, index = args
    if w.dim() != 3 or dim % w.dim() or w.expert_ids is not None:
        raise unsupported(func, w, f"select along dim {dim}, only an expert of a 3-D weight can be selected")
    act_scale = w.act_scale.select(0, index) if w.act_scale is not None and w.act_scale.dim() else w.act_scale
    return _view(func, args, kwargs, _map_parts(w, lambda t: t.select(0, index), act_scale=act_scale))


@implements([aten.index.Tensor])
def _index(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, indices = args
    if len(indices) != 1 or indices[0] is None:
        raise unsupported(func, w, "indexed along several dims, only experts can be indexed")
    return _choose(func, w, indices[0])


@implements([aten.index_select.default])
def _index_select(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, ids = args
    if dim % w.dim():
        raise unsupported(func, w, f"index_select along dim {dim}, only experts can be indexed")
    return _choose(func, w, ids)


def _choose(func: Any, w: NVFP4Weight, ids: Tensor) -> NVFP4Weight:
    """experts[ids] without gathering: the product gathers."""
    if w.qdata.dim() != 3 or ids.dtype not in (torch.int32, torch.int64):
        raise unsupported(func, w, f"indexed with {ids.dtype}, only experts can be indexed, by integers")
    if w.expert_ids is not None:
        return w.replace(expert_ids=w.expert_ids[ids])
    # Indexing counts negative ids from the end; for the ops they belong to nobody.
    return w.replace(expert_ids=torch.where(ids < 0, ids + w.qdata.shape[0], ids))


@implements([aten.slice.Tensor])
def _slice(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    rows, k = (w.dim() - 1, w.dim() - 2) if w.transposed else (w.dim() - 2, w.dim() - 1)
    dim %= w.dim()
    if w.expert_ids is not None or dim == k:
        raise unsupported(func, w, f"slice along dim {dim}, only experts and output rows can be sliced")
    stored = dim if dim != rows else w.qdata.dim() - 2
    act_scale = w.act_scale
    if act_scale is not None and act_scale.dim() and stored == 0:
        act_scale = aten.slice.Tensor(act_scale, 0, start, end, step)
    sliced = _map_parts(w, lambda t: aten.slice.Tensor(t, stored, start, end, step), act_scale=act_scale)
    return _view(func, args, kwargs, sliced)


@implements([aten.split.Tensor])
def _split(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, size, dim = fill_defaults(args, 3, [0])
    return [aten.slice.Tensor(w, dim, start, start + size) for start in range(0, w.shape[dim], size)]


@implements([aten.split_with_sizes.default])
def _split_with_sizes(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, sizes, dim = fill_defaults(args, 3, [0])
    ends = list(itertools.accumulate(sizes))
    return [aten.slice.Tensor(w, dim, end - size, end) for end, size in zip(ends, sizes, strict=True)]


@implements([aten.unbind.int])
def _unbind(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    w, dim = fill_defaults(args, 2, [0])
    return [aten.select.int(w, dim, i) for i in range(w.shape[dim])]


@implements([aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _same_shape(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    """What matmul does to its operands before the product, where it changes nothing."""
    w, shape = args[:2]
    given = [size if size != -1 else w.shape[d - len(shape)] for d, size in enumerate(shape)]
    if given != list(w.shape):
        raise unsupported(func, w, f"shape {list(shape)} asked for, only its own is possible")
    return _view(func, args, kwargs, w.replace())


@implements([aten.copy_.default])
def _copy(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    to, source = args[:2]
    if not (isinstance(to, NVFP4Weight) and isinstance(source, NVFP4Weight)) or to.describe() != source.describe():
        kinds = [repr(t) if isinstance(t, NVFP4Weight) else f"{t.dtype} {list(t.shape)}" for t in (to, source)]
        raise ValueError(
            f"copy_: cannot copy {kinds[1]} into {kinds[0]}; between packed and dense weights, or other activations, "
            "use load_state_dict(..., assign=True) or replace the parameter"
        )
    names, _ = to.__tensor_flatten__()
    for name in names:
        getattr(to, name).copy_(getattr(source, name))
    return to


@implements([aten.linear.default, torch.nn.functional.linear])
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = fill_defaults(args, 3, [kwargs.get("bias")])
    if not isinstance(w, NVFP4Weight) or w.dim() != 2 or w.transposed:
        return _dense(func, args, kwargs)
    y = nvfp4.linear(x, *_operands(w), *_activations(w))
    return y if bias is None else y + bias


@implements([aten.mm.default, aten.matmul.default, aten.mv.default])
def _matmul(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    if isinstance(w, NVFP4Weight) and not isinstance(x, NVFP4Weight) and w.transposed:
        if w.dim() == 2:
            return nvfp4.linear(x, *_operands(w), *_activations(w))
        if w.dim() == 3 and x.dim() in (2, 3):
            return _bmm_right(x.expand(w.shape[0], *x.shape[-2:]), w)
    if isinstance(x, NVFP4Weight) and not isinstance(w, NVFP4Weight) and not x.transposed:
        if x.dim() == 2 and w.dim() == 1:
            return nvfp4.linear(w, *_operands(x), *_activations(x))
        if w.dim() >= 2:
            return _matmul(func, types, (w.mT, x.mT), kwargs).mT
    return _dense(func, args, kwargs)


@implements([aten.addmm.default, aten.baddbmm.default])
def _addmm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, w = args
    if kwargs or not isinstance(w, NVFP4Weight) or not w.transposed:
        return _dense(func, args, kwargs)
    return _matmul(aten.matmul.default, types, (x, w), {}) + bias


@implements([aten.bmm.default])
def _bmm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    if isinstance(w, NVFP4Weight) and not isinstance(x, NVFP4Weight) and w.transposed:
        return _bmm_right(x, w)
    if isinstance(x, NVFP4Weight) and not isinstance(w, NVFP4Weight) and not x.transposed:
        return _bmm_right(w.transpose(1, 2), x).transpose(1, 2)
    return _dense(func, args, kwargs)


def _bmm_right(x: Tensor, w: NVFP4Weight) -> Tensor:
    """x [B, M, K] times weights [B, N, K] transposed; with expert ids, batch b uses expert ids[b]."""
    if w.expert_ids is None:
        return nvfp4.batched(x, *_operands(w), *_activations(w))
    b, m, k = x.shape
    ids = w.expert_ids.repeat_interleave(m) if m != 1 else w.expert_ids
    y = nvfp4.indexed(x.reshape(b * m, k), *_operands(w), ids, *_activations(w))
    return y.view(b, m, y.shape[-1])


@implements([aten._grouped_mm.default])
def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args[:2]
    given = [kwargs.get(name) for name in ("offs", "bias", "out_dtype")]
    _, _, offs, bias, out_dtype = fill_defaults(args, 5, given)
    served = isinstance(w, NVFP4Weight) and w.transposed and w.expert_ids is None and x.dim() == 2
    if not served or offs is None or bias is not None or out_dtype is not None:
        return _dense(func, args, kwargs)
    return nvfp4.grouped(x, *_operands(w), offs, *_activations(w))


def _dense(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The product on the dequantised weight: right, and reported as such by a compiled graph."""
    dense = [a.dequantize() if isinstance(a, NVFP4Weight) else a for a in args]
    return func(*dense, **kwargs)


def serve_transformers_fallback() -> None:
    """Let transformers' own grouped product (used in compiled fp32 and fp16 models) take packed weights.

    Its operator exists only once transformers' MoE integration was imported, so this is called again by the
    backend and the loader; it does nothing where there is no such operator.
    """
    op = getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None)
    if op is not None and op.default not in NVFP4Weight._ATEN_OP_TABLE[NVFP4Weight]:
        implements([op.default])(_grouped_mm)
