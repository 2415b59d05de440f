"""A packed weight into tiles: as another tensor, or in the memory that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import is_tiled
from .lowering import compat
from .prepack import Rewriting, check_suited, prepack, tiled_shapes, write_canonical
from .tensor import NVFP4Weight

_ALIGNMENT = 16  # bytes that a lane loads at once


class SharedMemoryError(ValueError):
    """A weight cannot change where it lies, as other tensors have their elements there."""


def tiled(w: NVFP4Weight, name: str) -> NVFP4Weight:
    """See :meth:`NVFP4Weight.tiled`."""
    if is_tiled(w.qdata):
        return w
    words, scales = prepack(w.qdata, w.block_scale, name)
    return w.replace(qdata=words, block_scale=scales)


def tile_(w: NVFP4Weight, name: str) -> NVFP4Weight:
    """See :meth:`NVFP4Weight.tile_`."""
    if is_tiled(w.qdata):
        return w
    check_tileable(w, name)
    # Inference tensors can be written to in that mode alone.
    with torch.no_grad(), torch.inference_mode(w.qdata.is_inference()):
        words, scales = _reinterpreted(w)
        codes, raw = w.qdata.data, w.block_scale.data
        rewriting = Rewriting(codes, raw, words, scales)
        try:
            rewriting.write()
            # The parts stay the objects that they are, so that weights which share them change alike.
            w.qdata.data, w.block_scale.data = words, scales
        except BaseException:  # memory that runs out, or an interrupt
            rewriting.put_back()
            w.qdata.data, w.block_scale.data = codes, raw
            raise
    return w


def untile_(w: NVFP4Weight, codes: torch.Size, scales: torch.Size) -> None:
    """Undo :func:`tile_` of a weight whose codes and block scales had these shapes, in little more memory."""
    with torch.no_grad(), torch.inference_mode(w.qdata.is_inference()):
        qdata, raw = (_on_storage(t, torch.uint8, shape) for t, shape in ((w.qdata, codes), (w.block_scale, scales)))
        write_canonical(w.qdata, w.block_scale, qdata, raw, at_once=1)
        w.qdata.data, w.block_scale.data = qdata, raw.view(torch.float8_e4m3fn)


def check_tileable(w: NVFP4Weight, name: str) -> None:
    """Raise what :func:`tile_` raises, SharedMemoryError last."""
    check_suited(w.qdata, w.block_scale, name)
    for part, tensor in (("codes", w.qdata), ("block scales", w.block_scale)):
        _check_own(f"the {part} of {name}", tensor)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a device or, where torch raises a plain RuntimeError, on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _check_own(what: str, part: Tensor) -> None:
    """Raise ValueError unless nobody but the weight sees what happens to a part."""
    if not part.is_contiguous() or part.data_ptr() % _ALIGNMENT or part.storage_offset() % _ALIGNMENT:
        raise ValueError(
            f"tile_: {what} are {list(part.shape)} with strides {part.stride()}, expected contiguous and aligned to "
            f"{_ALIGNMENT} bytes; clone the weight first"
        )
    if not part.is_cuda and part.is_shared():
        raise ValueError(f"tile_: {what} are in memory of other processes too; use tiled(), which copies")
    others = compat.other_users(part)
    if others:
        raise SharedMemoryError(
            f"tile_: {what} share their memory with {others} other tensor(s), which would change too; "
            "let go of state dicts and views of the weight first, or use tiled(), which copies"
        )


def _reinterpreted(w: NVFP4Weight) -> tuple[Tensor, Tensor]:
    """Words and scales in the memory of codes and block scales, of which nothing else remains."""
    shapes = tiled_shapes(w.qdata)
    return _on_storage(w.qdata, torch.int32, shapes[0]), _on_storage(w.block_scale, torch.uint8, shapes[1])


def _on_storage(part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    offset = part.storage_offset() * part.itemsize // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=part.device).set_(part.untyped_storage(), offset, shape)  # type: ignore[call-overload]
