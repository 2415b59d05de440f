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

from typing import Literal

import torch
from torch import Tensor

from .format import check_packed, pack, unpack

# How gate and up rows lie in the canonical weight: not at all, all gate rows before all up rows, or in turn.
Rows = Literal["plain", "stacked", "interleaved"]

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

_CODE_BITS = (6, 7, 8, 15)
_NAN, _ZERO = 18 * 8, 19 * 8


def supports(n: int, k: int) -> bool:
    """Whether weights [n, k] fill whole tiles; the kernels on canonical weights serve the others.

    Padding them instead would cost bytes that every read pays for. A tile of gated rows holds 8 rows of gate and 8 of
    up, so that n is a multiple of 16 for every order of rows.
    """
    return n % TILE_ROWS == 0 and k % TILE_K == 0 and n > 0 and k > 0


def prepack(qdata: Tensor, block_scale: Tensor, rows: Rows = "plain", name: str = "weight") -> tuple[Tensor, Tensor]:
    """Permute packed weights into the order of the fragments.

    Args:
        qdata: uint8 [..., N, K/2].
        block_scale: float8_e4m3fn [..., N, K/16].
        rows: how gate and up rows lie; a tile of gated weights has 8 gate rows and then their 8 up rows.
        name: what errors call the weight.

    Returns:
        (words, scales): int32 [..., N/16, K/64, 32, 4] and uint8 [..., N/16, K/64, 32, 2], by lane.

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
    recoded = _lookup(_RECODED, block_scale.view(torch.uint8))
    if bool((recoded == _REFUSED).any()):
        raise ValueError(
            f"prepack: {name} has a negative block scale; NVFP4 scales are not negative, "
            "flip the signs of the block's codes or leave the weight in the canonical layout"
        )
    codes = _to_tiles(_gated_tiles(unpack(qdata), rows))
    scales = _gated_tiles(recoded, rows).unflatten(-1, (-1, 4)).unflatten(-3, (-1, 2, 8))
    scales = scales.movedim((-5, -2, -3, -1, -4), (-5, -4, -3, -2, -1)).flatten(-3, -2)
    return _shuffle(codes), scales.contiguous()


def unpack_tiles(words: Tensor, scales: Tensor, rows: Rows = "plain") -> tuple[Tensor, Tensor]:
    """Invert :func:`prepack`, bit for bit: (qdata, block_scale) in the canonical layout."""
    canonical = _from_tiles(_unshuffle(words))
    by_row = scales.unflatten(-2, (8, 4)).movedim((-5, -1, -3, -4, -2), (-5, -4, -3, -2, -1))
    by_row = by_row.flatten(-5, -3).flatten(-2)
    raw = _lookup(_CANONICAL, _canonical_rows(by_row, rows))
    return pack(_canonical_rows(canonical, rows)), raw.contiguous().view(torch.float8_e4m3fn)


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


def _gated_tiles(x: Tensor, rows: Rows) -> Tensor:
    """Rows [..., N, C] in the order of the tiles."""
    if rows == "plain":
        return x
    pairs = x.unflatten(-2, (2, -1)) if rows == "stacked" else x.unflatten(-2, (-1, 2)).transpose(-3, -2)
    return pairs.unflatten(-2, (-1, 8)).transpose(-4, -3).flatten(-4, -2)


def _canonical_rows(x: Tensor, rows: Rows) -> Tensor:
    """Invert :func:`_gated_tiles`."""
    if rows == "plain":
        return x
    pairs = x.unflatten(-2, (-1, 2, 8)).transpose(-4, -3).flatten(-3, -2)
    return pairs.flatten(-3, -2) if rows == "stacked" else pairs.transpose(-3, -2).flatten(-3, -2)


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


def _source(register: int, e: int, bit: int) -> tuple[int, int]:
    """(word, bit) that holds a bit of a code: bit 0 to 2 of its magnitude or 3, its sign."""
    word, rotation = REGISTERS[register]
    place = (_CODE_BITS[bit] + 16 * e + rotation) % 32
    if word < 2:
        return word, place
    return (0, place) if LEFTOVER_MASK >> place & 1 else (1, (place - 2) % 32)


def _shuffle(codes: Tensor) -> Tensor:
    """Codes [..., 32, 2, 8, 2] -> int32 words [..., 32, 4]."""
    words = torch.zeros(*codes.shape[:-2], 2, dtype=torch.int32, device=codes.device)
    for register in range(8):
        for e in range(2):
            code = codes[..., register, e].int()
            for bit in range(4):
                word, place = _source(register, e, bit)
                words[..., word] |= (code >> bit & 1) << place
    return words.flatten(-2)


def _unshuffle(words: Tensor) -> Tensor:
    """Invert :func:`_shuffle`, through the decoding that the kernels use."""
    bits = _registers(words)
    halves = torch.stack((bits & 0xFFFF, bits >> 16), -1)
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
