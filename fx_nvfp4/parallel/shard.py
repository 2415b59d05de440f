"""``shard_experts``: each rank keeps its part of the packed experts, and the model computes what it did."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ..format import BLOCK
from ..fused import BIAS, DOWN_NAME
from ..tensor import PART_OF_K, NVFP4Weight
from . import cut
from .experts import Experts, find_experts
from .placed import Placed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMS = ("expert", "intermediate")
TOKENS = ("shared", "own")
Model = TypeVar("Model", bound=nn.Module)


def shard_experts(model: Model, mesh: DeviceMesh, dim: str = "expert", tokens: str = "shared") -> Model:
    """Leave each rank its part of all packed experts, in place; the rest of the model is as it was.

    Call it on every rank, with the same model, before torch.compile. Names of parameters stay; their shapes are those
    of the part. Everything else (attention, router, norms) is not touched: replicate it, or shard it as you would a
    dense model. FSDP2 may wrap the rest, with :func:`fx_nvfp4.sharded_parameters` as its ``ignored_params``. Static
    activation scales have to be there already: :func:`fx_nvfp4.calibrate` first.

    Args:
        model: its experts are :class:`fx_nvfp4.fused.FusedExperts` (what :func:`fx_nvfp4.prepare` makes of lists), or
            experts modules of transformers.
        mesh: of one dim, e.g. ``init_device_mesh("cuda", (8,))`` or ``mesh["ep"]`` of a larger one.
        dim: "expert", whole experts to each rank, as evenly as they come; "intermediate", of every expert the same
            part of the dim between its products, gate and up together, cut between blocks of 16.
        tokens: "shared", all ranks pass the same tokens, as under tensor parallelism: results are summed by one
            all_reduce. "own" (with "expert"), each passes its own, any number, also none, as under data parallelism:
            rows travel by all_to_all. All ranks of the mesh must call the module equally often.

    Returns:
        The same model.

    Raises:
        ValueError: experts of an unknown kind, sharded already, or too few for the ranks; activation scales of the
            intermediate dim that are taken of all of it; an unknown name. Nothing is sharded then.
        TypeError: mesh is none.
    """
    _check_arguments(mesh, dim, tokens)
    found = find_experts(model, {n for n, p in model.named_parameters() if isinstance(p, NVFP4Weight)})
    if not found:
        raise ValueError(
            "shard_experts: the model holds no packed experts in 3-D: load or quantise it first; where it holds lists "
            "of packed experts, fx_nvfp4.prepare(model) makes them such"
        )
    for experts in found:
        _check(experts, mesh.size(), dim)
    for experts in found:
        _shard(experts, mesh, dim, tokens)
    return model


class Shards:
    """The ranks' shares of a model that is yet to be read: all modules of experts that will hold packed weights.

    Attributes:
        kept: which experts this rank keeps, by the names of their modules.

    Raises:
        ValueError: as :func:`shard_experts`.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, tokens: str, packed: Collection[str]) -> None:
        _check_arguments(mesh, "expert", tokens)
        self._mesh, self._tokens = mesh, tokens
        self._experts = find_experts(model, packed)
        for experts in self._experts:
            _check(experts, mesh.size(), "expert")
        self._counts = [experts.count for experts in self._experts]
        shares = [cut.share(count, mesh.get_local_rank(), mesh.size()) for count in self._counts]
        self.kept = {experts.path: mine for experts, mine in zip(self._experts, shares, strict=True)}

    def install(self) -> None:
        """Once the model holds those experts, make it compute with those of all ranks."""
        for experts, count in zip(self._experts, self._counts, strict=True):
            _install(experts, self._mesh, "expert", self._tokens, count)


def _install(experts: Experts, mesh: DeviceMesh, dim: str, tokens: str, count: int) -> None:
    """Make a module that holds its rank's part return what the whole would.

    Args:
        count: experts, or blocks of the intermediate dim, of all ranks.
    """
    from . import own_tokens, shared_tokens  # torch.distributed is not built everywhere

    rank, ranks = mesh.get_local_rank(), mesh.size()
    mine = cut.share(count, rank, ranks) if dim == "expert" else None
    parts = {name: _placed(experts, name, mesh, dim, count) for name in experts.names()}
    experts.mark(experts.count, whole=mine is not None, parts=parts)
    if tokens == "own":
        own_tokens.install(experts.module, mesh.get_group(), count, experts.weighted)
    else:
        shared_tokens.install(experts.module, mesh, mine)


