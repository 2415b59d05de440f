"""Inserts nodes into a graph in place of a product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .nodes import same_size

aten = torch.ops.aten
prims = torch.ops.prims

# Metadata of a product that holds for what replaces it: its place in the model; and for the partitioner, on which side
# it belongs and whether activation checkpointing wants it computed again.
_INHERITED = ("nn_module_stack", "stack_trace", "seq_nr", "partitioner_tag", "recompute", "ac_graph_id")


class CannotRewriteError(Exception):
    """A recognised product that no op serves; carries reason and advice."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


class Emitter:
    """Inserts nodes before a product, with values for later passes and the product's place in the model.

    What the graph computes already is used again, so that several products of one weight share its parts.
    """

    def __init__(self, graph: fx.Graph, before: Node) -> None:
        self._graph, self._before = graph, before
        self._fake_mode = before.meta["val"].fake_mode
        self._meta: dict[str, Any] = {k: before.meta[k] for k in _INHERITED if k in before.meta}
        self._emitted: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        if equal := self._present(target, args, kwargs):
            return equal
        node = self._graph.call_function(target, args, kwargs)
        self._emitted.append(node)
        with self._fake_mode:
            values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta.update(self._meta, val=target(*values, **keywords))
        return node

    def _present(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
        """An equal call that comes before."""
        first = next((arg for arg in args if isinstance(arg, Node)), None)
        for user in first.users if first is not None else ():
            if user.target is target and repr((user.args, user.kwargs)) == repr((args, kwargs)) and user < self._before:
                return user
        return None

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """node in another dtype, or itself."""
        return node if node.meta["val"].dtype == dtype else self(prims.convert_element_type.default, node, dtype)

    def view(self, node: Node, shape: Sequence[Any]) -> Node:
        """node in another shape, of which one size may be a symbol; copied where its strides forbid a view."""
        value = node.meta["val"]
        if len(shape) == value.dim() and all(map(same_size, shape, value.shape)):
            return node
        symbols = [size for size in shape if isinstance(size, torch.SymInt)]
        if len(symbols) + sum(size == -1 for size in shape if isinstance(size, int)) > 1:
            raise CannotRewriteError(f"sizes {symbols} are symbolic", "let one size of the weight be a symbol at most")
        return self.reshape(node, [-1 if isinstance(size, torch.SymInt) else size for size in shape])

    def reshape(self, node: Node, shape: Sequence[Any]) -> Node:
        """node in another shape, whose sizes are numbers or nodes of symbols (see :meth:`size`), one of them -1."""
        with self._fake_mode:
            contiguous = node.meta["val"].is_contiguous()
        if not contiguous:
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self(aten.view.default, node, list(shape))

    def size(self, node: Node, dim: int) -> Any:
        """A size of node as an argument: a number, or a node of a symbolic one."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self(aten.sym_size.int, node, dim)

    def undo(self) -> None:
        """Remove everything inserted."""
        for node in reversed(self._emitted):
            self._graph.erase_node(node)

    def full(self, shape: Sequence[Any], value: float, like: Node) -> Node:
        device = like.meta["val"].device
        return self(aten.full.default, list(shape), value, dtype=torch.float32, device=device, pin_memory=False)


def shape(node: Node) -> list[Any]:
    return list(node.meta["val"].shape)
