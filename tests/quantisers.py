"""Ways in which models spell the fake quantisation of activations, one for each rule and some that are none.

All take x [.., K] and a global scale: a multiplier s or, where the producer holds that, its reciprocal g.
"""

import torch
from torch import Tensor

TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def blocks_of(x: Tensor, size: int = 16) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, size)


def round_by_where(x: Tensor) -> Tensor:
    """To E2M1, ties to even, by a chain of thresholds."""
    m = x.abs()
    out = torch.zeros_like(m)
    for i, (tie, value) in enumerate(zip(_TIES, TABLE[1:], strict=True)):
        above = m >= tie if i % 2 else m > tie
        out = torch.where(above, torch.full_like(m, value), out)
    return torch.copysign(out, x)


def round_by_bucketize(x: Tensor) -> Tensor:
    """To E2M1 by two searches: ties go up where the upper code is even."""
    ties = torch.tensor(_TIES)
    m = x.abs()
    below, upto = torch.bucketize(m, ties), torch.bucketize(m, ties, right=True)
    code = torch.where(upto % 2 == 0, upto, below)
    return torch.tensor(TABLE)[code] * torch.where(torch.signbit(x), -1.0, 1.0)


def round_by_steps(x: Tensor) -> Tensor:
    """To E2M1 by rounding to the step of each binade."""
    m = x.abs().clamp(max=6.0)
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    return torch.sign(x) * (torch.round(m / step) * step)


ROUNDERS = {f.__name__: f for f in (round_by_where, round_by_bucketize, round_by_steps)}


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def _finish(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(x.shape).to(x.dtype)


def hardware(x: Tensor, g: Tensor, rounded=round_by_where) -> Tensor:
    b = blocks_of(x).float()
    s = g.reciprocal()
    amax = b.abs().amax(-1, keepdim=True)
    scale = e4m3(g * (amax * (1.0 / 6.0)))
    inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * s))
    return _finish(rounded(b * inverse) * (scale * s), x)


def vllm(x: Tensor, g: Tensor, rounded=round_by_steps) -> Tensor:
    b = blocks_of(x).float()
    amax = torch.max(b.abs(), dim=-1, keepdim=True)[0]
    scale = e4m3(g * (amax * (1.0 / 6.0)))
    inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * (1.0 / g)))
    return _finish(rounded((b * inverse).clamp(-6, 6)) * (scale / g), x)


def compressed_tensors(x: Tensor, g: Tensor, rounded=round_by_steps) -> Tensor:
    b = blocks_of(x)
    amax = torch.maximum(b.amax(-1, keepdim=True), -b.amin(-1, keepdim=True))
    scale = e4m3((amax / 6.0).float() * g)
    scale = torch.where(scale == 0, 0.125, scale) / g
    return _finish(rounded((b / scale).clamp(-6, 6)) * scale, x)


def modelopt(x: Tensor, s: Tensor, rounded=round_by_steps) -> Tensor:
    b = blocks_of(x).float()
    scale = b.abs().amax(-1, keepdim=True) / (6.0 * s)
    scale = torch.where(scale == 0, 1.0, scale)
    scale = scale.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * s
    return _finish(rounded(b / scale) * scale, x)


def torchao(x: Tensor, s: Tensor, rounded=round_by_where) -> Tensor:
    b = blocks_of(x).float()
    scale = (b.abs().amax(-1, keepdim=True) / 6.0) / s
    scale = scale.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).float()
    return _finish(rounded((b * ((1.0 / s) / scale)).clamp(-6, 6)) * (scale * s), x)


def tiny_scales_vanish(x: Tensor, s: Tensor, rounded=round_by_steps) -> Tensor:
    b = blocks_of(x).float()
    scale = e4m3((1.0 / s) * (b.abs().amax(-1, keepdim=True) * (1.0 / 6.0))) * s
    return _finish(rounded(b / torch.where(scale < 1e-5, 1.0, scale)) * torch.where(scale < 1e-5, 1.0, scale), x)


# rule -> (spelling, whether it takes the reciprocal)
RULES = {
    "hardware": (hardware, True),
    "vllm": (vllm, True),
    "compressed-tensors": (compressed_tensors, True),
    "modelopt": (modelopt, False),
    "modelopt-kernel": (tiny_scales_vanish, False),
    "torchao": (torchao, False),
}
