"""One cell: inputs, the check, the time, and what the device reached right after it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .ceilings import Ceilings
from .data import Layer, experts_hit, random_calls
from .device_state import DeviceState
from .exact import checked, exact, relative_error, sample
from .results import Cell
from .timing import calls_for, seconds_of_call
from .variants import Runner, Variant


class Bench:
    """Measures variants on one layer; keeps the exact results that several of them are compared with."""

    def __init__(self, layer: Layer, ceilings: Ceilings, seconds: float) -> None:
        self.layer, self.ceilings, self.seconds = layer, ceilings, seconds
        self._exact: dict[tuple[str, int], Tensor] = {}

    def cells(self, variant: Variant, tokens: list[int], report: Callable[[Cell], None]) -> None:
        """Measure a variant for each number of tokens; what fails becomes a cell that says why."""
        try:
            runner: Runner | str = variant.build(self.layer)
        except Exception as error:
            runner = _reason(error)
        for count in tokens:
            cell = self._cell(variant, runner, count)
            release()
            report(cell)
        del runner
        torch._dynamo.reset()
        release()

    def _cell(self, variant: Variant, runner: Runner | str, tokens: int) -> Cell:
        """runner: or the reason why there is none."""
        blank = partial(Cell, self.layer.shape.title, variant.name, variant.format, tokens)
        if isinstance(runner, str):
            return blank(reason=runner)
        try:
            return blank(**self._measure(variant, runner, tokens))
        except Exception as error:
            return blank(reason=_reason(error))

    def _measure(self, variant: Variant, runner: Runner, tokens: int) -> dict[str, Any]:
        shape, device = self.layer.shape, self.layer.device
        # Fewer experts than slots are hit, so that this is an upper bound of what a call reads.
        bytes_of_call = min(tokens * shape.top, shape.experts) * shape.expert_bytes
        calls = random_calls(shape, tokens, calls_for(bytes_of_call, tokens, device), device)
        arguments = [runner.prepare(*call) for call in calls]
        chosen = sample(tokens, device)
        want = self._want(variant.format, calls[0], chosen)
        got, error = checked(partial(runner.call, *arguments[0]), want, chosen, variant.bound, repeats=variant.ours)
        with DeviceState(device) as state:
            seconds, timed = seconds_of_call(
                runner.call, arguments, tokens, device, self.seconds, cover=self.ceilings.read
            )
            rates = self.ceilings.measure()
        off = relative_error(timed[chosen], want)
        assert off < variant.bound, f"relative error {off:.2g} in the timed calls, allowed {variant.bound:.2g}"
        assert not variant.ours or torch.equal(timed, got), "the timed calls give other bits"
        hit = experts_hit(calls)
        return {
            "microseconds": seconds * 1e6,
            "error": error,
            "floor": shape.floor(tokens, hit, rates) * 1e6,
            "floor_at_start": shape.floor(tokens, hit, self.ceilings.at_start) * 1e6,
            "experts_hit": hit,
            "rates": rates,
            "device_state": state.text,
        }

    def _want(self, format: str, call: tuple[Tensor, Tensor, Tensor], tokens: Tensor) -> Tensor:
        key = format, len(call[0])
        if key not in self._exact:
            self._exact[key] = exact(call, *self.layer.weights(format), tokens)
        return self._exact[key]


def release() -> None:
    """Give memory back to the device; a graph that failed may hang in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """The exception's text, with the line of ours or theirs that raised it, and without a hold on its frames."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    error.__traceback__ = None
    return f"{type(error).__name__}: {error} ({last.filename.rpartition('/')[2]}:{last.lineno})"
