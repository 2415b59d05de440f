"""The NVFP4 number format in plain PyTorch: the one oracle that kernels, ops and passes are tested against.

A value is ``code * block_scale * global_scale``: an E2M1 code (4 bits, two to a byte, the even element of K
in the low nibble), one float8_e4m3fn scale per 16 elements along K, and one fp32 multiplier. Producers that
store a divisor (compressed-tensors) are converted when a checkpoint is read; here it is always the multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dialects import TWO_LEVEL_MAX, encode_e2m1, get_dialect

BLOCK = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_SWIZZLE_ROWS, _SWIZZLE_COLS = 128, 4


def pack(codes: Tensor) -> Tensor:
    """Pack codes [..., K] (uint8, 0 to 15) into bytes [..., K/2], the even element in the low nibble."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(f"pack: expected uint8 codes with an even last dim, got {_describe(codes)}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes [..., K/2] (uint8) into codes [..., K] (uint8, 0 to 15)."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"unpack: expected uint8 bytes, got {_describe(packed)}")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E2M1 values [..., K] of packed bytes [..., K/2], exact in every float dtype of 8 bits or more."""
    return decode_codes(unpack(packed)).to(dtype)


def decode_codes(codes: Tensor) -> Tensor:
    """float32 values of codes (uint8, 0 to 15), by integer arithmetic: no table has to reach the device."""
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = torch.where(exponent > 0, (mantissa + 2) << exponent, mantissa << 1)
    magnitude = quarters.float() * 0.25
    return torch.where(codes > 7, -magnitude, magnitude)


