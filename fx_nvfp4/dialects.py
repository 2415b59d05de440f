"""How each producer turns numbers into NVFP4: one class a rule, differing only where the producers differ.

All rules work on fp32 (or the input's dtype, where a producer rounds early) and share the format of
:mod:`fx_nvfp4.format`. The hardware's rule is the default everywhere; the others exist to reproduce what
a checkpoint's producer, or a graph that spells that producer's arithmetic, computes bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
# Largest representable value before the global scale; amax / TWO_LEVEL_MAX is the global scale that uses it all.
TWO_LEVEL_MAX = E2M1_MAX * E4M3_MAX

_ONE_SIXTH = torch.tensor(1.0 / 6.0, dtype=torch.float32).item()


def encode_e2m1(x: Tensor) -> Tensor:
    """Round float32 to E2M1 codes as CUDA's cvt.rn.satfinite does.

    Args:
        x: float32, any shape.

    Returns:
        uint8 codes 0 to 15, same shape: nearest, ties to even, saturating at 6; the sign is kept on zero,
        NaN becomes +6, infinities become +-6.
    """
    m = x.abs()
    # The half-way points between magnitudes; a tie belongs to the even one of the two codes. Comparisons with
    # numbers, not with a table, so that a CUDA graph can capture this.
    steps = (m > 0.25, m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0)
    code = torch.zeros_like(x, dtype=torch.uint8)
    for step in steps:
        code = code + step
    nan = torch.isnan(x)
    code = torch.where(nan, 7, code)
    return code | ((torch.signbit(x) & ~nan).to(torch.uint8) << 3)


def encode_e4m3(x: Tensor) -> Tensor:
    """Round float32 to float8_e4m3fn: nearest, ties to even, saturating at +-448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _times(g: Tensor, sixth: Tensor) -> Tensor:
    """g * amax / 6 with 0 for a zero block, also where the global scale is so small that g is infinite."""
    return torch.where(sixth == 0, 0.0, g * sixth)


