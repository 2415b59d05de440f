"""Random weights, activations and routings, as real layers have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.format import TWO_LEVEL_MAX
from fx_nvfp4.prepack import supports

from .exact import Call, decoded, product
from .shapes import Shape

# Static activation scales: of each expert, as checkpoints have them, or one for all, as vLLM makes of them.
FORMATS = ("w4a16", "w4a4", "w4a4-shared")
STDDEV = 0.02  # of the weights


@dataclass(frozen=True)
class Layer:
    """Packed experts of one layer, and the scales of their activations.

    gate_up, down: weight-only; act_scales: float64 [E], of x and of h.
    """

    shape: Shape
    gate_up: NVFP4Weight
    down: NVFP4Weight
    act_scales: tuple[Tensor, Tensor]

    @property
    def device(self) -> torch.device:
        return self.gate_up.qdata.device

    @cached_property
    def tiled(self) -> tuple[NVFP4Weight, NVFP4Weight]:
        """(gate_up, down) in tiles where kernels read them so; the backend would put them there itself if nobody else
        needed them as they are."""
        weights = self.gate_up, self.down
        suited = self.device.type == "cuda" and all(supports(*w.shape[-2:]) for w in weights)
        return (self.gate_up.tiled(), self.down.tiled()) if suited else weights

    def weights(self, format: str, tiled: bool = False) -> tuple[NVFP4Weight, NVFP4Weight]:
        """(gate_up, down) whose products run in one of FORMATS; the packed parts are shared."""
        weights = self.tiled if tiled else (self.gate_up, self.down)
        if format == "w4a16":
            return weights
        scales = self.act_scales if format == "w4a4" else [scale.max() for scale in self.act_scales]
        pairs = zip(weights, scales, strict=True)
        gate_up, down = (w.replace(activations="static", act_scale=scale) for w, scale in pairs)
        return gate_up, down


def random_layer(shape: Shape, device: torch.device) -> Layer:
    """Quantised from normal numbers, expert by expert, on the device: no more than one expert is ever dense."""
    gate_up = _random_weight(shape.experts, 2 * shape.intermediate, shape.hidden, device)
    down = _random_weight(shape.experts, shape.hidden, shape.intermediate, device)
    x = torch.randn(256, shape.hidden, device=device).bfloat16()
    gate, up = product(x, decoded(gate_up, 0), gate_up, 0).bfloat16().float().chunk(2, dim=-1)
    largest = (torch.nn.functional.silu(gate) * up).abs().max()
    return Layer(shape, gate_up, down, (_near(x.abs().max(), shape.experts), _near(largest, shape.experts)))


def _near(amax: Tensor, experts: int) -> Tensor:
    """Scales as a calibration finds them: of experts that see other tokens, and so nearly the same largest number."""
    spread = torch.rand(experts, dtype=torch.float64, device=amax.device) * 0.2 + 0.9
    return amax.double() * spread / TWO_LEVEL_MAX


def _random_weight(experts: int, n: int, k: int, device: torch.device) -> NVFP4Weight:
    qdata = torch.empty(experts, n, k // 2, dtype=torch.uint8, device=device)
    block_scale = torch.empty(experts, n, k // 16, dtype=torch.uint8, device=device)
    global_scale = torch.empty(experts, n, device=device)
    for e in range(experts):
        w = NVFP4Weight.from_dense(torch.randn(n, k, device=device) * STDDEV)
        qdata[e], block_scale[e], global_scale[e] = w.qdata, w.block_scale.view(torch.uint8), w.global_scale
    return NVFP4Weight(qdata, block_scale.view(torch.float8_e4m3fn), global_scale, torch.bfloat16)


def random_calls(shape: Shape, tokens: int, count: int, device: torch.device) -> list[Call]:
    """count inputs, the same at every call: uniform random distinct experts for every token.

    The experts of each routing are renamed so that they are those which the routings before it used longest ago. This
    changes no routing by itself, and lets as many bytes as possible pass before an expert is read again: as in a
    model, whose layers have weights of their own.
    """
    generator = torch.Generator(device).manual_seed(tokens)
    longest_ago = torch.randperm(shape.experts, generator=generator, device=device)
    calls = []
    for _ in range(count):
        x = torch.randn(tokens, shape.hidden, generator=generator, device=device).bfloat16()
        scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
        top = scores.topk(shape.top)
        hit = top.indices.unique()
        names = torch.empty(shape.experts, dtype=torch.int64, device=device)
        names[hit] = longest_ago[: len(hit)]
        longest_ago = longest_ago.roll(-len(hit))
        weights = top.values / top.values.sum(dim=-1, keepdim=True)
        calls.append((x, names[top.indices], weights.bfloat16()))
    return calls


def experts_hit(calls: Sequence[Call]) -> float:
    """How many experts a call uses, on average."""
    return sum(len(ids.unique()) for _, ids, _ in calls) / len(calls)
