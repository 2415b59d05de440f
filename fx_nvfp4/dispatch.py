"""What torch operations do with an NVFP4Weight: views stay packed, products become our ops, the rest is refused.

Importing this registers all of it: :mod:`fx_nvfp4.views`, :mod:`fx_nvfp4.products`, and here copies and moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import products, views  # noqa: F401
from .layouts import is_tiled
from .tensor import NVFP4Weight, unsupported

aten = torch.ops.aten
implements = NVFP4Weight.implements

_COPIES = (
    "memory of its shape, as FSDP2 and distribute_tensor ask for: leave packed weights out of fully_shard by "
    "ignored_params={p for p in model.parameters() if isinstance(p, NVFP4Weight)}, and share experts among ranks by "
    "fx_nvfp4.shard_experts"
)
_ADVICE = {
    aten.new_zeros.default: _COPIES,
    aten.empty_like.default: _COPIES,
    aten.embedding.default: "an embedding reads rows as they are: keep it unpacked, or dequantise the table once",
    aten.gather.default: "gathered element by element: choose experts by index, weight[ids]",
    aten.repeat.default: "repeat copies: use expand, or choose experts by index, weight[ids]",
    aten.index_put.default: "written to: packed weights are constant",
}


@implements(list(_ADVICE))
def _refuse(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    packed = next(a for a in args if isinstance(a, NVFP4Weight))
    raise unsupported(func, packed, _ADVICE[func])


@implements([aten.detach.default, aten.alias.default, aten.clone.default])
def _of_parts(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    return args[0]._apply_fn_to_data(lambda t: func(t, *args[1:], **kwargs))


@implements([aten._assert_tensor_metadata.default])
def _assert_metadata(func: Any, types: Any, args: Any, kwargs: Any) -> None:
    """What torch.export puts before a conversion; a meta tensor like the weight answers all but the device."""
    w, *rest = args
    looks = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device="meta")
    if kwargs.get("device") not in (None, w.device):
        raise RuntimeError(f"Tensor device mismatch! Expected: {kwargs['device']}, Got: {w.device}")
    func(looks, *rest, **{**kwargs, "device": None})


@implements([aten._to_copy.default])
def _to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
    moved = w._apply_fn_to_data(lambda t: t.to(to["device"], non_blocking=to["non_blocking"], copy=True))
    return moved.replace(orig_dtype=to["dtype"])


@implements([aten._pin_memory.default])
def _pin_memory(func: Any, types: Any, args: Any, kwargs: Any) -> NVFP4Weight:
    return args[0]._apply_fn_to_data(lambda t: t.pin_memory())


@implements([aten.is_pinned.default])
def _is_pinned(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    names, _ = args[0].__tensor_flatten__()
    return all(getattr(args[0], name).is_pinned() for name in names)


@implements([aten.copy_.default])
def _copy(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    to, source = args[:2]
    if not _same_kind(to, source):
        kinds = [repr(t) if isinstance(t, NVFP4Weight) else f"{t.dtype} {list(t.shape)}" for t in (to, source)]
        raise ValueError(
            f"copy_: cannot copy {kinds[1]} into {kinds[0]}; between packed and dense weights, other activations, or "
            "views of other dims or of chosen experts, use load_state_dict(..., assign=True) or replace the parameter"
        )
    # What the parts mean is the destination's to say: it may be in use in compiled graphs.
    source = source.tiled() if is_tiled(to.qdata) else source.canonical()
    names, _ = to.__tensor_flatten__()
    for name in names:
        getattr(to, name).copy_(getattr(source, name))
    return to


@implements([aten.equal.default])
def _equal(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    """Whether both hold the same bytes that mean the same; a packed and a dense weight are never equal."""
    a, b = args
    if not (isinstance(a, NVFP4Weight) and isinstance(b, NVFP4Weight)):
        return False
    (names, meaning), (other_names, other_meaning) = a.__tensor_flatten__(), b.__tensor_flatten__()
    if names != other_names or meaning != other_meaning:
        return False
    return all(torch.equal(_bytes(getattr(a, name)), _bytes(getattr(b, name))) for name in names)


def _bytes(part: Tensor) -> Tensor:
    return part.view(torch.uint8) if part.itemsize == 1 else part


def _same_kind(to: Tensor, source: Tensor) -> bool:
    """Whether the parts of one mean the same in the other, and copying writes nothing else."""
    if not (isinstance(to, NVFP4Weight) and isinstance(source, NVFP4Weight)):
        return False
    chosen = to.expert_ids is not None or source.expert_ids is not None
    return not chosen and _quantisation(to) == _quantisation(source) and to.dims == source.dims


def _quantisation(w: NVFP4Weight) -> tuple[str, tuple[int, ...] | None]:
    return w.activations, None if w.act_scale is None else tuple(w.act_scale.shape)
