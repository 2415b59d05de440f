"""Makes gradients of x visible that transformers' fp32 grouped product computes together with those of its weight.

Before:  grouped_mm_fallback_backward(x, w, offs, grad)[0]
After:   grouped_mm_fallback(grad, w.transpose(1, 2), offs)

:mod:`.rewrite` turns the latter into `input_grad`, as it does all products that sum over a packed weight's rows.
"""

from __future__ import annotations

import torch
from torch import fx

from .emitter import Emitter
from .experts import Memo
from .found import PackedWeight

aten = torch.ops.aten
_FALLBACK_BACKWARD = "transformers::grouped_mm_fallback_backward"


def spell_out_fallback(graph: fx.Graph, memo: Memo) -> None:
    """Replace the backward op where w is packed and nobody reads its gradient, which the op computes all the same."""
    for node in list(graph.nodes):
        if not (isinstance(node.target, torch._ops.OpOverload) and node.target.name() == _FALLBACK_BACKWARD):
            continue
        results = {user.args[1]: user for user in node.users}
        dx = results.get(0)
        _, w, offs, grad = node.args
        if dx is None or 1 in results or not isinstance(memo.recognise(w), PackedWeight):
            continue
        emit = Emitter(graph, dx)
        with graph.inserting_before(dx):
            transposed = emit(aten.permute.default, w, [0, 2, 1])
            product = emit(torch.ops.transformers.grouped_mm_fallback.default, grad, transposed, offs)
        dx.replace_all_uses_with(product)
        graph.erase_node(dx)
        graph.erase_node(node)
