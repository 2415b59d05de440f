"""Finds which leaves are qdata, block scales and global scale by where in them each element of a weight is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fx_nvfp4.format import BLOCK

from .found import Axis, NotPacked, Refused, UnknownScale
from .probe import Probe, Read
from .sample import same_size, shape_of

_SCALE_DTYPES = (torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu, torch.float8_e5m2)


def _codes_per_element(dtype: torch.dtype) -> int:
    return 2 * dtype.itemsize


def find_qdata(probe: Probe) -> tuple[Read, int, int]:
    """The leaf read at k // 2 (for int32 k // 8), its dimension, and the operand's dimension K."""
    _check_one_weight(probe)
    best: tuple[tuple[float, bool, int], Read, int, int, Tensor] | None = None
    for read in probe.packed:
        ratio = _codes_per_element(read.dtype)
        for d, k in itertools.product(range(read.index.shape[1]), range(len(probe.shape))):
            if probe.shape[k] < BLOCK:
                continue
            hit = read.seen & (read.column(d) == probe.coords[:, k] // ratio)
            share = float(hit.float().mean())
            # Experts that are each used twice are read at half of their number too, but have no blocks.
            rank = share, _is_in_blocks(probe, read, k), probe.shape[k]
            if share > 0.5 and (best is None or rank > best[0]):
                best = rank, read, d, k, hit
    if best is None:
        raise _not_packed_along_k(probe)
    (share, _, _), read, packed_dim, k_dim, hit = best
    name = read.node.name
    if share < 1:
        place = probe.where(~hit, k_dim)
        raise Refused(f"{place} differs: it does not read {name} at K // 2", "apply what is special there afterwards")
    if not read.unique:
        raise Refused(f"several elements of {name} make up one weight", "unpack each code from one element")
    if others := [r.node.name for r in probe.packed if r is not read and _is_at_half(probe, r, k_dim)]:
        raise Refused(f"packed codes come from {name} and {', '.join(others)}", "multiply with each by itself")
    if not same_size(read.node.meta["val"].shape[packed_dim] * _codes_per_element(read.dtype), probe.size(k_dim)):
        raise Refused(f"only part of {name}'s K is used", "slice the packed tensors, or use the whole of K")
    return read, packed_dim, k_dim


def _check_one_weight(probe: Probe) -> None:
    """Raise `Refused` if elements come from one or another packed tensor, each read at K // 2."""
    parts = [r for r in probe.packed if not bool(r.seen.all()) and _is_packed_where_seen(probe, r)]
    if len(parts) > 1 and int(sum(r.seen.sum() for r in parts)) == len(probe.coords):
        names = ", ".join(r.node.name for r in parts)
        raise Refused(
            f"{len(parts)} packed weights are put together after they were dequantised ({names})",
            "stack or concatenate their codes and scales and dequantise the whole, or multiply with each by itself",
        )


def _is_packed_where_seen(probe: Probe, read: Read) -> bool:
    ratio = _codes_per_element(read.dtype)
    at, index = probe.coords[read.seen], read.index[read.seen]
    columns = itertools.product(range(index.shape[1]), range(at.shape[1]))
    return any(probe.shape[k] >= BLOCK and torch.equal(index[:, d], at[:, k] // ratio) for d, k in columns)


def _is_in_blocks(probe: Probe, qdata: Read, k_dim: int) -> bool:
    """Whether another leaf is read at K // 16."""
    block = probe.coords[:, k_dim] // BLOCK
    others = (r for r in probe.reads if r is not qdata)
    return any(torch.equal(r.column(d), block) for r in others for d in range(r.index.shape[1]))


def _is_at_half(probe: Probe, read: Read, k_dim: int) -> bool:
    half = probe.coords[:, k_dim] // _codes_per_element(read.dtype)
    return any(torch.equal(read.column(d), half) for d in range(read.index.shape[1]))


def _not_packed_along_k(probe: Probe) -> Exception:
    """Why no leaf of integers is read at K // 2: planar, merged, not packed at all, or something unknown."""
    for read, (k, extent) in itertools.product(probe.packed, enumerate(probe.shape)):
        ratio, name = _codes_per_element(read.dtype), read.node.name
        for d, size in enumerate(shape_of(read.node)):
            if size * ratio == extent and torch.equal(read.column(d), probe.coords[:, k] % size):
                reason = (
                    f"planar packing: {name} holds the first part of K in its low bits and the rest in its high bits"
                )
                return Refused(reason, "repack so that a byte holds two neighbours along K")
            merged = probe.coords[:, k] % max(size * ratio, 1) // ratio
            if 1 < size * ratio < extent and torch.equal(read.column(d), merged):
                return Refused(f"K is merged with another dimension in dim {k}", "keep K a dimension of its own")
    plain = all(r.dtype != torch.float4_e2m1fn_x2 and r.unique and probe.axes(r) is not None for r in probe.packed)
    names = ", ".join(r.node.name for r in probe.packed)
    if plain and all(r.dtype not in _SCALE_DTYPES[::2] for r in probe.reads):
        return NotPacked()
    if plain:
        return Refused(f"{names} holds one code per byte", "pack two codes into a byte along K")
    return Refused(f"{names} is not read at K // 2 along any dimension", "pack two codes into a byte along K")


def explained(probe: Probe, read: Read, skip: int | None = None) -> tuple[Axis, ...]:
    """How a leaf's dimensions except `skip` are addressed; raises `Refused` if in a way that `Axis` cannot say."""
    axes = probe.axes(read, skip)
    if axes is None:
        raise Refused(
            f"dimensions {list(shape_of(read.node))} of {read.node.name} are addressed in an unknown way",
            "choose experts and rows by slicing or by an integer tensor",
        )
    return axes


def find_scale(
    probe: Probe, qdata: Read, packed_dim: int, k_dim: int
) -> tuple[Read, tuple[Axis, ...], int, Literal["linear", "swizzled"]]:
    """The leaf of block scales, the axes of its other dimensions, its dimension of blocks, and its layout."""
    k = probe.coords[:, k_dim]
    others = [r for r in probe.reads if r is not qdata and math.prod(shape_of(r.node)) > 1]
    others.sort(key=lambda r: r.dtype not in _SCALE_DTYPES)
    for read in others:
        if swizzled := _swizzled_axes(probe, read, qdata, packed_dim, k):
            _check_scale(probe, read, BLOCK)
            return read, swizzled[0], swizzled[1], "swizzled"
    for block in (BLOCK, 32, 8, 64, 128, 4, 256):
        hits = [(read, d, hit) for read in others for d, hit in _block_dims(read, k // block)]
        if not hits:
            continue
        read, d, hit = max(hits, key=lambda found: float(found[2].float().mean()))
        _check_scale(probe, read, block)
        if not bool(hit.all()):
            place = probe.where(~hit, k_dim)
            raise Refused(f"{place} differs: {read.node.name} is not read at K // {block}", "treat it apart")
        if not same_size(read.node.meta["val"].shape[d] * block, probe.size(k_dim)):
            raise Refused(f"only part of {read.node.name}'s K is used", "slice the packed tensors too")
        return read, explained(probe, read, d), d, "linear"
    raise _no_scale(others, k)


def _block_dims(read: Read, block: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Dimensions of a leaf that most samples read at their block of K, and which of them do."""
    for d, size in enumerate(shape_of(read.node)):
        hit = read.seen & (read.column(d) == block)
        if float(hit.float().mean()) >= 0.5 and (bool(block.any()) or size == 1):
            yield d, hit


def _check_scale(probe: Probe, read: Read, block: int) -> None:
    reasons = []
    if read.dtype == torch.float8_e8m0fnu:
        reasons.append("scale is e8m0: MXFP4")
    elif read.dtype not in (torch.float8_e4m3fn, torch.uint8):
        reasons.append(f"block scale is {str(read.dtype).removeprefix('torch.')}, NVFP4 has float8_e4m3fn")
    if block != BLOCK:
        reasons.append(f"block of {block}, NVFP4 has {BLOCK}")
    if reasons:
        raise Refused(f"{'; '.join(reasons)} ({read.node.name})", "quantise to NVFP4 to have it emulated")
    if not read.unique:
        raise Refused(f"several elements of {read.node.name} make up one weight", "read one block scale per block")


def _no_scale(others: Sequence[Read], k: Tensor) -> Refused:
    for read, block in itertools.product(others, (BLOCK, 32)):
        for d in range(read.index.shape[1]):
            offset = read.column(d) - k // block
            if read.index.shape[1] and bool((offset == offset[0]).all()):
                place = f"K // {block} {int(offset[0]):+d}"
                return Refused(f"{read.node.name} is read at {place}", f"read block scales at K // {BLOCK}")
    names = ", ".join(f"{r.node.name} {r.dtype}{list(shape_of(r.node))}" for r in others) or "there are none"
    return Refused(f"no block scale is read at K // {BLOCK}: {names}", "scale blocks of 16 along K by float8_e4m3fn")


def _swizzled_axes(
    probe: Probe, read: Read, qdata: Read, packed_dim: int, k: Tensor
) -> tuple[tuple[Axis, ...], int] | None:
    """Axes and first dimension of the tiles, if block scales are laid out in tiles of 128 rows by 4 blocks."""
    shape, q_shape = shape_of(read.node), shape_of(qdata.node)
    if read.dtype not in _SCALE_DTYPES or math.prod(shape) % 512:
        return None
    block = k // BLOCK
    wide = -(-q_shape[packed_dim] * _codes_per_element(qdata.dtype) // (4 * BLOCK))
    row, height = torch.zeros_like(k), 1
    axes: tuple[Axis, ...] = ()
    for d in reversed([d for d in range(len(q_shape)) if d != packed_dim]):
        row, height = row + qdata.column(d) * height, height * q_shape[d]
        axis = probe.axis(qdata, d)
        if axis is None:
            return None
        axes = (axis, *axes)
        tile = row // 128 * wide + block // 4
        flat = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
        for lead in range(len(shape)):
            if math.prod(shape[lead:]) != -(-height // 128) * wide * 512:
                continue
            found = torch.zeros_like(k)
            for i, size in enumerate(shape[lead:], lead):
                found = found * size + read.column(i)
            if torch.equal(found, flat):
                before = [axis for i in range(lead) if (axis := probe.axis(read, i))]
                return ((*before, *axes), lead) if len(before) == lead else None
    return None


def find_global(probe: Probe, qdata: Read, scale: Read) -> Read | None:
    """The one leaf left, or None if there is none; raises `Refused` if it cannot be a global scale."""
    rest = [r for r in probe.reads if r is not qdata and r is not scale]
    if len(rest) > 1 or any(not r.dtype.is_floating_point or r.dtype.itemsize == 1 for r in rest):
        names = ", ".join(f"{r.node.name} {str(r.dtype).removeprefix('torch.')}{list(shape_of(r.node))}" for r in rest)
        raise UnknownScale(f"it depends on more than codes, block and global scales: {names}", "apply the others apart")
    if rest and not (rest[0].unique and bool(rest[0].seen.all())):
        raise UnknownScale(f"{rest[0].node.name} is not read once for every element", "apply one global scale to all")
    return rest[0] if rest else None
