"""State dicts of sharded models, in the words of torch.distributed: plain tensors and DTensors of plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts import is_tiled
from ..tensor import NVFP4Weight
from .experts import Experts, describe, marked
from .placed import Placed, Sizes

_BYTES = "block_scale_bytes"
_FILL = "fill what fx_nvfp4.sharded_state_dict(model) gives of this model, as by torch.distributed.checkpoint.load"


def sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model that :func:`fx_nvfp4.shard_experts` or :func:`fx_nvfp4.shard_linears` has cut.

    torch.distributed.checkpoint saves it, and loads it into the same model cut otherwise: over another number of ranks,
    by another dim, or not at all, as a model that is not sharded has the same names and shapes. Call it on every rank.

    A packed weight ``name``, [.., N, K] or transposed, sharded or not, becomes the parts of the canonical layout, also
    where it is in tiles:

    - ``name.qdata``: uint8 [.., N, K/2];
    - ``name.block_scale_bytes``: uint8 [.., N, K/16], float8_e4m3fn by its bytes, which not all collectives carry;
    - ``name.global_scale``: float32 [.., N];
    - ``name.act_scale``: float64 [] or [E], where activations are static.

    Of experts whose rows hold gate and then up, these and biases have [E, 2, N, ..] in place of [E, 2N, ..], so that
    a rank's parts of both are one part. What a rank holds a part of is a DTensor of the shape that all parts make, with
    ``Shard`` or ``Replicate`` on the mesh; a bias of which the first rank alone has values is replicated. Everything
    else is as ``model.state_dict()`` has it, and taken to be the same on all ranks, adapters inside sharded layers too.

    Tensors share the model's memory, but for copies of weights in tiles, of biases of the first rank, and of parts that
    are not equally large: DTensors divide those as torch.chunk does, and rows travel for it.

    Raises:
        ValueError: a layer was quantised after it was sharded; names it.
    """
    state: dict[str, Any] = {}
    for name, value, place in _entries(model):
        if place is None:
            state[name] = value.detach() if isinstance(value, Tensor) else value
            continue
        for key, part in _parts(name, value).items():
            state[key] = _shown(part, place)
    return state


@torch.no_grad()
def load_sharded_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy what :func:`sharded_state_dict` gave of such a model into one, in place, into tiles where it has them.

        state = fx_nvfp4.sharded_state_dict(model)
        torch.distributed.checkpoint.load(state, checkpoint_id=path)
        fx_nvfp4.load_sharded_state_dict(model, state)

    Call it on every rank. How activations are rounded (mode and dialect) is the model's to say, not the state's.

    Raises:
        ValueError: a name that is missing or that the model does not have, another shape or dtype, other placements;
            a layer that was quantised after it was sharded. Nothing is copied then. Or a weight that its tiles cannot
            hold.
    """
    rest, expected, kept = {}, {}, []
    for name, value, place in _entries(model):
        if place is None:
            rest[name] = value
        else:
            parts = _parts(name, value.detach().to("meta"))
            expected.update({key: _look(*_planned(part, place)) for key, part in parts.items()})
            kept.append((name, value.data, place, {key: tuple(part.shape) for key, part in parts.items()}))
    _check(state, expected, rest)
    model.load_state_dict({name: state[name] for name in rest}, strict=False)
    refused: ValueError | None = None
    for name, to, place, shapes in kept:
        parts = {key: _own(state[key], shape, place) for key, shape in shapes.items()}
        try:
            _copy(name, to, parts)
        except ValueError as error:  # other ranks wait for this one's parts of the next
            refused = refused or error
    if refused is not None:
        raise refused


def _entries(model: nn.Module) -> Iterator[tuple[str, Any, Placed | None]]:
    """Name, value and place of all that the model's state dict has; None: it is neither packed nor cut."""
    places = _places(model)
    # By identity, as wrappers change names.
    for name, value in model.state_dict(keep_vars=True).items():
        packed = isinstance(value, NVFP4Weight)
        place = places.get(id(value), Placed(packed=True) if packed else None)
        if place is not None and place.packed != packed:
            raise ValueError(
                f"{name}: it was sharded {_kind(place.packed)} and is {_kind(packed)} now, so that ranks may have "
                "other global scales: quantise the whole model, then shard it"
            )
        yield name, value, place


