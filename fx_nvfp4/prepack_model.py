"""``prepack``: a model's packed weights into the layout that tensor cores read, where they lie."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layouts import is_tiled
from .state_dict import keep_state_dicts_canonical
from .tensor import NVFP4Weight
from .tiling import SharedMemoryError, check_tileable, is_out_of_memory, untile_

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
    wants it earlier, or knows of other devices that gain. Calling it again changes nothing. ``model.state_dict()``
    still gives the canonical layout, of which it makes copies then; :func:`fx_nvfp4.save` makes one at a time.

    Returns:
        What was converted, and what was left and why.
    """
    done = tile_all(_packed_tensors(model))
    keep_state_dicts_canonical(model)
    log.info("%s", done)
    return done


def tile_all(weights: Iterable[tuple[str, Tensor]]) -> Prepacking:
    """Put those that are packed into tiles, one after the other.

    The experts of one module stay together in one layout, as one op multiplies them: where that fails, they are as
    before. Where memory runs out they are left, and the next ones tried.
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


def _tile_group(group: Group, done: Prepacking) -> Exception | None:
    """Put all weights of a group into tiles, or none; returns why none."""
    try:
        for name, weight in group.items():
            check_tileable(weight, name)
        _tile_together(group)
    except Exception as error:
        if not isinstance(error, ValueError) and not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        if not isinstance(error, ValueError):
            reason = f"no memory to permute it ({reason}); call fx_nvfp4.prepack(model) once there is"
        done.left.update(dict.fromkeys(group, reason))
        return error.with_traceback(None)
    done.converted += group
    for name in group:
        done.left.pop(name, None)
    return None


def _tile_together(group: Group) -> None:
    """Put all weights of a group into tiles; where one fails, the others are put back."""
    changed = []
    try:
        for name, weight in group.items():
            if not is_tiled(weight.qdata):  # as one is that shares its parts with another
                shapes = weight.qdata.shape, weight.block_scale.shape
                weight.tile_(name)
                changed.append((weight, *shapes))
    except BaseException:
        for weight, codes, scales in changed:
            untile_(weight, codes, scales)
        raise


def _packed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are tied once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
