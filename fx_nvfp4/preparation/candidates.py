"""Finds lists of packed experts in a model, and what forbids to fuse one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..tensor import NVFP4Weight
from .forwards import original_class
from .record import Unsuited

_CODES = (torch.uint8, torch.int8, torch.int32, torch.float4_e2m1fn_x2)
_WEIGHTS = (2, 3)  # packed weights of one expert: up and down, or gate, up and down
_MORE_BYTES = 3  # and scales that are stored as bytes beside them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class ExpertList:
    """A list of packed experts: its path in the model, its entries, and the dtype of what enters them."""

    path: str
    container: nn.Module
    experts: list[nn.Module]
    dtype: torch.dtype = torch.float32


def find_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of every ModuleList or ModuleDict of two or more modules that look like packed experts."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _looks_packed(module)
    ]


def _looks_packed(container: nn.Module) -> bool:
    """Whether entries hold the packed weights of one MLP, and are no decoder layers, which hold norms."""
    entries = [m for m in container._modules.values() if m is not None]
    if len(container._modules) < 2 or not entries:
        return False
    codes = [_get(entries[0], name) for name in _packed(entries[0])]
    most = _WEIGHTS[1] if any(isinstance(t, NVFP4Weight) for t in codes) else _WEIGHTS[1] + _MORE_BYTES
    norms = any("norm" in type(m).__name__.lower() for m in entries[0].modules())
    return not norms and _WEIGHTS[0] <= len(codes) <= most and all(t.dim() == 2 for t in codes)


def _packed(module: nn.Module) -> list[str]:
    """Names of a module's tensors that hold codes."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [n for n, t in tensors if isinstance(t, NVFP4Weight) or (t.dtype in _CODES and t.dim() > 1)]


def count_owners(model: nn.Module) -> Counter[int]:
    """How many parameters and buffers use each memory."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return Counter(_storage(tensor) for _, tensor in tensors)


def check_list(path: str, container: nn.Module, owners: Counter[int]) -> ExpertList:
    """The list, if its experts can be stacked.

    Raises:
        Unsuited: they differ, or something else holds on to them.
    """
    missing = [name for name, m in container._modules.items() if m is None]
    if missing:
        raise Unsuited(
            f"experts {_some(missing)} are missing (another rank of an expert-parallel group holds them)",
            "load all experts of a layer on one rank",
        )
    experts = [m for m in container._modules.values() if m is not None]
    for name, expert in zip(container._modules, experts, strict=True):
        _check_expert(name, expert)
    _check_alike(container, experts)
    _check_owned(experts, owners)
    return ExpertList(path, container, experts)


def _check_expert(name: str, expert: nn.Module) -> None:
    for part, module in expert.named_modules():
        where = f"expert {name}" + (f".{part}" if part else "")
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            raise Unsuited(f"{where} has hooks, which would not run any more", "remove them, or prepare() first")
        if "forward" in vars(module):
            raise Unsuited(f"{where} has a forward of its own, which its class does not know", "prepare() first")
        if is_parametrized(module):
            raise Unsuited(f"{where} has parametrizations", "remove them, or prepare() first")
    meta = [n for n, t in expert.named_parameters() if t.is_meta]
    if meta:
        raise Unsuited(f"expert {name} has no values yet (meta device)", "load the weights, then prepare()")
    dense = [n for n, p in expert.named_parameters() if p.dim() > 1 and not _is_packed_parameter(p)]
    if dense:
        raise Unsuited(
            f"expert {name} holds dense weights beside packed ones: {_some(dense)}",
            "merge or remove adapters, or keep the list as it is",
        )


def _is_packed_parameter(p: Tensor) -> bool:
    return isinstance(p, NVFP4Weight) or not p.is_floating_point() or p.dtype.itemsize == 1


def _check_alike(container: nn.Module, experts: list[nn.Module]) -> None:
    first = structure(experts[0])
    for name, expert in zip(container._modules, experts, strict=True):
        other = structure(expert)
        if other != first:
            pairs = (
                f"{a[0]} is {a[1]} there, {b[0]} is {b[1]} here" for a, b in zip(first, other, strict=False) if a != b
            )
            differing = next(pairs, "it has other parts")
            raise Unsuited(f"expert {name} differs from the first: {differing}", "experts must be alike to be stacked")


def _check_owned(experts: list[nn.Module], owners: Counter[int]) -> None:
    """No tensor with codes, and none that learns, may be used in a second place."""
    for e, expert in enumerate(experts):
        learning = [n for n, p in expert.named_parameters() if p.requires_grad]
        shared = [n for n in dict.fromkeys([*_packed(expert), *learning]) if owners[_storage(_get(expert, n))] > 1]
        if shared:
            raise Unsuited(f"expert {e} shares {_some(shared)} with another module", "untie the weights")


def _storage(tensor: Tensor) -> int:
    return (tensor.qdata if isinstance(tensor, NVFP4Weight) else tensor).untyped_storage().data_ptr()


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def structure(module: nn.Module) -> tuple[Any, ...]:
    """What two modules have in common that compute alike with tensors of their own."""
    parts: list[Any] = []
    for path, part in module.named_modules():
        parts += [(path, type(part)), (f"{path} training", part.training)]
        parts += [(f"{path}.{name}".strip("."), value) for name, value in _settings(part)]
        parts += [(f"{path}.{n}", _layout(t)) for n, t in (*part._parameters.items(), *part._buffers.items())]
    return tuple(parts)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Python attributes that can change what a module computes; objects count by identity."""
    own = nn.Module().__dict__
    attributes = {k: v for k, v in module.__dict__.items() if k not in own}
    return tuple((k, v if _is_plain(v) else id(v)) for k, v in sorted(attributes.items()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size))


def _layout(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if isinstance(tensor, NVFP4Weight):
        return tensor._stable_hash_for_caching()
    return type(tensor), tensor.dtype, tuple(tensor.shape), tensor.device, tensor.requires_grad


def find_parents(model: nn.Module, path: str) -> Iterator[str]:
    """Paths of modules that may call the list's experts and take hidden states alone: its owner, then those around."""
    levels = path.split(".")[:-1]
    for length in range(len(levels), max(len(levels) - 3, -1), -1):
        parent = ".".join(levels[:length])
        module = model.get_submodule(parent)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
            continue
        if _takes_one(module):
            yield parent


def _takes_one(module: nn.Module) -> bool:
    parameters = list(inspect.signature(original_class(type(module)).forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return bool(positional) and len(required) <= 1


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
