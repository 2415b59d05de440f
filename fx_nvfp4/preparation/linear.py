"""Proof that the steps around experts move, scale and add rows, and do nothing else to them.

Numbers alone cannot tell ``expert(x).clamp(-10, 10)`` from ``expert(x)`` while no value is large; the steps can.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Node

from .record import Unsuited
from .recorder import Recording, descendants

# op -> positions of the arguments whose values the result holds; in-place forms likewise
_MOVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "squeeze", "unsqueeze", "alias"),
        (0,),
    ),
    **dict.fromkeys(
        ("select", "slice", "index", "index_select", "gather", "unbind", "split", "split_with_sizes"), (0,)
    ),
    **dict.fromkeys(("clone", "detach", "lift_fresh", "_to_copy", "masked_select", "repeat", "flip", "take"), (0,)),
    **dict.fromkeys(("cat", "stack", "constant_pad_nd"), (0,)),
    **dict.fromkeys(("index_put", "_index_put_impl", "masked_scatter"), (0, 2)),
    **dict.fromkeys(("scatter", "index_copy", "slice_scatter", "select_scatter"), (0, 1, 3)),
    **dict.fromkeys(("copy", "masked_fill"), (0, 1)),
    "where": (1, 2),
    **dict.fromkeys(("zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_full"), ()),
}
_SCALES: dict[str, tuple[int, ...]] = {"mul": (0, 1), "div": (0,)}
_ADDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("add", "sub", "addmm", "baddbmm"), (0, 1, 2)),
    **dict.fromkeys(("index_add", "scatter_add"), (0, 3)),
    **dict.fromkeys(("mm", "bmm", "matmul"), (0, 1)),
    **dict.fromkeys(("sum", "mean"), (0,)),
}
_PRODUCTS = {"mul", "mm", "bmm", "matmul", "addmm", "baddbmm"}  # linear in one factor alone


def rows_from(recording: Recording, width: int) -> set[Node]:
    """Nodes that the rows [.., width] of every call were moved, and perhaps scaled, from."""
    return set.intersection(*(_sources(call.node, width) for call in recording.calls))


def _sources(call: Node, width: int) -> set[Node]:
    waiting = [_content(call, call.args[1])]  # type: ignore[arg-type]
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        positions = {**_MOVES, **_SCALES}.get(_name(node), ())
        arguments = (a for i, a in enumerate(node.args) if i in positions)
        waiting += [_content(node, a) for a in _nodes(arguments) if _is_rows(a, width)]
    return found


def _is_rows(node: Node, width: int) -> bool:
    value = node.meta["value"]
    return not isinstance(value, Tensor) or (value.is_floating_point() and value.shape[-1:] == (width,))


def _content(reader: Node, argument: Node) -> Node:
    """The node that made what reader found in argument: its last writer, if that came later."""
    writer = reader.meta["writers"].get(argument, argument)
    return writer if writer.meta["seq"] > argument.meta["seq"] else argument


def check_sum(recording: Recording, module: nn.Module, combined: Node) -> None:
    """Raise `Unsuited` if steps between the experts and their sum are not linear in what the experts give."""
    calls = {call.node for call in recording.calls}
    depends = descendants(recording, calls)
    needed = _ancestors(combined) & depends - calls
    for node in recording.graph.nodes:
        if node in depends and torch.Tag.data_dependent_output in getattr(node.target, "tags", ()):
            raise Unsuited("it takes decisions by what its experts give", "decide by hidden states alone")
        if node in needed and not _is_linear(node, module, depends):
            raise Unsuited(
                f"{node.target} changes what its experts give before it is added up",
                "apply it to the sum, or in the expert",
            )


def _is_linear(node: Node, module: nn.Module, depends: set[Node]) -> bool:
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return isinstance(part, nn.Identity) or (isinstance(part, nn.Dropout) and not part.training)
    name = _name(node)
    positions = {**_MOVES, **_SCALES, **_ADDS}.get(name)
    if positions is None:
        return name == "getitem"
    reading = [i for i, arg in enumerate(node.args) if any(_content(node, a) in depends for a in _nodes([arg]))]
    factors = [i for i in reading if name in _PRODUCTS and not (i == 0 and name in ("addmm", "baddbmm"))]
    shape_only = name in _MOVES and not positions
    return shape_only or (set(reading) <= set(positions) and len(factors) <= 1)


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.meta["deps"]
    return found


def _name(node: Node) -> str:
    """Name of a node's ATen op, "mul" for mul_.Tensor; "getitem" of a part of a result."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::").removesuffix("_")
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _nodes(arguments: object) -> Iterator[Node]:
    """Nodes in nested sequences."""
    if isinstance(arguments, Node):
        yield arguments
    elif not isinstance(arguments, (str, torch.dtype, dict)) and hasattr(arguments, "__iter__"):
        for a in arguments:
            yield from _nodes(a)
