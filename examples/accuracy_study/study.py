"""Every variant measured on the same text."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Trace, expert_errors, layer_errors, trace
from .evaluate import Compiled, check_emulated, choices, compile_emulated, losses
from .presets import Preset
from .questions import Questions, make_questions
from .text import Text
from .variants import Variant, quantised


@dataclass(frozen=True)
class Result:
    """Figures of one variant.

    Attributes:
        perplexity: of a held-out byte.
        ratio, ratio_spread: perplexity as a multiple of bf16's, and its standard error, from the windows one by one:
            far less than that of the perplexity, as a window is hard or easy for both.
        right: share of right answers.
        as_bf16: share of answers that the bf16 model gives too.
        layers_alone, layers_after: see :func:`errors.layer_errors`; empty for bf16, as are the next.
        experts: relative error by layer and expert, None where no byte went to it.
    """

    name: str
    perplexity: float
    ratio: float
    ratio_spread: float
    right: float
    as_bf16: float
    layers_alone: list[float]
    layers_after: list[float]
    experts: list[list[float | None]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """What all variants are measured on."""

    windows: Tensor
    questions: Questions
    calibration: list[Tensor]
    batch: int
    device: torch.device


def make_data(text: Text, preset: Preset, device: torch.device, seed: int) -> Data:
    calibration = text.windows(preset.calibration, preset.context, seed=seed - 1).to(device).split(preset.batch)
    return Data(
        text.held_out_windows(preset.windows, preset.context),
        make_questions(text, preset.questions, preset.context, seed),
        list(calibration),
        preset.batch,
        device,
    )


def study(dense: nn.Module, data: Data, variants: Iterable[Variant]) -> Iterator[Result]:
    """Results one by one; the first variant must be bf16, with which the others are compared."""
    found = trace(dense, data.windows[: data.batch].to(data.device))
    best: _Measured | None = None
    for variant in variants:
        torch._dynamo.reset()
        model = quantised(dense, variant, data.calibration)
        check_emulated(model, data.windows[: data.batch].to(data.device), len(found.keywords))
        measured = _measure(compile_emulated(model, variant.options), data)
        best = best or measured
        yield Result(variant.name, *_compared(measured, best, data), *_errors(model, variant, found))


@dataclass(frozen=True)
class _Measured:
    """Mean negative log likelihood of a byte in each window, and the answers."""

    loss: Tensor
    chosen: Tensor


def _measure(compiled: Compiled, data: Data) -> _Measured:
    loss = losses(compiled, data.windows, data.batch, data.device).double().mean(dim=1)
    return _Measured(loss, choices(compiled, data.questions, data.batch, data.device))


def _compared(measured: _Measured, best: _Measured, data: Data) -> tuple[float, float, float, float, float]:
    """Perplexity, its multiple of the best with the standard error, share of right answers, and of the best's."""
    above = measured.loss - best.loss
    ratio = above.mean().exp().item()
    spread = ratio * (above.std() / len(above) ** 0.5).item()
    right, same = ((measured.chosen == other).double().mean().item() for other in (data.questions.right, best.chosen))
    return measured.loss.mean().exp().item(), ratio, spread, right, same


def _errors(
    model: nn.Module, variant: Variant, found: Trace
) -> tuple[list[float], list[float], list[list[float | None]]]:
    if variant.config is None:
        return [], [], []
    return *layer_errors(model, found, variant.options), expert_errors(model, found, variant.options)
