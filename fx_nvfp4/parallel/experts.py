"""Modules of stacked experts whose parameters and forward are known: FusedExperts, and transformers' own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints.skeleton import experts_layout
from ..fused import BIAS, DOWN_NAME, UP_NAMES, FusedExperts
from ..tensor import NVFP4Weight
from .placed import Placed

_SHARDED = "_nvfp4_shard"  # on modules that hold a part of their weights already: name -> Placed


@dataclass(frozen=True)
class Experts:
    """A module with forward(x [T, K], ids [T, A], weights [T, A]) and stacked weights, [E, N, K] or transposed.

    layout: how the up weights' rows hold gate and up, as of :class:`FusedExperts`.
    """

    path: str
    module: nn.Module
    up: tuple[str, ...]
    layout: str
    transposed: bool
    weighted: str

    @property
    def down(self) -> Tensor:
        return self.module.get_parameter(DOWN_NAME)

    @property
    def count(self) -> int:
        return self.down.shape[0]

    @property
    def inner(self) -> int:
        """The intermediate size, which up gives and down takes."""
        return self.down.shape[1 if self.transposed else 2]

    def names(self) -> list[str]:
        """Of all weights and biases that there are."""
        every = [name + end for name in (*self.up, DOWN_NAME) for end in ("", BIAS)]
        return [name for name in every if getattr(self.module, name, None) is not None]

    def is_sharded(self) -> bool:
        return is_sharded(self.module)

    def halves(self, name: str) -> int | None:
        """Of a weight or bias, the dim whose rows are gate's and then up's; packed ones count as [E, N, K]."""
        up = name.removesuffix(BIAS) in self.up
        return self.rows(name) if up and self.layout == "concatenated" else None

    def rows(self, name: str) -> int:
        """The dim of a weight or bias that holds its rows, which the product gives; of packed ones, of [E, N, K]."""
        value = self.module.get_parameter(name).data
        return 2 if self.transposed and value.dim() == 3 and not isinstance(value, NVFP4Weight) else 1

    def mark(self, count: int, whole: bool, parts: Mapping[str, Placed]) -> None:
        """Say that the module holds this many experts now; whole: all of each; parts: where its parameters lie."""
        mark(self.module, parts)
        if hasattr(self.module, "num_experts"):
            self.module.num_experts = count  # type: ignore[assignment]
        if hasattr(self.module, "_apply_gate"):
            # transformers' forwards then skip the id num_experts.
            self.module._is_expert_parallel = whole  # type: ignore[assignment]


def mark(module: nn.Module, parts: Mapping[str, Placed]) -> None:
    """Say that a module holds a part of its weights alone; parts: where those lie, by the names of parameters."""
    setattr(module, _SHARDED, parts)


def is_marked(module: nn.Module) -> bool:
    """Whether :func:`mark` was said of a module."""
    return hasattr(module, _SHARDED)


def marked(module: nn.Module) -> Mapping[str, Placed]:
    """What :func:`mark` was told of a module; nothing where it was not called."""
    return getattr(module, _SHARDED, {})


def is_sharded(model: nn.Module) -> bool:
    """Whether a model holds a part of its weights alone."""
    return any(map(is_marked, model.modules()))


def sharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What FSDP has to leave alone: packed weights, and parameters of which each rank holds a part of its own.

        fully_shard(model, mesh=mesh, ignored_params=fx_nvfp4.sharded_parameters(model))

    The latter are those of modules that :func:`fx_nvfp4.shard_experts`, :func:`fx_nvfp4.shard_linears` or
    :func:`fx_nvfp4.load` with a mesh has sharded, biases of experts among them: FSDP would take the ranks' parts for
    copies of one parameter, and mix them.
    """
    parts = {p for module in model.modules() if is_marked(module) for p in module.parameters(recurse=False)}
    return parts | {p for p in model.parameters() if isinstance(p.data, NVFP4Weight)}


def find_experts(model: nn.Module, packed: Collection[str]) -> list[Experts]:
    """All modules that hold packed experts, in the model's order.

    Args:
        packed: names of the parameters that are packed, or will be.

    Raises:
        ValueError: one of them is of a kind that is not known.
    """
    found = []
    for path, module in model.named_modules():
        stacked = [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
        stacked = [name for name in stacked if f"{path}.{name}".lstrip(".") in packed]
        if stacked:
            found.append(_known(path, module, stacked[0]))
    return found


def _known(path: str, module: nn.Module, packed: str) -> Experts:
    experts = describe(path, module)
    if experts is None:
        raise ValueError(
            f"{path or 'the model'}: {type(module).__name__} holds packed experts ({packed}) and is neither "
            "fx_nvfp4.fused.FusedExperts nor an experts module of transformers whose implementation can be chosen. "
            "Hold the experts in a FusedExperts, or as a list that fx_nvfp4.prepare fuses"
        )
    return experts


def describe(path: str, module: nn.Module) -> Experts | None:
    """What is known of a module; None: nothing. Its weights may have no values yet."""
    if isinstance(module, FusedExperts):
        return Experts(path, module, UP_NAMES[module.layout], module.layout, False, module.weighted)
    # transformers' decorator for experts whose implementation can be chosen leaves this method.
    if not hasattr(module, "_apply_gate") or not isinstance(getattr(module, DOWN_NAME, None), torch.Tensor):
        return None
    stored = experts_layout(module)
    if hasattr(module, "gate_up_proj"):
        layout = "interleaved" if stored.interleaved else "concatenated"
        return Experts(path, module, ("gate_up_proj",), layout, stored.transposed, "output")
    return Experts(path, module, ("up_proj",), "plain", stored.transposed, "output")
