"""Where in the model a graph node comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.fx import Node

from fx_nvfp4.report import ROOT, module_path

aten = torch.ops.aten

# What may lie between a graph input and an op's operand without making another tensor of it.
_VIEWS = {
    *(aten.view.default, aten.view.dtype, aten.select.int, aten.slice.Tensor, aten.permute.default, aten.t.default),
    *(aten.clone.default, aten.alias.default, aten.detach.default, aten.transpose.int, aten.expand.default),
    *(aten.bitwise_or.Tensor, aten.bitwise_right_shift.Tensor_Scalar, aten.unsqueeze.default, aten.squeeze.dim),
}


def where(node: Node) -> str:
    """Path of the innermost module that the node was traced in, or else the user's line."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, _ = list(stack.values())[-1]
        if module_path(path) != ROOT:
            return module_path(path)
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{Path(file).name}:{line}" for file, line in frames if "/torch/" not in file]
    return f"{ROOT} {own[-1]}" if own else ROOT


def origin(node: Node, names: Mapping[Node, str]) -> str:
    """Name of the graph input that an operand is a view of, or the node's own."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return names.get(node, node.name)


def users_of_views(node: Node) -> Iterator[Node]:
    """What reads a node's values, itself or through views of it."""
    for user in node.users:
        if user.op == "call_function" and user.target in _VIEWS:
            yield from users_of_views(user)
        else:
            yield user
