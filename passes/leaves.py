"""Values of the leaves of a cone: hashes of coordinates that tell formulas apart, and tables as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from .cone import BYTES, Cone
from .sample import Coords, is_supported, is_tensor

_FINITE_E4M3 = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)

# Significands of code * block scale where the code's is 3. With a code that is a power of two all orders agree.
_SIGNIFICANDS = torch.arange(8, 16, dtype=torch.float64) * 3


def mix(index: Tensor, sample: Tensor, salt: int) -> Tensor:
    """Non-negative int64 [S] that mixes coordinates [S, rank] well enough to tell all of their functions apart."""
    x = sample * 0x2545F4914F6CDD1D + (salt * 0x632BE59BD9B4E019) % (1 << 63)
    for column in (*index.unbind(1), sample):
        x = (x ^ column) * 0x1B873593CC9E2D51
        x = x ^ (x >> 32)
    x = x * 0x2545F4914F6CDD1D
    return (x ^ (x >> 29)) & 0x7FFFFFFFFFFFFFFF


def _virtual_floats(bits: Tensor, wide: bool) -> Tensor:
    """Global scales from 2^-12 to 2^12, in float64; where wide, some from 2^-36 to 2^36, past what a clamp may hide.

    Most are chosen such that, times or divided into the right code and block scale, they come within a float32 rounding
    of the middle between two neighbours in bf16 or fp16: only there do orders of multiplication differ visibly.
    """
    kind, bits = bits & 15, bits >> 4
    fraction = torch.where(kind % 2 == 0, 128.0, 1024.0).double()  # bf16 has 8 bits, fp16 11
    middle = fraction + torch.floor((bits & 0xFFFF) / 65536 * fraction) + 0.5
    product = _SIGNIFICANDS[(bits >> 16) % len(_SIGNIFICANDS)]
    significand = torch.where(kind < 7, middle / product, product / middle)
    significand = torch.where(kind < 14, significand, 1 + (bits & 0x7FFFFF) / 8388608)
    exponent = (bits >> 23) % 24 - 12
    if wide:
        exponent = torch.where(kind == 15, exponent * 3, exponent)
    return torch.ldexp(torch.frexp(significand).mantissa, exponent)


def _virtual(dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Hashed bits [S] as values of a dtype: every byte, every finite e4m3, and floats of most sizes."""
    if dtype in BYTES:
        return (bits & 0xFF).to(torch.uint8).view(dtype)
    if dtype == torch.float8_e4m3fn:
        return _FINITE_E4M3[bits % len(_FINITE_E4M3)].view(dtype)
    if dtype == torch.float8_e8m0fnu:
        return (bits % 25 + 115).to(torch.uint8).view(dtype)
    if dtype == torch.float8_e5m2:
        return (bits % 0x7C).to(torch.uint8).view(dtype)
    if dtype == torch.bool:
        return bits % 2 == 0
    if dtype.is_floating_point:
        return _virtual_floats(bits, wide=dtype != torch.float16).to(dtype)
    # Of an int64, the sign bit too: sixteen codes may lie in it.
    return (bits << 1 ^ bits >> 61 if dtype == torch.int64 else bits & 0xFFFFFFFF).to(dtype)


class Leaves:
    """Values of the leaves of a cone: of tables what they hold, of all others a hash of coordinates and sample.

    Each sample is a world of its own, so that a global scale of one element takes as many values as there are samples.
    `cuts` are nodes to be taken for leaves, whatever they are computed from.
    """

    def __init__(
        self,
        cone: Cone,
        constants: Mapping[Node, Tensor],
        promoted: frozenset[Node] = frozenset(),
        cuts: frozenset[Node] = frozenset(),
    ) -> None:
        self.cone, self.constants, self.promoted, self.cuts = cone, constants, promoted, cuts
        self.tables: dict[Node, None] = {}
        self.unknown_tables: dict[Node, None] = {}
        self._salts: dict[Node, int] = {}

    def __call__(self, node: Node, at: Coords) -> Tensor | None:
        if node in self.cone.index_leaves or node in self.cuts or not is_supported(node):
            return self.read(node, at)
        return None

    def read(self, node: Node, at: Coords) -> Tensor:
        """Values [S] of a leaf; keeps note of which leaves act as tables."""
        if at.via & self.cone.packed and node not in self.constants and node not in self.cone.packed:
            self.unknown_tables[node] = None
        if node in self.constants and (node in self.promoted or at.via & self.cone.packed):
            self.tables[node] = None
            table = self.constants[node].detach().cpu()
            return table[tuple(at.index.unbind(1))].expand(len(at.sample))
        return self.hashed(node, at)

    def hashed(self, node: Node, at: Coords) -> Tensor:
        """Values [S] that a leaf which is no table takes; those that choose experts or rows stay within bounds."""
        dtype = node.meta["val"].dtype if is_tensor(node) else torch.int64
        bound = None
        if node in self.cone.index_leaves:
            node, bound = self.cone.index_leaves[node]
        bits = mix(at.index, at.sample, self._salts.setdefault(node, len(self._salts) + 1))
        return (bits % bound).to(dtype) if bound is not None else _virtual(dtype, bits)
