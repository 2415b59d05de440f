"""Nothing packed is left unexplained: finds weights that a graph still dequantises."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fx_nvfp4.report import Refusal

from .place import where


def find_dequantized(graph: fx.Graph) -> Iterator[Refusal]:
    """Packed tensors that the graph makes dense, by a call of theirs or for a product that no op serves."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.fx_nvfp4.dequantize.default):
        shape = list(node.all_input_nodes[0].meta["val"].shape)
        users = ", ".join(sorted({str(user.target) for user in node.users}))
        yield Refusal(
            where(node),
            node.name,
            f"the packed weight {shape} is dequantised for {users or 'an output'}",
            "use it in a matrix product that contracts K, or drop the call of dequantize()",
        )
