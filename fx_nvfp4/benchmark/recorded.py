"""Forward passes as one CUDA graph each: without what the host does between kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Recorded:
    """A model's forward that replays calls on one new token a prompt, or all.

    The first such call runs as it is, and compiles; the second with inputs alike is recorded. A cache has to be static
    and the same object: a graph goes on to write where the recorded call wrote. The result lies where the last one lay.
    """

    def __init__(self, forward: Callable[..., Any], prompts: bool = False) -> None:
        functools.update_wrapper(self, forward)  # generate() reads the signature
        self._forward, self._prompts = forward, prompts
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not (self._prompts or kwargs["input_ids"].shape[1] == 1):
            return self._forward(*args, **kwargs)
        leaves, form = tree_flatten(kwargs)
        alike = str(form), *(_kind(leaf) for leaf in leaves)
        if alike not in self._seen:
            self._seen.add(alike)
            with _as_if_recorded():
                return self._forward(**tree_unflatten(_copies(leaves), form))
        if alike not in self._graphs:
            self._graphs[alike] = self._record(leaves, form)
        return self._graphs[alike].replay(leaves)

    def _record(self, leaves: list[Any], form: Any) -> _Graph:
        kept = _copies(leaves)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = self._forward(**tree_unflatten(kept, form))
        return _Graph(graph, kept, result)


@contextlib.contextmanager
def _as_if_recorded() -> Iterator[None]:
    """Code that asks hears that a graph is recorded, so that what compiles now is what the recording runs.

    transformers looks into a mask for padding, and leaves out one that has none, unless a graph is recorded; a
    layer with a mask then has to be compiled, and that cannot be while recording.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    result: Any

    def replay(self, leaves: list[Any]) -> Any:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self.graph.replay()
        return self.result


def _copies(leaves: list[Any]) -> list[Any]:
    """Leaves whose tensors are no views: code is compiled anew where a view was and is none, or the reverse."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)