def _kind(packed: bool) -> str:
    return "packed" if packed else "dense"


def _places(model: nn.Module) -> dict[int, Placed]:
    """Where parameters lie, by their identity: those that are cut, and those of experts whose rows are split."""
    found: dict[int, Placed] = {}
    for path, module in model.named_modules():
        parts = marked(module)
        if not parts and any(isinstance(p, NVFP4Weight) and p.dim() == 3 for p in module.parameters(recurse=False)):
            parts = _split_rows(describe(path, module))
        found.update({id(module.get_parameter(name)): place for name, place in parts.items()})
    return found


def _split_rows(experts: Experts | None) -> Mapping[str, Placed]:
    """Of experts that nobody has cut; None: they are of a kind that cannot be."""
    if experts is None:
        return {}
    values = {name: experts.module.get_parameter(name) for name in experts.names()}
    return {n: Placed(isinstance(v, NVFP4Weight), halves=experts.halves(n)) for n, v in values.items()}


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that stand for a parameter, by their names in the state."""
    if not isinstance(value.data, NVFP4Weight):
        return {name: value.detach()}
    w = value.data.canonical()
    parts = {"qdata": w.qdata, _BYTES: w.block_scale.view(torch.uint8), "global_scale": w.global_scale}
    if w.act_scale is not None:
        parts["act_scale"] = w.act_scale
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _copy(name: str, to: Tensor, parts: dict[str, Tensor]) -> None:
    """Into a parameter, what :func:`_parts` makes of it."""
    if not isinstance(to, NVFP4Weight):
        to.copy_(parts[name])
        return
    changes = {key.removeprefix(f"{name}."): part for key, part in parts.items()}
    changes["block_scale"] = changes.pop(_BYTES).view(torch.float8_e4m3fn)
    new = to.replace(**changes)
    to.copy_(new.tiled(name) if is_tiled(to.qdata) else new)


def _shown(part: Tensor, place: Placed) -> Tensor:
    """A part of a parameter as the state has it."""
    if place.mesh is None:
        return part.reshape(place.split(tuple(part.shape)))
    from .as_dtensors import to_dtensor  # torch.distributed is not built everywhere

    return to_dtensor(part, place)


def _own(value: Any, shape: Sizes, place: Placed) -> Tensor:
    """The inverse of :func:`_shown`."""
    if place.mesh is None:
        return value.reshape(shape)
    from .as_dtensors import from_dtensor

    return from_dtensor(value, shape, place)


def _planned(part: Tensor, place: Placed) -> tuple[torch.dtype, Sizes, Any, Any]:
    """dtype, shape, placements and mesh of what the state has of a part; no placements: it is a plain tensor."""
    shape = tuple(part.shape)
    if place.mesh is None:
        return part.dtype, place.split(shape), None, None
    from .as_dtensors import placement, whole_shape

    return part.dtype, whole_shape(shape, place), (placement(len(shape), place),), place.mesh


def _look(dtype: torch.dtype, shape: Sizes, placements: Any, mesh: Any) -> str:
    plain = f"{dtype} {list(shape)}"
    return f"a plain tensor {plain}" if placements is None else f"a DTensor {plain}, {placements} on {mesh}"


def _check(state: Mapping[str, Any], expected: Mapping[str, str], rest: Mapping[str, Any]) -> None:
    """Raise unless the state has what the model expects, and the rest, each of the same look."""
    for name in (*expected, *rest):
        if name not in state:
            raise ValueError(f"load_sharded_state_dict: the state lacks {name}, which the model has: {_FILL}")
    for name in state:
        if name not in expected and name not in rest:
            raise ValueError(f"load_sharded_state_dict: the state has {name}, which the model lacks: {_FILL}")
    looks = {**expected, **{name: _found(value) for name, value in rest.items() if isinstance(value, Tensor)}}
    for name, look in looks.items():
        found = _found(state[name])
        if found != look:
            raise ValueError(f"load_sharded_state_dict: {name}: expected {look}, found {found}: {_FILL}")


def _found(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return _look(
        value.dtype, tuple(value.shape), getattr(value, "placements", None), getattr(value, "device_mesh", None)
    )
