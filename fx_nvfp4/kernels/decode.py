# mypy: allow-untyped-defs
"""Conversions between NVFP4 bytes and floating point, as Triton device functions.

Integer arithmetic throughout: Triton's own fp8 type does not compile on sm_80 and sm_86, and its conversions differ
between GPU generations, while these give the same bits everywhere.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3_to_fp16(byte):
    """float8_e4m3fn bytes (uint8) -> float16, exact; 0x7f and 0xff are NaN.

    The bits are shifted to where float16 keeps exponent and mantissa, which leaves the value 2**8 too small because of
    the difference of the exponent biases. Subnormals need no case of their own: they become float16 subnormals.
    """
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e2m1_to_fp16(code):
    """E2M1 codes 0..15 (uint8) -> float16, exact, by the same kind of shift; here the biases are 2**14 apart."""
    bits = code.to(tl.uint16)
    half = ((bits & 0x8) << 12) | ((bits & 0x7) << 9)
    return half.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def unpack_codes(packed):
    """Packed codes [N, K/2] (uint8) -> their values [N, K] in float16."""
    return e2m1_to_fp16(tl.interleave(packed & 0xF, packed >> 4))


@triton.jit
def scale_blocks(values, scales):
    """values [N, K] * scales [N, K/16], each scale on its block of 16; both of one dtype."""
    N: tl.constexpr = scales.shape[0]
    BLOCKS: tl.constexpr = scales.shape[1]
    scaled = tl.reshape(values, (N, BLOCKS, 16)) * tl.reshape(scales, (N, BLOCKS, 1))
    return tl.reshape(scaled, (N, BLOCKS * 16))


@triton.jit
def dequantize_tile(packed, scale_byte, dtype: tl.constexpr):
    """code * block_scale of a tile: packed [N, K/2] and scale_byte [N, K/16] (both uint8) -> [N, K] in dtype, exact.

    The product has at most 6 significant bits and lies in [2**-10, 2688], so float16 holds it, and so does bfloat16.
    """
    return scale_blocks(unpack_codes(packed), e4m3_to_fp16(scale_byte)).to(dtype)


@triton.jit
def _round_magnitude(magnitude, MIN_EXPONENT: tl.constexpr, DROPPED_BITS: tl.constexpr):
    """Round |x|, given as float32 bits, to a narrower float; nearest, ties to even, without an upper bound.

    MIN_EXPONENT is the biased float32 exponent of the narrow format's smallest normal number, DROPPED_BITS how many
    mantissa bits the narrow format lacks. Returns exponent and mantissa of the narrow format as one integer. A carry
    out of the mantissa runs into the exponent, which is right, also from the subnormals into the normals.
    """
    own_exponent = magnitude >> 23
    exponent = tl.maximum(own_exponent, MIN_EXPONENT)
    # The hidden bit is set for float32 subnormals too; they are so small that everything is shifted out.
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    # From 25 bits on, a 24-bit mantissa is below half a unit: more shifting changes nothing and would overflow.
    shift = tl.minimum(DROPPED_BITS + exponent - own_exponent, 25)
    below_half = (1 << (shift - 1)) - 1
    rounded = (mantissa + below_half + ((mantissa >> shift) & 1)) >> shift
    return ((exponent - MIN_EXPONENT) << (23 - DROPPED_BITS)) + rounded


@triton.jit
def fp32_to_e4m3(x):
    """float32 -> float8_e4m3fn bytes (uint8); ties to even, saturates at 448 (infinity too), NaN -> 0x7f, sign kept."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    byte = tl.minimum(_round_magnitude(magnitude, 121, 20), 0x7E)
    byte = tl.where(magnitude > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def round_to_e2m1(x):
    """float32 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with its sign; ties to even codes, NaN to +6."""
    magnitude = tl.minimum(tl.abs(x), 6.0)  # of a NaN, 6
    # Adding 1.5 * 2^22 * p, and taking it off again, rounds to multiples of p / 2, ties to even ones. p is the power of
    # two that the number begins with, and no less than 1.
    p = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    shift = (p + 0x0B400000).to(tl.float32, bitcast=True)
    rounded = ((magnitude + shift) - shift).to(tl.int32, bitcast=True)
    sign = tl.where(x == x, x.to(tl.int32, bitcast=True) & -0x80000000, 0)
    return (rounded | sign).to(tl.float32, bitcast=True)
