"""Times the forward passes inside transformers' generate()."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """A model's forward that notes the seconds of each call."""

    def __init__(self, forward: Callable[..., Any], device: torch.device) -> None:
        functools.update_wrapper(self, forward)  # generate() reads the signature
        self._forward, self._device = forward, device
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        start = time.perf_counter()
        result = self._forward(*args, **kwargs)
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class Times:
    """Seconds of all passes over the prompts, of all steps of decoding, and of the first generation, which compiles."""

    prefill: list[float]
    decode: list[float]
    first: float


def time_generation(model: Any, prompt: Tensor, new_tokens: int, repeats: int) -> Times:
    """Times of several generations.

    Greedy decoding with a static cache; model.forward is compiled already. new_tokens are generated after the one that
    the prefill gives.
    """
    settings: dict[str, Any] = {"max_new_tokens": new_tokens + 1, "min_new_tokens": new_tokens + 1, "do_sample": False}
    cache = static_cache(model, prompt, prompt.shape[1] + new_tokens + 1)
    settings |= {"past_key_values": cache, "disable_compile": True, "pad_token_id": 0}
    prefill: list[float] = []
    decode: list[float] = []
    forward, model.forward = model.forward, Stopwatch(model.forward, prompt.device)
    try:
        start = time.perf_counter()
        model.generate(prompt, **settings)
        first = time.perf_counter() - start
        for _ in range(repeats):
            model.forward.seconds.clear()
            cache.reset()
            model.generate(prompt, **settings)
            prefill.append(model.forward.seconds[0])
            decode += model.forward.seconds[1:]
    finally:
        model.forward = forward
    return Times(prefill, decode, first)


def static_cache(model: Any, prompt: Tensor, length: int) -> Any:
    """transformers' static cache for prompts like this one and `length` tokens; reset() makes it ready for others.

    An uncompiled pass over the first token lets the model shape it, before a graph sees it. One that generate() makes
    comes to be inside the graph of the prefill, and then CUDA graphs, which do not know its addresses as fixed, take
    neither stage.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(prompt[:, :1], past_key_values=cache)
    cache.reset()
    return cache
