"""Weights in the order in which tensor cores read them, in as many bytes as the canonical layout.

A tile is 16 rows by 64 elements of K. Lane ``4 * g + t`` of a warp (g of 8, t of 4) owns rows g and g + 8 and the
block of 16 elements t of the chunk, so that it needs one block scale a row, and holds 32 codes in one 16-byte load::

    canonical k of the chunk:   16 * t + 4 * step + 2 * half + e
    position the MMA sees:      16 * step + 8 * half + 2 * t + e    (step of 4, half and e of 2)

The other operand has to hold K in the second order (:func:`permute_k`). A lane's words 2j and 2j + 1 hold the 16
codes of steps 2j and 2j + 1: eight registers, each a pair e = 0, 1 in its low and high 16 bits. A register is read as
``rotate_right(word, c) & 0x81C081C0``: the sign lands on bit 15, the three bits of the magnitude on 8 to 6, where
bfloat16 has its lowest exponent bits and its highest mantissa bit. Both halves of a word look alike::

    bit   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0       digits: the register whose bit lies there
    w0     0  z  z  1  1  1  2  0  0  0  z  z  1  2  2  2       rotated by 0, 4 and 10
    w1     3  z  z  4  4  4  5  3  3  3  z  z  4  5  5  5       rotated by 0, 4 and 10
    z      7  7  6  -  -  -  -  -  7' 6' 6  6  -  -  -  7       z = w0 & 0x60306030 | rotate_left(w1, 2) & ~0x60306030

    register 6 is z rotated by 14 (bits 13, 6, 5, 4), register 7 is z rotated by 8 (bits 7, 0, 15, 14); primed bits
    and bits 15 and 0 of z come from w1. Rotations wrap, so that a bit may lie in the other half than it is drawn.

Three translates of the pattern {15, 8, 7, 6} fit into 16 bits and no fourth does; what is left of two words makes two
more. Sixteen codes therefore decode in 7 shifts and 9 logic operations.

A block scale is recoded from e4m3 to a byte ``8 * exponent + mantissa`` with value ``2^(exponent - 9) * (1 + mantissa
/ 8)`` for exponents 0 to 17, which takes subnormals too. Exponent 18 is NaN and 19 is zero. The bits of a bfloat16 or
float16 pair (both halves alike) are one multiply-add of the byte, see :data:`SCALE_MULTIPLIER`; the factor that the
exponents lack is :data:`DECODED_FACTOR` in both dtypes, for whoever scales the sum to multiply with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .format import BLOCK, check_packed, pack, unpack

TILE_ROWS, TILE_K = 16, 64
REGISTER_MASK = 0x81C081C0
LEFTOVER_MASK = 0x60306030
# (word, rotation) of each register, word 2 being z; registers count step of 2, half, row of 2 from the slowest.
REGISTERS = ((0, 0), (0, 4), (0, 10), (1, 0), (1, 4), (1, 10), (2, 14), (2, 8))
# pair of scales = byte * SCALE_MULTIPLIER + SCALE_OFFSET: exponent 0 becomes 2^(119 - 9) or 2^(7 - 9).
SCALE_MULTIPLIER = {torch.bfloat16: 0x00100010, torch.float16: 0x00800080}
SCALE_OFFSET = {torch.bfloat16: (237 << 7) * 0x10001, torch.float16: (13 << 10) * 0x10001}
# A code's bits as a number are code * 2^-126 (bfloat16) or code * 2^-14 (float16), a scale's scale * 2^119 or 2^7.
DECODED_FACTOR = 128.0

_AT_ONCE = 1 << 23  # codes that are permuted at a time
_MINUS_ZERO, _MINUS_NAN = 0x80, 0xFF
_NAN, _ZERO = 18 * 8, 19 * 8


def supports(n: int, k: int) -> bool:
    """Whether weights [n, k] fill whole tiles; the kernels on canonical weights serve the others.

    Padding them instead would cost bytes that every read pays for.
    """
    return n % TILE_ROWS == 0 and k % TILE_K == 0 and n > 0 and k > 0


def prepack(qdata: Tensor, block_scale: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Permute packed weights into the order of the fragments.

    Args:
        qdata: uint8 [..., N, K/2].
        block_scale: float8_e4m3fn [..., N, K/16].
        name: what errors call the weight.

    Returns:
        (words, scales): int32 [..., N/16, K/64, 32, 4] and uint8 [..., N/16, K/64, 32, 2], by lane.

    Raises:
        ValueError: as :func:`check_suited`.
    """
    check_suited(qdata, block_scale, name)
    shapes = tiled_shapes(qdata)
    words = torch.empty(shapes[0], dtype=torch.int32, device=qdata.device)
    scales = torch.empty(shapes[1], dtype=torch.uint8, device=qdata.device)
    write_tiles(qdata, block_scale, words, scales)
    return words, scales