class Dialect:
    """The hardware's rule (vLLM's CUDA kernel and the PTX conversions it calls).

    With s the global scale (multiplier) and g its fp32 reciprocal: block scale = e4m3(g * (amax * (1/6))),
    code = e2m1(x * (1 / (block scale * s))), and a block whose scale rounds to zero is zero.
    Subclasses override the steps in which a producer differs.
    """

    name = "hardware"

    def global_scale(self, amax: Tensor) -> Tensor:
        """float64 global scale at which amax, in the numbers' dtype, is the largest representable one; 1 for zeros.

        Here the fp32 number next to amax / 2688 that is the reciprocal of its reciprocal, so that producers who store
        the one and those who store the other read the same number.
        """
        reciprocal = 1.0 / (amax.float() / TWO_LEVEL_MAX)
        return _or_one(1.0 / reciprocal)

    def amax(self, blocks: Tensor) -> Tensor:
        """Largest magnitude per block [..., 1]; the hardware's maximum ignores NaN."""
        magnitude = blocks.abs()
        return torch.where(magnitude.isnan(), 0.0, magnitude).amax(dim=-1, keepdim=True)

    def block_scale(self, amax: Tensor, s: Tensor, g: Tensor) -> Tensor:
        """e4m3 block scales from the blocks' maxima (in the input's dtype), s and g (fp32)."""
        return encode_e4m3(_times(g, amax.float() * _ONE_SIXTH))

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        """fp32 numbers that E2M1 rounding turns into codes."""
        reciprocal = torch.where(scale == 0, 0.0, 1.0 / (scale * s))
        scaled = blocks.float() * reciprocal
        # inf * 0 is NaN; in a block without a scale every code is zero, with the sign of a number, and + for NaN.
        signed = torch.copysign(torch.zeros_like(scaled), blocks.float())
        return torch.where(scale == 0, torch.where(blocks.isnan(), 0.0, signed), scaled)

    def value(self, code_value: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        """fp32 values of decoded codes; scale and s are multiplied first, as all producers do."""
        return code_value * (scale * s)


def _or_one(scale: Tensor) -> Tensor:
    """scale in float64, with 1 where there is none: for zeros, and what is too small to have a reciprocal."""
    return torch.where((scale > 0) & scale.isfinite(), scale.double(), 1.0)


def _unsigned_zero(x: Tensor, largest: float = 0.0) -> Tensor:
    """x with -0 turned into +0: rounding by sign(x) * magnitude, as the Python producers do, drops that sign."""
    return torch.where(x.abs() <= largest, 0.0, x)


def _spreading_amax(blocks: Tensor) -> Tensor:
    """Largest magnitude per block [..., 1] by torch's amax: one NaN makes the whole block NaN."""
    return blocks.abs().amax(dim=-1, keepdim=True)


class Vllm(Dialect):
    """vLLM's Python reference: the hardware's numbers, but NaN spreads over its block through the maximum."""

    name = "vllm"

    # Its products underflow there, and with them the sign (seen in its golden vectors).
    underflow = 2.0**-125

    def amax(self, blocks: Tensor) -> Tensor:
        return _spreading_amax(blocks)

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return super().scaled(_unsigned_zero(blocks, self.underflow), scale, s, g)

    def value(self, code_value: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return code_value * (scale / g)


class CompressedTensors(Dialect):
    """compressed-tensors: 2688 / amax and amax / 6 rounded to the input's dtype, true division, no zero scale."""

    name = "compressed-tensors"
    zero_scale = 0.125

    def global_scale(self, amax: Tensor) -> Tensor:
        # Rounded to that dtype, and then read as the fp32 number that is stored; in fp32 where float16 has no such
        # number, with whose infinity all codes would be zeros.
        divisor = TWO_LEVEL_MAX / amax
        return _or_one(1.0 / torch.where(divisor.isfinite(), divisor.double(), (TWO_LEVEL_MAX / amax.float()).double()))

    def amax(self, blocks: Tensor) -> Tensor:
        return _spreading_amax(blocks)

    def block_scale(self, amax: Tensor, s: Tensor, g: Tensor) -> Tensor:
        scale = encode_e4m3(_times(g, (amax / E2M1_MAX).float()))
        return torch.where(scale.float() == 0, self.zero_scale, scale.float()).to(torch.float8_e4m3fn)

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return _unsigned_zero(blocks).float() / (scale / g)

    def value(self, code_value: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return code_value * (scale / g)


class ModelOpt(Dialect):
    """ModelOpt's exporter: scales of at least 2^-9 and of 1 for a zero block, true division, no negative zero."""

    name = "modelopt"
    smallest_scale = 2.0**-9

    def global_scale(self, amax: Tensor) -> Tensor:
        return _or_one(amax.float() / TWO_LEVEL_MAX)

    def amax(self, blocks: Tensor) -> Tensor:
        return _spreading_amax(blocks)

    def block_scale(self, amax: Tensor, s: Tensor, g: Tensor) -> Tensor:
        scale = amax.float() / (E2M1_MAX * s)
        return encode_e4m3(torch.where(scale == 0, 1.0, scale.clamp(min=self.smallest_scale)))

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return _unsigned_zero(blocks).float() / (scale * s)

    def value(self, code_value: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return _unsigned_zero(code_value) * (scale * s)


class ModelOptKernel(Dialect):
    """ModelOpt's fake-quantisation kernel: the hardware's codes by true division; tiny block scales give zeros."""

    name = "modelopt-kernel"
    smallest_scale = 1e-5  # of block scale times global scale

    def block_scale(self, amax: Tensor, s: Tensor, g: Tensor) -> Tensor:
        scale = super().block_scale(amax, s, g).float()
        return torch.where(scale * s < self.smallest_scale, 0.0, scale).to(torch.float8_e4m3fn)

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        zero = torch.zeros_like(blocks, dtype=torch.float32)
        return torch.where(scale == 0, zero, _unsigned_zero(blocks).float() / (scale * s))


class TorchAO(Dialect):
    """torchao's NVFP4Tensor: no subnormal block scale, multiplication by (1 / s) / scale."""

    name = "torchao"
    smallest_scale = 2.0**-6

    def global_scale(self, amax: Tensor) -> Tensor:
        return _or_one(amax.float() / TWO_LEVEL_MAX)

    def amax(self, blocks: Tensor) -> Tensor:
        return _spreading_amax(blocks)

    def block_scale(self, amax: Tensor, s: Tensor, g: Tensor) -> Tensor:
        scale = (amax.float() / E2M1_MAX) / s
        return encode_e4m3(scale.clamp(min=self.smallest_scale))

    def scaled(self, blocks: Tensor, scale: Tensor, s: Tensor, g: Tensor) -> Tensor:
        return blocks.float() * ((1.0 / s) / scale)


_RULES = (Dialect(), Vllm(), CompressedTensors(), ModelOpt(), ModelOptKernel(), TorchAO())
DIALECTS: dict[str, Dialect] = {d.name: d for d in _RULES}


def get_dialect(name: str) -> Dialect:
    """The rule of that name.

    Raises:
        ValueError: no such dialect; the message lists those there are.
    """
    if name not in DIALECTS:
        raise ValueError(f"unknown NVFP4 dialect {name!r}; use one of {', '.join(sorted(DIALECTS))}")
    return DIALECTS[name]
