"""Inserts nodes into a graph in place of a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

aten = torch.ops.aten

# Metadata of a product that holds for what replaces it: its place in the model; and for the partitioner, on which side
# it belongs and whether activation checkpointing wants it computed again.
_INHERITED = ("nn_module_stack", "stack_trace", "seq_nr", "partitioner_tag", "recompute", "ac_graph_id")


class CannotRewriteError(Exception):
    """A recognised product that no op serves; carries reason and advice."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


class Emitter:
    """Inserts nodes before a product, with values for later passes and the product's place in the model."""

    def __init__(self, graph: fx.Graph, before: Node) -> None:
        self._graph = graph
        self._fake_mode = before.meta["val"].fake_mode
        self._meta: dict[str, Any] = {k: before.meta[k] for k in _INHERITED if k in before.meta}
        self._emitted: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        self._emitted.append(node)
        with self._fake_mode:
            values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta.update(self._meta, val=target(*values, **keywords))
        return node

    def view(self, node: Node, shape: list[Any]) -> Node:
        """node in another shape, copied where its strides forbid a view."""
        with self._fake_mode:
            contiguous = node.meta["val"].is_contiguous()
        if not contiguous:
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self(aten.view.default, node, shape)

    def undo(self) -> None:
        """Remove everything inserted."""
        for node in reversed(self._emitted):
            self._graph.erase_node(node)

    def full(self, shape: Sequence[Any], value: float, like: Node) -> Node:
        device = like.meta["val"].device
        return self(aten.full.default, list(shape), value, dtype=torch.float32, device=device, pin_memory=False)


def shape(node: Node) -> list[Any]:
    return list(node.meta["val"].shape)