def unpack_tiles(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Invert :func:`prepack`, bit for bit: (qdata, block_scale) in the canonical layout."""
    *lead, tiles, chunks, _, _ = words.shape
    n, k = tiles * TILE_ROWS, chunks * TILE_K
    qdata = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=words.device)
    raw = torch.empty((*lead, n, k // BLOCK), dtype=torch.uint8, device=words.device)
    write_canonical(words, scales, qdata, raw)
    return qdata, raw.view(torch.float8_e4m3fn)


def tiled_shapes(qdata: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the words and scales that codes [..., N, K/2] become."""
    *lead, n, half = qdata.shape
    tiles = (*lead, n // TILE_ROWS, 2 * half // TILE_K, 32)
    return (*tiles, 4), (*tiles, 2)


def check_suited(qdata: Tensor, block_scale: Tensor, name: str = "weight") -> None:
    """Refuse what :func:`prepack` cannot permute.

    Raises:
        ValueError: the weight does not fill whole tiles, or has a negative block scale, which no scheme writes.
    """
    check_packed(qdata, block_scale)
    n, k = qdata.shape[-2], 2 * qdata.shape[-1]
    if not supports(n, k):
        raise ValueError(
            f"prepack: {name} is [{n}, {k}], expected multiples of {TILE_ROWS} rows and {TILE_K} columns; "
            "leave it in the canonical layout"
        )
    raw = block_scale.view(torch.uint8)
    if bool(((raw > _MINUS_ZERO) & (raw < _MINUS_NAN)).any()):
        raise ValueError(
            f"prepack: {name} has a negative block scale; NVFP4 scales are not negative, "
            "flip the signs of the block's codes or leave the weight in the canonical layout"
        )


class Rewriting:
    """A weight whose tiles are written over it, and how far that is, so that it can be put back at any point of it."""

    def __init__(self, qdata: Tensor, block_scale: Tensor, words: Tensor, scales: Tensor) -> None:
        raw = block_scale.view(torch.uint8)
        self.k = 2 * qdata.shape[-1]
        self.by_rows = [t.reshape(-1, TILE_ROWS, t.shape[-1]) for t in (qdata, raw)]
        self.by_rows += [t.view(-1, *t.shape[-3:]) for t in (words, scales)]
        # Rows of tiles that are written, and what is being written, as it was: one name, which changes at once.
        self.state: tuple[int, list[tuple[Tensor, Tensor]]] = 0, []

    def write(self) -> None:
        for codes, scale, words, scales in _groups(self.by_rows, self.k):
            # Both before either is written, so that what takes memory fails before a row has changed.
            tiled = _shuffle(_to_tiles(unpack(codes.flatten(0, 1))))
            recoded = _scales_by_lane(_lookup(_RECODED, scale.flatten(0, 1)))
            self.state = self.state[0], [(t, t.clone()) for t in (codes, scale)]
            words.copy_(tiled)
            scales.copy_(recoded)
            self.state = self.state[0] + len(codes), []

    def put_back(self) -> None:
        done, begun = self.state
        for place, before in begun:
            place.copy_(before)
        codes, scale, words, scales = (t[:done] for t in self.by_rows)
        write_canonical(words, scales, codes, scale, at_once=1)


def write_tiles(qdata: Tensor, block_scale: Tensor, words: Tensor, scales: Tensor) -> None:
    """Fill contiguous words and scales from a weight that :func:`check_suited` has seen.

    They may be the memory of contiguous codes and block scales, see :class:`Rewriting`: the 16 rows of a tile are as
    many bytes in the same place either way, and rows are read before they are written, some at a time.
    """
    Rewriting(qdata, block_scale, words, scales).write()


def write_canonical(words: Tensor, scales: Tensor, qdata: Tensor, raw: Tensor, at_once: int | None = None) -> None:
    """The inverse of :func:`write_tiles`: fill contiguous codes and the bytes of block scales, or the same memory.

    at_once bounds the codes that are permuted at a time, and so the memory that it takes.
    """
    by_rows = [words.reshape(-1, *words.shape[-3:]), scales.reshape(-1, *scales.shape[-3:])]
    by_rows += [t.view(-1, TILE_ROWS, t.shape[-1]) for t in (qdata, raw)]
    for some_words, some_scales, codes, scale in _groups(by_rows, 2 * qdata.shape[-1], at_once):
        packed = pack(_from_tiles(_unshuffle(some_words)))
        original = _lookup(_CANONICAL, _scales_by_row(some_scales))
        codes.copy_(packed.view(codes.shape))
        scale.copy_(original.view(scale.shape))


def _groups(tensors: list[Tensor], k: int, at_once: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [rows of tiles, ..] some rows at a time, as permuting takes a multiple of their memory."""
    step = max(1, (at_once or _AT_ONCE) // (TILE_ROWS * k))
    for first in range(0, len(tensors[0]), step):
        yield tuple(t[first : first + step] for t in tensors)


def _scales_by_lane(scales: Tensor) -> Tensor:
    """[N, K/16] -> [N/16, K/64, 32, 2]."""
    split = scales.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 2, 8))  # tile r g chunk t
    return split.movedim((-5, -2, -3, -1, -4), (-5, -4, -3, -2, -1)).flatten(-3, -2)


def _scales_by_row(scales: Tensor) -> Tensor:
    """Invert :func:`_scales_by_lane`."""
    split = scales.unflatten(-2, (8, 4)).movedim((-5, -1, -3, -4, -2), (-5, -4, -3, -2, -1))
    return split.flatten(-5, -3).flatten(-2)


def permute_k(x: Tensor) -> Tensor:
    """Reorder the last dim, a multiple of 64, from canonical order to that of the prepacked weights."""
    return x.unflatten(-1, (-1, 4, 4, 2, 2)).movedim(-4, -2).flatten(-5)


def decode_tiles(words: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernels compute from prepacked weights, by the same operations: the twin of their decoding.

    Returns:
        [..., N, K] in dtype (bfloat16 or float16), rows as in the tiles, K as :func:`permute_k` orders it: code *
        block scale / DECODED_FACTOR, exact.
    """
    registers = _registers(words)
    if dtype == torch.float16:
        registers = registers + 7 * (registers & 0x01C001C0)
    pairs = _halves(registers, dtype)
    factor = _halves(scales.long() * SCALE_MULTIPLIER[dtype] + SCALE_OFFSET[dtype], dtype)[..., 0]
    # [..., tiles, chunks, g, t, j, step, half, r, e] times [..., tiles, chunks, g, t, 1, 1, 1, r, 1]
    pairs = pairs.unflatten(-2, (2, 2, 2)).unflatten(-6, (8, 4))
    products = pairs * factor.unflatten(-2, (8, 4))[..., None, None, None, :, None]
    return _by_row(products)


def _to_tiles(codes: Tensor) -> Tensor:
    """Codes [..., N, K] -> [..., N/16, K/64, 32 lanes, j, 8 registers, e]."""
    split = codes.unflatten(-1, (-1, 4, 2, 2, 2, 2)).unflatten(-7, (-1, 2, 8))  # tile r g chunk t j step half e
    order = (-9, -6, -7, -5, -4, -3, -2, -8, -1)  # tile chunk g t j step half r e
    return split.movedim(order, tuple(range(-9, 0))).flatten(-4, -2).flatten(-5, -4)


def _from_tiles(codes: Tensor) -> Tensor:
    """Invert :func:`_to_tiles`."""
    split = codes.unflatten(-2, (2, 2, 2)).unflatten(-6, (8, 4))  # tile chunk g t j step half r e
    order = (-9, -2, -7, -8, -6, -5, -4, -3, -1)  # tile r g chunk t j step half e
    return split.movedim(order, tuple(range(-9, 0))).flatten(-6).flatten(-4, -2)


def _by_row(values: Tensor) -> Tensor:
    """[tile, chunk, g, t, j, step, half, r, e] -> [N, K] with K in the order the MMA sees."""
    order = (-9, -2, -7, -8, -5, -4, -3, -6, -1)  # tile r g chunk j step half t e
    return values.movedim(order, tuple(range(-9, 0))).flatten(-6).flatten(-4, -2)


def _shuffle(codes: Tensor) -> Tensor:
    """Codes [..., 32, 2, 8, 2] -> int32 words [..., 32, 4]."""
    halves = (codes & 7).int() << 6 | (codes & 8).int() << 12
    parts = torch.zeros((3, *codes.shape[:-2]), dtype=torch.int64, device=codes.device)  # w0, w1, z
    for register, (word, rotation) in enumerate(REGISTERS):
        low, high = halves[..., register, :].long().unbind(-1)
        parts[word] |= _rotate_right(low | high << 16, 32 - rotation)
    w0, w1, z = parts
    pair = torch.stack((w0 | z & LEFTOVER_MASK, w1 | _rotate_right(z & ~LEFTOVER_MASK, 2)), -1)
    return pair.to(torch.int32).flatten(-2)


def _unshuffle(words: Tensor) -> Tensor:
    """Invert :func:`_shuffle`, through the decoding that the kernels use."""
    bits = _registers(words)
    halves = torch.stack((bits.to(torch.int16), (bits >> 16).to(torch.int16)), -1)
    return (halves >> 6 & 7 | halves >> 12 & 8).to(torch.uint8)


def _registers(words: Tensor) -> Tensor:
    """int32 words [..., 4] -> the 8 masked registers of each two, int64 [..., 2, 8], from 0 to 2^32 - 1."""
    pair = words.long().bitwise_and(0xFFFFFFFF).unflatten(-1, (2, 2))
    w0, w1 = pair.unbind(-1)
    z = w0 & LEFTOVER_MASK | _rotate_right(w1, 30) & ~LEFTOVER_MASK
    sources = (w0, w1, z)
    return torch.stack([_rotate_right(sources[w], c) & REGISTER_MASK for w, c in REGISTERS], -1)


def _rotate_right(word: Tensor, by: int) -> Tensor:
    return (word >> by | word << (32 - by)) & 0xFFFFFFFF


def _halves(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs of 16 bits in an integer -> [..., 2] in dtype, the low half first."""
    return torch.stack((bits & 0xFFFF, bits >> 16), -1).to(torch.uint16).view(dtype)


def _recode(byte: int) -> int:
    """The byte that stands for an e4m3 byte, or _REFUSED."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return _NAN + 7 - sign
    if byte & 0x7F == 0:
        return _ZERO + sign
    if sign:
        return _REFUSED
    if exponent:
        return byte + 16
    shift = 3 - mantissa.bit_length() + 1
    return (3 - shift) * 8 + (mantissa << shift & 7)


_REFUSED = 255
_RECODED = tuple(_recode(byte) for byte in range(256))
_BYTE_OF = {recoded: byte for byte, recoded in enumerate(_RECODED) if recoded != _REFUSED}
_CANONICAL = tuple(_BYTE_OF.get(recoded, 0) for recoded in range(256))


def _lookup(table: tuple[int, ...], index: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.uint8, device=index.device)[index.long()]