def _placed(experts: Experts, name: str, mesh: DeviceMesh, dim: str, count: int) -> Placed:
    """Where the ranks' parts of a weight or bias lie."""
    packed = isinstance(experts.module.get_parameter(name).data, NVFP4Weight)
    halves, rows = experts.halves(name), experts.rows(name)
    if dim == "expert":
        return Placed(packed, mesh, 0, cut.bounds(count, mesh.size()), halves)
    if name == DOWN_NAME + BIAS:
        return Placed(packed, mesh)
    if name == DOWN_NAME:
        return Placed(packed, mesh, 3 - rows, cut.bounds(count, mesh.size(), BLOCK))
    each = 2 * BLOCK if experts.layout == "interleaved" else BLOCK
    return Placed(packed, mesh, rows, cut.bounds(count, mesh.size(), each), halves)


def _shard(experts: Experts, mesh: DeviceMesh, dim: str, tokens: str) -> None:
    rank, ranks, count = mesh.get_local_rank(), mesh.size(), _count(experts, dim)
    mine = cut.share(count, rank, ranks) if dim == "expert" else cut.blocks_of(experts, rank, ranks)
    parts = {}
    for name in experts.names():
        if dim == "expert":
            parts[name] = cut.by_expert(experts, name, mine)
        else:
            parts[name] = cut.by_intermediate(experts, name, mine, first=rank == 0)
    for name, part in parts.items():
        frozen = not experts.module.get_parameter(name).requires_grad
        experts.module.register_parameter(name, nn.Parameter(part, requires_grad=not frozen))
    if dim == "intermediate":
        setattr(experts.down, PART_OF_K, True)
    _install(experts, mesh, dim, tokens, count)


def check_mesh(caller: str, mesh: DeviceMesh) -> None:
    """Raise unless mesh is one of one dim."""
    if not hasattr(mesh, "ndim"):
        raise TypeError(
            f"{caller}: mesh must be a DeviceMesh, got {mesh!r}: torch.distributed.init_device_mesh makes one"
        )
    if mesh.ndim != 1:
        raise ValueError(f"{caller}: mesh must have one dim, got {mesh.ndim}; choose one by its name, mesh['ep']")


def _check_arguments(mesh: DeviceMesh, dim: str, tokens: str) -> None:
    for name, value, allowed in (("dim", dim, DIMS), ("tokens", tokens, TOKENS)):
        if value not in allowed:
            raise ValueError(f"shard_experts: {name} must be one of {allowed}, got {value!r}")
    check_mesh("shard_experts", mesh)
    if tokens == "own" and dim != "expert":
        raise ValueError('shard_experts: tokens="own" needs dim="expert": a part of every expert needs every token')


def _check(experts: Experts, ranks: int, dim: str) -> None:
    where = experts.path or "the model"
    if experts.is_sharded():
        raise ValueError(f"{where}: its experts are sharded already; shard the model as it was loaded")
    check_count(where, _count(experts, dim), ranks, dim)
    down = experts.down.data
    if dim == "intermediate" and isinstance(down, NVFP4Weight) and down.activations == "dynamic":
        raise ValueError(
            f"{where}: the activations of down_proj have a dynamic scale, the largest of all of the intermediate dim, "
            'which no rank would hold: calibrate for static scales, or shard by dim="expert"'
        )


def _count(experts: Experts, dim: str) -> int:
    """How many things the ranks share."""
    return experts.count if dim == "expert" else experts.inner // BLOCK


def check_count(where: str, count: int, ranks: int, dim: str) -> None:
    """Raise ValueError where a rank would have nothing."""
    if count < ranks:
        things = "experts" if dim == "expert" else f"blocks of {BLOCK} in the intermediate dim"
        raise ValueError(f"{where}: {count} {things} are too few for {ranks} ranks: use a smaller mesh")
