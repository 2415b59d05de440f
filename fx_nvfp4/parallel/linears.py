"""``shard_linears``: tensor parallelism of linear layers outside the experts, as transformers' ``tp_plan`` says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..format import BLOCK
from ..tensor import PART_OF_K, NVFP4Weight
from . import cut
from .experts import is_marked, mark
from .placed import Placed
from .shard import check_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COLUMNS, ROWS = "colwise", "rowwise"  # of the weight as torch multiplies by it: [K, N]
Model = TypeVar("Model", bound=nn.Module)


def shard_linears(model: Model, mesh: DeviceMesh, plan: Mapping[str, str] | None = None) -> Model:
    """Leave each rank its part of the linear layers that a plan names, packed or dense, in place.

    Layers of style "colwise" keep a part of their outputs (whole attention heads, a part of the intermediate dim),
    those of style "rowwise" the part of K that takes these, in whole blocks of 16, and one all_reduce sums what they
    give. All ranks pass the same tokens. Other styles (norms, heads, experts) are left alone:
    :func:`fx_nvfp4.shard_experts` shards the experts. Call it on every rank, before torch.compile.

    Args:
        model: holds the layers whole.
        mesh: of one dim, e.g. ``init_device_mesh("cuda", (8,))`` or ``mesh["tp"]`` of a larger one.
        plan: path of a layer -> style, with ``*`` for numbers; default ``model.tp_plan``, which transformers' models
            have.

    Returns:
        The same model.

    Raises:
        ValueError: no plan, or it names no linear layer of the model; a part would not be whole, of attention whole
            heads; activation scales of
            K that are taken of all of it; sharded already. Nothing is sharded then.
        TypeError: mesh is none.
    """
    check_mesh("shard_linears", mesh)
    chosen = _chosen(model, getattr(model, "tp_plan", None) if plan is None else plan)
    for path, (layer, style) in chosen.items():
        _check(path, layer, style, mesh.size())
        if style == COLUMNS:
            _check_heads(path, layer, model.get_submodule(path.rpartition(".")[0]), mesh.size())
    for layer, style in chosen.values():
        _shard(layer, style, mesh)
    return model


def _chosen(model: nn.Module, plan: Mapping[str, str] | None) -> dict[str, tuple[nn.Linear, str]]:
    """The linear layers that the plan names, with the style of each."""
    styles = {
        re.compile(re.escape(pattern).replace(r"\*", r"\d+")): style
        for pattern, style in (plan or {}).items()
        if style in (COLUMNS, ROWS)
    }
    found: dict[str, tuple[nn.Linear, str]] = {}
    for path, module in model.named_modules():
        style = next((s for pattern, s in styles.items() if pattern.fullmatch(path)), None)
        if style is not None and isinstance(module, nn.Linear):
            found[path] = module, style
    if not found:
        raise ValueError(
            f"shard_linears: the plan {dict(plan or {})} names no linear layer of the model as {COLUMNS!r} or "
            f'{ROWS!r}: pass plan={{"model.layers.*.self_attn.q_proj": "colwise", ...}}'
        )
    return found


def _check(path: str, layer: nn.Linear, style: str, ranks: int) -> None:
    if is_marked(layer):
        raise ValueError(f"{path}: sharded already; shard the model as it was loaded")
    n, k = layer.weight.shape
    packed = layer.weight.data if isinstance(layer.weight.data, NVFP4Weight) else None
    size, whole = (n, 1) if style == COLUMNS else (k, 1 if packed is None else BLOCK)
    if size % (whole * ranks):
        parts = "rows" if style == COLUMNS else f"blocks of {BLOCK} in K" if packed is not None else "columns"
        raise ValueError(f"{path}: {size // whole} {parts} are no equal parts for {ranks} ranks: use a smaller mesh")
    if style == ROWS and packed is not None and packed.activations == "dynamic":
        raise ValueError(
            f"{path}: its activations have a dynamic scale, the largest of all of K, which no rank would hold: "
            "calibrate for static scales, or leave it out of the plan"
        )


def _check_heads(path: str, layer: nn.Linear, attention: nn.Module, ranks: int) -> None:
    """Of attention, as transformers writes it, each rank needs whole heads, and nothing that is of all heads."""
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int) or not path.endswith(("q_proj", "k_proj", "v_proj")):
        return
    if layer.weight.shape[0] % (size * ranks):
        rows = layer.weight.shape[0]
        raise ValueError(
            f"{path}: {rows} rows are {rows / size:g} heads of {size}, no equal parts for {ranks} ranks: use a smaller "
            "mesh, or a plan without this attention's layers"
        )
    own = [name for name, _ in attention.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{path}: its attention holds {', '.join(own)} for all heads, which shard_linears does not cut: leave its "
            "layers out of the plan"
        )


def _shard(layer: nn.Linear, style: str, mesh: DeviceMesh) -> None:
    from . import shared_tokens  # torch.distributed is not built everywhere

    rank, ranks = mesh.get_local_rank(), mesh.size()
    dim = 0 if style == COLUMNS else 1
    size, packed = layer.weight.shape[dim], isinstance(layer.weight.data, NVFP4Weight)
    mine, bounds = cut.share(size, rank, ranks), cut.bounds(size, ranks)
    parts = {"weight": Placed(packed, mesh, dim, bounds)}
    weight = cut.own(layer.weight.data.narrow(dim, mine.start, len(mine)))
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias.data
        # Of several ranks, whose results are summed, one adds the bias.
        kept = bias[mine.start : mine.stop] if style == COLUMNS else bias if rank == 0 else torch.zeros_like(bias)
        layer.bias = nn.Parameter(cut.own(kept), requires_grad=layer.bias.requires_grad)
        parts["bias"] = Placed(False, mesh, 0, bounds) if style == COLUMNS else Placed(False, mesh)
    layer.out_features, layer.in_features = layer.weight.shape
    mark(layer, parts)
    if style == COLUMNS:
        shared_tokens.enter_whole(layer, mesh)
    else:
        setattr(layer.weight, PART_OF_K, True)
        shared_tokens.leave_whole(layer, mesh)
