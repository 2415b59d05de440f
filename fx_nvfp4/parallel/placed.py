"""What a module that holds parts of its parameters keeps of the wholes: where each rank's part lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """Of one parameter; dims are those of [.., N, K] where it is packed, else its own.

    Attributes:
        packed: whether it held packed parts when it was cut.
        mesh: the ranks that share it; None: nobody does, each has all of it.
        dim: which dim is cut; None: the first rank has all of it, and the others hold zeros.
        bounds: where the ranks' parts begin along dim, and where the last one ends.
        halves: the dim whose rows are gate's and then up's. Each half is cut by itself, and bounds count in one.
    """

    packed: bool
    mesh: DeviceMesh | None = None
    dim: int | None = None
    bounds: tuple[int, ...] = ()
    halves: int | None = None

    def split(self, shape: Sizes) -> Sizes:
        """A shape with gate and up apart: rows [.., 2N, ..] as [.., 2, N, ..]."""
        at = self.halves
        return shape if at is None or at >= len(shape) else (*shape[:at], 2, shape[at] // 2, *shape[at + 1 :])
