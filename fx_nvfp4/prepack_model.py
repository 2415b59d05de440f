"""``prepack``: a model's packed weights into the layout that tensor cores read, where they lie."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layouts import is_tiled
from .tensor import NVFP4Weight
from .tiling import SharedMemoryError

log = logging.getLogger("fx_nvfp4")


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
    """Put those that are packed into tiles, one after the other."""
    done = Prepacking()
    shared = list(_tile_each(weights, done))
    if shared:
        gc.collect()  # what a module that was replaced still holds is nobody's
        done.left.update((name, str(error)) for name, _, error in _tile_each([s[:2] for s in shared], done))
    return done


def _tile_each(
    weights: Iterable[tuple[str, Tensor]], done: Prepacking
) -> Iterator[tuple[str, Tensor, SharedMemoryError]]:
    """Those whose memory others see, and why; what became of all others is noted."""
    for name, weight in weights:
        if not isinstance(weight, NVFP4Weight) or is_tiled(weight.qdata):
            continue
        try:
            weight.tile_(name)
            done.converted.append(name)
        except SharedMemoryError as error:
            yield name, weight, error.with_traceback(None)
        except ValueError as error:
            done.left[name] = str(error)


def _packed_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are tied once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
