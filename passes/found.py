"""What is said about a matmul operand: an NVFP4 weight and where its parts lie, or why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

AxisKind = Literal["dim", "affine", "const", "quotient", "remainder", "index", "pair"]


@dataclass(frozen=True)
class Axis:
    """How one dimension of a leaf is addressed by the operand's coordinates.

    "dim": the operand's coordinate `dim`, over the whole of the leaf's dimension.
    "affine": coordinate `dim` * `size` + `value`, a slice of the leaf's dimension.
    "const": always `value`.
    "quotient": coordinate `dim` // `size`.
    "remainder": coordinate `dim` % `size`; if that is not all of the leaf's dimension, times `step`, plus `value`.
    "index": the value of integer `node`, whose dimensions are addressed by `index_axes`; a symbolic number has none.
    "pair": `parts[0]` * `size` + `parts[1]`, two dimensions that the leaf holds flattened.
    """

    kind: AxisKind
    dim: int | None = None
    value: int | None = None
    size: int | None = None
    node: Node | None = None
    index_axes: tuple[Axis, ...] = ()
    step: int | None = None
    parts: tuple[Axis, ...] = ()

    def dims(self) -> frozenset[int]:
        """The operand's dimensions that take part."""
        own = frozenset() if self.dim is None else frozenset((self.dim,))
        return own.union(*(axis.dims() for axis in (*self.index_axes, *self.parts)))


@dataclass(frozen=True)
class PackedWeight:
    """A matmul operand that equals code * block_scale (* or /) global_scale, rounded as `formula` says.

    `qdata_axes` are those of qdata's dimensions except `packed_dim`, the one that holds two codes a byte;
    `scale_axes` those of block_scale's except `scale_dim`. If `scale_layout` is "swizzled", the dimensions from
    `scale_dim` on hold 128 x 4 tiles, and `scale_axes` are those before, then those of the tiles' rows (several: the
    rows of several of qdata's dimensions flattened). `nibbles` tells where in an element of qdata its codes lie, in the
    order of K: 0 is the lowest four bits. Recognition relied on the values of `tables`. Zeros compare without their
    signs. A block_scale of dtype uint8 holds the bytes of float8_e4m3fn. Without a global_scale all is multiplied by
    `factor`, a number written in the program.
    """

    operand: Node
    qdata: Node
    block_scale: Node
    global_scale: Node | None
    k_dim: int
    qdata_axes: tuple[Axis, ...]
    packed_dim: int
    scale_axes: tuple[Axis, ...]
    scale_dim: int
    scale_layout: Literal["linear", "swizzled"]
    global_axes: tuple[Axis, ...]
    nibbles: tuple[int, ...]
    global_op: Literal["multiply", "divide"] | None
    formula: str
    dtype: torch.dtype
    tables: tuple[Node, ...]
    factor: float = 1.0

    @property
    def low_nibble_first(self) -> bool:
        """Whether the codes lie in the order of their bits, as they do in canonical bytes."""
        return self.nibbles == tuple(range(len(self.nibbles)))

    def axis(self, dim: int) -> Axis:
        """How dimension `dim` of qdata, any but `packed_dim`, is addressed."""
        return self.qdata_axes[dim - (dim > self.packed_dim)]


@dataclass(frozen=True)
class Refusal:
    """An operand that is made of packed integers but is not an NVFP4 weight: why, and what would make it one."""

    node: Node
    reason: str
    advice: str


class Refused(Exception):  # noqa: N818 - the way to a `Refusal`, not an error
    """Raised on finding out why an operand is refused; caught where the `Refusal` is made."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


class Almost(Refused):
    """Raised by what is understood but for this one reason, which is a better one than what else was tried gives."""


class UnknownScale(Refused):
    """What scales the codes besides block scales is no leaf as it is; a node computed from several may be."""


class NotPacked(Exception):  # noqa: N818
    """The integers in the cone are read one per element: some other kind of tensor."""