def code_times_scale(packed: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that enter the matrix units: code * block_scale, without the global scale.

    Args:
        packed: uint8 [..., K/2].
        block_scale: float8_e4m3fn [..., K/16].
        dtype: float32, bfloat16 or float16; the product has at most 6 significant bits and lies between 2^-10
            and 2688, so that it is exact in each of them.

    Returns:
        [..., K] in dtype.
    """
    check_packed(packed, block_scale)
    values = decode(packed, dtype).unflatten(-1, (-1, BLOCK))
    return (values * block_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize(
    packed: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of packed weights, computed in fp32 as code * (block_scale * global_scale) and rounded once.

    Args:
        packed: uint8 [..., K/2].
        block_scale: float8_e4m3fn [..., K/16], linear (see :func:`unswizzle`).
        global_scale: the multiplier, a number or a tensor that broadcasts to [..., 1]; None means 1.
        dtype: dtype of the result.

    Returns:
        [..., K] in dtype; bit for bit what vLLM, ModelOpt and torchao dequantise to.

    Raises:
        ValueError: dtypes or shapes do not fit together.
    """
    check_packed(packed, block_scale)
    scale = block_scale.float()
    if global_scale is not None:
        scale = scale * torch.as_tensor(global_scale, dtype=torch.float32, device=scale.device)
    values = decode(packed).unflatten(-1, (-1, BLOCK))
    return (values * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def quantize(x: Tensor, global_scale: Tensor | float, dialect: str = "hardware") -> tuple[Tensor, Tensor]:
    """Quantise along the last dim.

    Args:
        x: float32, bfloat16 or float16, [..., K] with K a multiple of 16.
        global_scale: the multiplier, usually amax / 2688: a number or a tensor that broadcasts to [..., 1].
            Pass float64 where a producer stored the reciprocal: fp32(1 / global_scale) is then that
            producer's number bit for bit, which a multiplier in fp32 does not guarantee.
        dialect: whose rounding rule to follow, see :mod:`fx_nvfp4.dialects`.

    Returns:
        (packed, block_scale): uint8 [..., K/2] and float8_e4m3fn [..., K/16].

    Raises:
        ValueError: K is not a multiple of 16, x is not floating point, or the dialect is unknown.
    """
    codes, block_scale = _quantize_blocks(x, global_scale, dialect)
    return pack(codes.flatten(-2)), block_scale.squeeze(-1)


def fake_quantize(x: Tensor, global_scale: Tensor | float, dialect: str = "hardware") -> Tensor:
    """Quantise and dequantise along the last dim, in x's dtype; arguments and errors as :func:`quantize`."""
    rule = get_dialect(dialect)
    codes, block_scale = _quantize_blocks(x, global_scale, dialect)
    s, g = scale_pair(global_scale, x.device)
    return rule.value(decode_codes(codes), block_scale.float(), _blockwise(s), _blockwise(g)).flatten(-2).to(x.dtype)


def scale_pair(global_scale: Tensor | float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(s, g): a global scale in fp32 and its fp32 reciprocal, each rounded once from the number given."""
    if not isinstance(global_scale, Tensor):  # not by way of the default dtype
        global_scale = torch.tensor(global_scale, dtype=torch.float64)
    exact = global_scale.to(device).double()
    return exact.float(), (1.0 / exact).float()


def amax_scale(x: Tensor) -> Tensor:
    """The global scale (multiplier, fp32 scalar) at which x's largest magnitude is representable; 1 for zeros."""
    amax = x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    return torch.where(amax > 0, amax / TWO_LEVEL_MAX, torch.ones_like(amax))


def swizzle(block_scale: Tensor) -> Tensor:
    """Lay linear block scales [N, K/16] out in the 128 x 4 tiles that Blackwell's matrix units read.

    Returns:
        flat tensor of ceil(N/128) * ceil(K/64) * 512 elements, padded with zeros; row r and column c of a tile
        lie at ``(r % 32) * 16 + (r // 32) * 4 + c``.
    """
    rows, cols = block_scale.shape
    tall, wide = -(-rows // _SWIZZLE_ROWS), -(-cols // _SWIZZLE_COLS)
    raw = torch.zeros(tall * _SWIZZLE_ROWS, wide * _SWIZZLE_COLS, dtype=torch.uint8, device=block_scale.device)
    raw[:rows, :cols] = block_scale.view(torch.uint8)
    tiles = raw.view(tall, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(block_scale.dtype)


def unswizzle(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Invert :func:`swizzle`: any shape with the tiles' elements in order -> linear [rows, cols].

    Raises:
        ValueError: the number of elements is not that of the padded tiles.
    """
    tall, wide = -(-rows // _SWIZZLE_ROWS), -(-cols // _SWIZZLE_COLS)
    expected = tall * wide * _SWIZZLE_ROWS * _SWIZZLE_COLS
    if swizzled.numel() != expected:
        raise ValueError(
            f"unswizzle: {rows} x {cols} scales need {expected} elements in 128 x 4 tiles, got {_describe(swizzled)}"
        )
    tiles = swizzled.contiguous().view(torch.uint8).view(tall, wide, 32, 4, 4)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(tall * _SWIZZLE_ROWS, wide * _SWIZZLE_COLS)
    return linear[:rows, :cols].contiguous().view(swizzled.dtype)


def check_packed(packed: Tensor, block_scale: Tensor) -> None:
    """Raise ValueError unless codes and block scales have NVFP4's dtypes and fitting shapes."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes: expected uint8, got {_describe(packed)}")
    if block_scale.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"block scales: expected float8_e4m3fn, got {_describe(block_scale)}; "
            "view raw bytes with .view(torch.float8_e4m3fn)"
        )
    expected = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK)
    if packed.shape[-1] * 2 % BLOCK or tuple(block_scale.shape) != expected:
        raise ValueError(
            f"block scales: codes {list(packed.shape)} need one scale per {BLOCK} elements, {list(expected)}, "
            f"got {list(block_scale.shape)}; unswizzle them first if they are in 128 x 4 tiles"
        )


def _quantize_blocks(x: Tensor, global_scale: Tensor | float, dialect: str) -> tuple[Tensor, Tensor]:
    """Codes [..., K/16, 16] and block scales [..., K/16, 1]."""
    rule = get_dialect(dialect)
    if not x.is_floating_point() or x.shape[-1] % BLOCK:
        raise ValueError(
            f"NVFP4 quantises floating-point rows in blocks of {BLOCK}: the last dim must be a multiple, "
            f"got {_describe(x)}"
        )
    s, g = (_blockwise(t) for t in scale_pair(global_scale, x.device))
    blocks = x.contiguous().unflatten(-1, (-1, BLOCK))
    block_scale = rule.block_scale(rule.amax(blocks), s, g)
    return encode_e2m1(rule.scaled(blocks, block_scale.float(), s, g)), block_scale


def _blockwise(scale: Tensor) -> Tensor:
    """A scale that broadcasts to [..., 1] made to broadcast to blocks [..., K/16, 1]."""
    return scale.unsqueeze(-1) if scale.dim() else scale


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
