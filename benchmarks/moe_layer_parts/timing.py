"""How long a call takes.

Up to 256 tokens, one CUDA graph holds a call for every input, one after the other, and its replays are timed: no time
of the host is in it. Above, events around each call, with so much queued before the first that the host is ahead.
Either way inputs take turns, and with them the experts: between two uses of an expert lie more bytes than the L2 cache
holds, wherever a layer has that many (the tiny one has not). Nothing is flushed, as nothing is in a model.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

GRAPH_TOKENS = 256
FEW_CALLS, MANY_CALLS = 4, 64  # inputs that take turns

Function = Callable[..., Tensor]
Arguments = Sequence[tuple[Any, ...]]


def calls_for(bytes_of_call: float, tokens: int, device: torch.device) -> int:
    """How many inputs have to take turns so that four times the L2 cache is read before the first comes again."""
    if tokens > GRAPH_TOKENS or device.type != "cuda":
        return FEW_CALLS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(FEW_CALLS, -(-4 * cache // int(bytes_of_call))), MANY_CALLS)


def seconds_of_call(
    call: Function, arguments: Arguments, tokens: int, device: torch.device, seconds: float, cover: Callable[[], Any]
) -> tuple[float, Tensor]:
    """(median seconds, the result for the first input), measured for about ``seconds``.

    Args:
        cover: queues some hundred microseconds of other work.
    """
    if device.type != "cuda":
        return _by_wall_clock(call, arguments, seconds), call(*arguments[0])
    if tokens > GRAPH_TOKENS:
        return _by_events(call, arguments, seconds, cover), call(*arguments[0])
    return _by_replays(call, arguments, seconds)


def _by_wall_clock(call: Function, arguments: Arguments, seconds: float) -> float:
    times: list[float] = []
    for given in _turns(arguments, seconds):
        start = time.perf_counter()
        call(*given)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _by_events(call: Function, arguments: Arguments, seconds: float, cover: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for given in arguments:
        call(*given)
    covers = int((time.perf_counter() - start) / 300e-6) + 1
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in _turns([()], seconds):
        for _ in range(min(covers, 100)):
            cover()
        times += event_times([partial(call, *given) for given in arguments])
    return statistics.median(times)


def _by_replays(call: Function, arguments: Arguments, seconds: float) -> tuple[float, Tensor]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = [call(*given) for given in arguments]
    first = min(event_times([graph.replay] * 2))
    at_once = min(max(int(seconds / first), 1), 10)
    times: list[float] = []
    for _ in _turns([()], seconds):
        times += event_times([graph.replay] * at_once)
    return statistics.median(times) / len(arguments), results[0].clone()


def event_times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of each call on the GPU, one queued behind the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 for before, after in itertools.pairwise(events)]


def _turns(arguments: Arguments, seconds: float) -> Iterator[tuple[Any, ...]]:
    """Arguments in turn, each at least once, until so many seconds have passed."""
    start, i = time.perf_counter(), 0
    while i < len(arguments) or time.perf_counter() - start < seconds:
        yield arguments[i % len(arguments)]
        i += 1
