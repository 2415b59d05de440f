"""Ways to run one checkpoint: packed, as 16-bit weights, and dequantised anew in the graph by whatever compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..format import BLOCK, E2M1_VALUES
from ..parameters import replace_parameters
from ..tensor import NVFP4Weight


@dataclass(frozen=True)
class Way:
    """How the loaded model is changed, in place, and which backend compiles it with which options.

    prepack: as for :func:`fx_nvfp4.load`; the other ways want weights in the canonical layout.
    grouped: experts by grouped_mm in every step, where transformers' generate() on a GPU takes copies of the chosen
        experts' weights for a batched product.
    """

    name: str
    convert: Callable[[nn.Module], None]
    backend: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()
    prepack: bool | None = False
    grouped: bool = False


def experts_of(way: Way, model: Any) -> AbstractContextManager[None]:
    """Inside the block generate() leaves the model's experts with grouped_mm, if the way is so."""
    return _grouped(model) if way.grouped else nullcontext()


@contextmanager
def _grouped(model: Any) -> Iterator[None]:
    model._optimize_model_for_decode = nullcontext  # where transformers switches
    try:
        yield
    finally:
        del model._optimize_model_for_decode


def keep(model: nn.Module) -> None:
    """As it was loaded."""


def make_dense(model: nn.Module) -> None:
    """16-bit parameters in place of packed ones, one at a time."""
    replace_parameters(model, _dense)


def _dense(_: str, weight: Tensor) -> Tensor | None:
    return weight.dequantize() if isinstance(weight, NVFP4Weight) else None


def spell_dequantisation(model: nn.Module) -> None:
    """Packed buffers in place of packed parameters, from which each use of a weight computes it.

    Activations stay as they are, also where the checkpoint rounds them: this is how W4A16 is emulated in plain PyTorch.
    """
    for module in list(model.modules()):
        packed = {name: w for name, p in module._parameters.items() if (w := _packed(p)) is not None}
        if packed:
            module.__class__ = _spelling(cast(Any, type(module)), tuple(packed))
        for name, weight in packed.items():
            del module._parameters[name]
            for part in ("qdata", "block_scale", "global_scale"):
                module.register_buffer(f"{name}_{part}", getattr(weight, part))
            module.register_buffer(f"{name}_table", torch.tensor(E2M1_VALUES, device=weight.device))
            setattr(module, f"{name}_layout", (weight.transposed, weight.orig_dtype))


@functools.cache  # one class for all modules of a kind: layers that are alike stay so, and compile once
def _spelling(kind: Any, names: tuple[str, ...]) -> Any:
    return type(kind.__name__, (kind,), {name: property(functools.partial(_dequantise, name=name)) for name in names})


def _packed(parameter: nn.Parameter | None) -> NVFP4Weight | None:
    weight = None if parameter is None else parameter.data
    return weight if isinstance(weight, NVFP4Weight) else None


def _dequantise(module: Any, name: str) -> Tensor:
    qdata, block_scale, global_scale, table = (
        getattr(module, f"{name}_{part}") for part in ("qdata", "block_scale", "global_scale", "table")
    )
    transposed, dtype = getattr(module, f"{name}_layout")
    codes = torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(-2)
    scale = block_scale.float() * global_scale.unsqueeze(-1)
    weight = (table[codes.int()].unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)
    return weight.mT if transposed else weight


WAYS = {
    way.name: way
    for way in (
        Way("packed", keep, "nvfp4_emu", (("strict", True),), prepack=None),
        Way("16-bit", make_dense, grouped=True),
        Way("16-bit-bmm", make_dense),
        Way("in-graph", spell_dequantisation, grouped=True),
    )
}
