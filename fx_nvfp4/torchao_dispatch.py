"""What torchao's NVFP4Tensor cannot do on this device, done with NVFP4Weight.

torchao keeps every operation that it implements and that runs here: nothing changes on a GPU with FP4 units, nor for
weight-only products in eager mode. Importing fx_nvfp4 changes four things, the first two of which only raised before:

- what it lacks: index, stack, split, unbind, expand, einsum, slices of 3-D weights, views in inference mode, ...;
- products with quantised activations, and grouped products, where the device has no FP4 units;
- every product while the nvfp4_emu backend traces (:func:`emulated`): this is what emulation means, also on a GPU
  that needs none, for comparison;
- what AOTAutograd's cache keys such a tensor on, where torchao does not say: torch warns that it should.

All of it works on the tensor's own codes; scales that lie in 128 x 4 tiles are laid out linearly at each call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_map_only

from . import dispatch  # noqa: F401  (NVFP4Weight's operations)
from .lowering import compat
from .tensor import layout_key
from .torchao_interop import from_torchao, is_torchao_nvfp4

try:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
except ImportError:  # no prototypes in this torchao: nobody can hold such a tensor
    NVFP4Tensor = None

aten = torch.ops.aten

_emulated: ContextVar[bool] = ContextVar("fx_nvfp4_emulated", default=False)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, every product with an NVFP4Tensor is one of our ops."""
    token = _emulated.set(True)
    try:
        yield
    finally:
        _emulated.reset(token)


def swizzled_weights(tensors: Sequence[Any]) -> int:
    """How many of the tensors are NVFP4Tensors whose scales are laid out anew at each call."""
    return sum(1 for t in tensors if is_torchao_nvfp4(t) and t.is_swizzled_scales)


@torch.compiler.disable  # where a graph breaks, Dynamo would trace this frame by itself
def __torch_dispatch__(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: N807
    """In the place of NVFP4Tensor.__torch_dispatch__; disabling knows it by that name."""
    kwargs = kwargs or {}
    can = _TORCHAO_CAN.get(func)
    if func in cls._ATEN_OP_TABLE.get(cls, {}) and (can is None or can(func, *args, **kwargs)):
        result = _torchao_dispatch(cls, func, types, args, kwargs)
        # Not marked as an alias of its base: a compiled graph that returns it would ask for it by strides.
        fresh = _emulated.get() and isinstance(result, NVFP4Tensor) and all(result is not a for a in args)
        return result._apply_fn_to_data(lambda t: t) if fresh else result
    args, kwargs = tree_map_only(NVFP4Tensor, from_torchao, (args, kwargs))
    return func(*args, **kwargs)


def _has_fp4_units(device: torch.device) -> bool:
    """Whether torch._scaled_mm multiplies NVFP4 there: NVIDIA's compute capability 10 and above."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)


def _only_shapes(w: Any) -> bool:
    """Whether nothing is computed nor recorded, as when Dynamo asks for the result's shape.

    torchao's decoding takes some 30 operations there, for each expert where there are several.
    """
    return not compat.is_real(w.qdata) and get_proxy_mode() is None


def _one_scale(w: Any) -> bool:
    return w.per_tensor_scale is None or w.per_tensor_scale.dim() == 0


# Whether torchao can, one function an operation that it implements but not for every input


def _multiplies(func: Any, *args: Any, **kwargs: Any) -> bool:
    """mm(x, w), linear(x, w, bias) and addmm(bias, x, w); x may be quantised already."""
    x, w = args[1:3] if func is aten.addmm.default else args[:2]
    if _emulated.get() or kwargs or not isinstance(w, NVFP4Tensor) or (w.dim() == 2 and not _one_scale(w)):
        return False
    if _only_shapes(w):
        return False
    weight_only = w.act_quant_kwargs is None and not isinstance(x, NVFP4Tensor)
    return weight_only or _has_fp4_units(w.device)


def _multiplies_batches(func: Any, x: Any, w: Any) -> bool:
    return _multiplies(func, x, w) and w.dim() == 3


def _multiplies_groups(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    return not _emulated.get() and _has_fp4_units(x.device)


def _transposes(func: Any, w: Any, *dims: int) -> bool:
    if func is aten.t.default:
        return w.dim() == 2 and _one_scale(w) and _marks_views(w)
    return _marks_views(w) and w.dim() == 3 and tuple(dims) in ((1, 2), (2, 1), (-1, -2), (-2, -1))


def _marks_views(w: Any) -> bool:
    """torchao cannot view an ordinary tensor in inference mode: it makes the view an inference tensor."""
    return not torch.is_inference_mode_enabled() or w.is_inference()


def _views(func: Any, w: Any, shape: Sequence[int]) -> bool:
    """Only its own shape: in another one, torchao's scales would not follow."""
    return w.dim() == 2 and _one_scale(w) and _marks_views(w) and list(shape) in ([-1, w.shape[1]], list(w.shape))


def _selects(func: Any, w: Any, dim: int, index: Any) -> bool:
    return dim == 0 and w.dim() == 3 and w.scale.dim() == 3 and _marks_views(w)


def _slices(func: Any, w: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    """2-D weights, from and to whole tiles of swizzled scales or whole blocks of linear ones."""
    plain = w.dim() == 2 and _one_scale(w) and w.qdata.is_contiguous() and _marks_views(w)
    if not plain or dim not in (0, 1) or step != 1:
        return False
    unit = ((128, 64) if w.is_swizzled_scales else (1, 16))[dim]
    start, size = 0 if start is None else start, w.shape[dim]
    end = size if end is None or end > size else end
    whole_end = end % unit == 0 or (end == size and dim == 0)
    return start >= 0 and end >= 0 and start % unit == 0 and whole_end


_TORCHAO_CAN: dict[Any, Callable[..., bool]] = {
    aten.mm.default: _multiplies,
    aten.matmul.default: _multiplies,
    aten.linear.default: _multiplies,
    aten.addmm.default: _multiplies,
    aten.bmm.default: _multiplies_batches,
    aten._grouped_mm.default: _multiplies_groups,
    aten.t.default: _transposes,
    aten.transpose.int: _transposes,
    aten.view.default: _views,
    aten.select.int: _selects,
    aten.slice.Tensor: _slices,
}

if NVFP4Tensor is not None:
    _torchao_dispatch = NVFP4Tensor.__torch_dispatch__.__func__
    # Where this module is imported anew, it takes the place of its older self.
    _torchao_dispatch = getattr(_torchao_dispatch, "replaces", _torchao_dispatch)
    __torch_dispatch__.replaces = _torchao_dispatch
    NVFP4Tensor.__torch_dispatch__ = classmethod(__torch_dispatch__)
    if not hasattr(NVFP4Tensor, "_stable_hash_for_caching"):
        NVFP4Tensor._stable_hash_for_caching = layout_key
