"""``prepack``: a model's packed weights into the layout that tensor cores read, where they lie."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layouts import is_tiled
from .tensor import NVFP4Weight
from .tiling import SharedMemoryError, check_tileable

log = logging.getLogger("fx_nvfp4")

Group = dict[str, NVFP4Weight]  # by name


@dataclass
class Prepacking:
    """What :func:`prepack` did; prints as text.

    Attributes:
        converted: names of the weights that it put into tiles.
        left: name -> why that weight stays in the canonical layout, which everything serves too.
    """

    converted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"prepack: {len(self.converted)} packed weights put into tiles, {len(self.left)} left as they are"]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in self.left.items())])


def prepack(model: nn.Module) -> Prepacking:
    """Put every packed weight of a model into tiles, in place, see :meth:`fx_nvfp4.NVFP4Weight.tile_`.

    A model on a GPU gets there by itself, by :func:`fx_nvfp4.load` or when it is compiled first; this is for whoever
    wants it earlier, or knows of other devices that gain. Calling it again changes nothing.

    Returns:
        What was converted, and what was left and why.
    """
    done = tile_all(_packed_tensors(model))
    log.info("%s", done)
    return done


def tile_all(weights: Iterable[tuple[str, Tensor]]) -> Prepacking:
    """Put those that are packed into tiles, one after the other.

    The experts of one module stay together in one layout, as one op multiplies them.
    """
    groups: dict[tuple[str, str], Group] = {}
    for name, weight in weights:
        if isinstance(weight, NVFP4Weight) and not is_tiled(weight.qdata):
            module, _, own = name.rpartition(".")
            groups.setdefault((module, "" if weight.stored else own), {})[name] = weight
    done = Prepacking()
    shared = [group for group in groups.values() if isinstance(_tile_group(group, done), SharedMemoryError)]
    if shared:
        gc.collect()  # what a module that was replaced still holds is nobody's
        for group in shared:
            _tile_group(group, done)
    return done


def _tile_group(group: Group, done: Prepacking) -> ValueError | None:
    """Put all weights of a group into tiles, or none; returns why none."""
    for name, weight in group.items():
        try:
            check_tileable(weight, name)
        except ValueError as error:
            done.left.update(dict.fromkeys(group, str(error)))
            return error.with_traceback(None)
    for name, weight in group.items():
        weight.tile_(name)
        done.converted.append(name)
        done.left.pop(name, None)
    return None


def _packed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are tied once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
