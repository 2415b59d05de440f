"""A rank's part of a tensor as a DTensor, and back.

DTensor, and torch.distributed.checkpoint with it, takes parts to be those of torch.chunk, of which the last ones may be
smaller, or empty. Ours differ by one at most, so that no rank is idle. Where that is not the same, elements travel to
the ranks that the DTensor says have them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import all_to_all_single, broadcast
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .placed import Placed, Sizes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def placement(dims: int, place: Placed) -> Placement:
    """Of a part with so many dims of its own."""
    dim = _dim(dims, place)
    return Replicate() if dim is None else Shard(dim)


def whole_shape(part: Sizes, place: Placed) -> Sizes:
    """The shape of what the ranks' parts make, of one of this shape."""
    shape, dim = list(place.split(part)), _dim(len(part), place)
    if dim is not None:
        shape[dim] = _ends(shape[dim], place)[-1]
    return tuple(shape)


def to_dtensor(part: Tensor, place: Placed) -> DTensor:
    """What a rank holds of a tensor, as its part of a DTensor: a view of it, where elements need not travel.

    All ranks of the mesh have to call it.
    """
    mesh, dim, shape = _mesh(place), _dim(part.dim(), place), whole_shape(tuple(part.shape), place)
    local = part.reshape(place.split(tuple(part.shape)))
    if dim is not None:
        ends = _ends(local.shape[dim], place)
        local = _exchange(local, dim, ends, _chunks(ends), mesh)
    elif place.dim is None:
        local = local.clone()
        broadcast(local, group=mesh.get_group(), group_src=0)
    whole = torch.empty(shape, device="meta")
    placements = [placement(part.dim(), place)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def from_dtensor(value: DTensor, part: Sizes, place: Placed) -> Tensor:
    """What a rank holds of a tensor, in this shape, from what :func:`to_dtensor` made; all ranks have to call it."""
    mesh, dim, local = _mesh(place), _dim(len(part), place), value.to_local()
    if dim is not None:
        ends = _ends(place.split(part)[dim], place)
        local = _exchange(local, dim, _chunks(ends), ends, mesh)
    elif place.dim is None and mesh.get_local_rank():
        local = torch.zeros_like(local)
    return local.reshape(part)


def _mesh(place: Placed) -> DeviceMesh:
    assert place.mesh is not None
    return place.mesh


def _dim(dims: int, place: Placed) -> int | None:
    """Which dim of a part that has so many is cut, with gate and up apart."""
    if place.dim is None or place.dim >= dims:
        return None
    return place.dim + (place.halves is not None and place.dim >= place.halves)


def _ends(size: int, place: Placed) -> Sizes:
    """Where the ranks' parts begin and end, in entries, of which this rank has size: each may hold several elements."""
    rank = _mesh(place).get_local_rank()
    each = (place.bounds[rank + 1] - place.bounds[rank]) // size
    return tuple(end // each for end in place.bounds)


def _chunks(ends: Sizes) -> Sizes:
    """Where torch.chunk's parts begin and end, of as many entries over as many ranks."""
    ranks, count = len(ends) - 1, ends[-1]
    return tuple(min(rank * -(-count // ranks), count) for rank in range(ranks + 1))


def _exchange(part: Tensor, dim: int, have: Sizes, want: Sizes, mesh: DeviceMesh) -> Tensor:
    """From a rank's part by one division to its part by another."""
    if have == want:
        return part
    rank = mesh.get_local_rank()
    rows = part.movedim(dim, 0).contiguous()
    sent = [_common(have, rank, want, other) for other in range(mesh.size())]
    received = [_common(want, rank, have, other) for other in range(mesh.size())]
    result = rows.new_empty(want[rank + 1] - want[rank], *rows.shape[1:])
    # As bytes, which every backend carries.
    all_to_all_single(_as_bytes(result), _as_bytes(rows), received, sent, group=mesh.get_group())
    return result.movedim(0, dim).contiguous()


def _common(mine: Sizes, rank: int, theirs: Sizes, other: int) -> int:
    """How many entries one rank's part by one division shares with another's by another."""
    return max(0, min(mine[rank + 1], theirs[other + 1]) - max(mine[rank], theirs[other]))


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
