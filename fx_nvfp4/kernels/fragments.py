# mypy: allow-untyped-defs
"""Prepacked words to tensor core fragments, as Triton device functions; the layout is fx_nvfp4/prepack.py's.

Three forms give the same bits: inline PTX for sm_90 and up, inline PTX for sm_80, which has no packed bfloat16 multiply
but a fused multiply-add, and plain integer operations for everything else. Results lack a factor of 128.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_PREAMBLE = """
.reg .b32 z, t, s0, s1, zero;
mov.b32 zero, 0x80008000;
prmt.b32 s0, $10, 0, 0x1010;
prmt.b32 s1, $10, 0, 0x3232;
shf.l.wrap.b32 t, $9, $9, 2;
lop3.b32 z, 0x60306030, $8, t, 0xCA;
"""
# As prepack.REGISTERS; registers alternate between the rows g and g + 8, and so between the two scales.
_SOURCES = (("$8", 0), ("$8", 4), ("$8", 10), ("$9", 0), ("$9", 4), ("$9", 10), ("z", 14), ("z", 8))
_MULTIPLY = {
    ("bf16", 90): "mul.rn.bf16x2 {out}, t, {scale};",
    ("bf16", 80): "fma.rn.bf16x2 {out}, t, {scale}, zero;",
    ("fp16", 90): "mul.rn.f16x2 {out}, t, {scale};",
    ("fp16", 80): "mul.rn.f16x2 {out}, t, {scale};",
}
# float16 keeps its exponent three bits higher: bits 8 to 6 times 8, which is once more seven times.
_TO_FP16 = ".reg .b32 u{i};\nand.b32 u{i}, t, 0x01C001C0;\nmad.lo.u32 t, u{i}, 7, t;\n"


def _assembly(dtype: str, arch: int) -> str:
    text = _PREAMBLE
    for i, (word, rotation) in enumerate(_SOURCES):
        text += f"shf.r.wrap.b32 t, {word}, {word}, {rotation};\nand.b32 t, t, 0x81C081C0;\n"
        if dtype == "fp16":
            text += _TO_FP16.format(i=i)
        text += _MULTIPLY[dtype, arch].format(out=f"${i}", scale=f"s{i % 2}") + "\n"
    return "{" + text + "}"


_BF16_SM90, _BF16_SM80 = tl.constexpr(_assembly("bf16", 90)), tl.constexpr(_assembly("bf16", 80))
_FP16 = tl.constexpr(_assembly("fp16", 80))


def decode_form(backend: str, arch: int, interpreted: bool = False) -> str:
    """The form for a target: "sm90", "sm80" or "plain"; the only place that decides.

    Args:
        backend: Triton's name, "cuda" or "hip".
        arch: compute capability times ten.
        interpreted: Triton's interpreter runs the kernels; it has no inline PTX.
    """
    if interpreted or backend != "cuda" or arch < 80:
        return "plain"
    return "sm90" if arch >= 90 else "sm80"


def form_of(tensor: Tensor) -> str:
    """The form for the device of a tensor."""
    if not tensor.is_cuda:
        return "plain"
    return _form_of_device(tensor.device.index or 0)


@cache
def _form_of_device(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return decode_form("hip" if torch.version.hip else "cuda", major * 10 + minor)


@triton.jit
def _rotate_right(word, BY: tl.constexpr):
    return (word >> BY) | (word << (32 - BY))


@triton.jit
def _parted(register, dtype: tl.constexpr):
    """The two values that a 32-bit register holds."""
    low = (register & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (register >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _register(word, factor, dtype: tl.constexpr):
    """Both halves of one register, [..., 2] in dtype."""
    bits = word & 0x81C081C0
    if dtype == tl.float16:
        bits += 7 * (bits & 0x01C001C0)
    low, high = _parted(bits, dtype)
    return tl.join(low * factor, high * factor)


@triton.jit
def _decode_plain(words, scales, dtype: tl.constexpr):
    """The eight registers by integer operations: words uint32 [..., 2], scales uint32 [..., 1] holding two."""
    w0, w1 = tl.split(words)
    both, _ = tl.split(tl.broadcast_to(scales, words.shape))
    f0, f1 = _parted(both, dtype)
    z = (w0 & 0x60306030) | (_rotate_right(w1, 30) & 0x9FCF9FCF)
    return (
        _register(w0, f0, dtype),
        _register(_rotate_right(w0, 4), f1, dtype),
        _register(_rotate_right(w0, 10), f0, dtype),
        _register(w1, f1, dtype),
        _register(_rotate_right(w1, 4), f0, dtype),
        _register(_rotate_right(w1, 10), f1, dtype),
        _register(_rotate_right(z, 14), f0, dtype),
        _register(_rotate_right(z, 8), f1, dtype),
    )


@triton.jit
def _halves(register, dtype: tl.constexpr):
    """A 32-bit register as the pair of values that it holds, [..., 2]; it stays where it is."""
    low, high = _parted(register, dtype)
    return tl.join(low, high)


@triton.jit
def _decode_ptx(words, scales, TEXT: tl.constexpr, dtype: tl.constexpr):
    """The eight registers by inline PTX, arguments as _decode_plain's.

    One element of each operand at a time: that neighbours lie in neighbouring registers, as packing several would need,
    holds in some layouts only.
    """
    w0, w1 = tl.split(words)
    both, _ = tl.split(tl.broadcast_to(scales, words.shape))
    r0, r1, r2, r3, r4, r5, r6, r7 = tl.inline_asm_elementwise(
        TEXT,
        # Marked by &: written before all inputs are read, an output must not share an input's register.
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [w0, w1, both],
        dtype=(tl.uint32,) * 8,
        is_pure=True,
        pack=1,
    )
    return (
        _halves(r0, dtype),
        _halves(r1, dtype),
        _halves(r2, dtype),
        _halves(r3, dtype),
        _halves(r4, dtype),
        _halves(r5, dtype),
        _halves(r6, dtype),
        _halves(r7, dtype),
    )


@triton.jit
def decode_fragments(words, scales, dtype: tl.constexpr, FORM: tl.constexpr, PAIRS: tl.constexpr = True):
    """Tiles of prepacked weights as a left operand.

    Args:
        words: uint32 [R, 128 * C], C chunks of 64 elements of K for R tiles of 16 rows.
        scales: uint16 [R, 32 * C], a lane's two bytes in one.
        dtype: bfloat16 or float16.
        FORM: what decode_form says.
        PAIRS: the order of K that the matrix units see; either keeps registers where they are, for one of two layouts
            of the left operand: lanes hold pairs (wgmma), or four neighbours (mma.sync as Triton lays it out).

    Returns:
        [16 * R, 64 * C] in dtype, code * block scale / 128, exact. K is permuted inside its chunks, as
        prepack.permute_k says with PAIRS, and else only fours of neighbours change places.
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1] // 128
    words = tl.reshape(words, (R, C, 8, 4, 2, 2))
    pair = tl.reshape(scales, (R, C, 8, 4, 1, 1)).to(tl.uint32)
    pair = (pair & 0xFF) | ((pair & 0xFF00) << 8)
    pair = pair * 16 + 0x76807680 if dtype == tl.bfloat16 else pair * 128 + 0x34003400
    if FORM == "plain":
        r0, r1, r2, r3, r4, r5, r6, r7 = _decode_plain(words, pair, dtype)
    else:
        if dtype == tl.float16:
            r0, r1, r2, r3, r4, r5, r6, r7 = _decode_ptx(words, pair, _FP16, tl.float16)
        elif FORM == "sm90":
            r0, r1, r2, r3, r4, r5, r6, r7 = _decode_ptx(words, pair, _BF16_SM90, tl.bfloat16)
        else:
            r0, r1, r2, r3, r4, r5, r6, r7 = _decode_ptx(words, pair, _BF16_SM80, tl.bfloat16)
    first = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    second = tl.join(tl.join(r4, r5), tl.join(r6, r7))
    # [tile, chunk, g, t, j, e, row, half, step] -> [tile, row, g] x [chunk, j, step, half, t, e], or [.., t, half, e]
    if PAIRS:
        fragments = tl.permute(tl.join(first, second), (0, 6, 2, 1, 4, 8, 7, 3, 5))
    else:
        fragments = tl.permute(tl.join(first, second), (0, 6, 2, 1, 4, 8, 3, 7, 5))
    return tl.reshape(fragments, (R * 16, C * 64))


@triton.jit
def decode_tiles_kernel(words_ptr, scales_ptr, out_ptr, R: tl.constexpr, dtype: tl.constexpr, FORM: tl.constexpr):
    """out [16 * R, 64] of R tiles of one chunk each, for tests of the decoding alone."""
    tile = tl.arange(0, R)[:, None]
    words = tl.load(words_ptr + tile * 128 + tl.arange(0, 128)[None, :]).to(tl.uint32, bitcast=True)
    scales = tl.load(scales_ptr + tile * 32 + tl.arange(0, 32)[None, :])
    values = decode_fragments(words, scales, dtype, FORM)
    row = tl.arange(0, 16 * R)[:, None]
    tl.store(out_ptr + row * 64 + tl.arange(0, 64)[None, :], values)
