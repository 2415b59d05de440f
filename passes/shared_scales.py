"""The scales that vLLM's fused experts use where those of a checkpoint differ, to reproduce what it computes.

Before:  moe(act_scale [E], gate's and up's global scales [E, N])
After:   moe(act_scale.amax() for all experts, gate's global scale for both)

Not what the checkpoint says: a published model's gate and up scales differ by up to 10x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .emitter import Emitter, shape
from .nodes import arguments, put_arguments, weight_shape
from .place import where
from .settings import PRODUCTS, Settings

aten = torch.ops.aten
_MOE = torch.ops.fx_nvfp4.moe.default


def share_all_scales(graph: fx.Graph, settings: Settings) -> list[str]:
    """Change every op of experts, if the settings say so; notes on what was changed, and why something was not."""
    if settings.shared_scales is None:
        return []
    ops = [
        n for n in graph.nodes if n.target is _MOE or (n.target in PRODUCTS and weight_shape(arguments(n).qdata)[2:])
    ]
    return list(dict.fromkeys(f"{where(op)}: {_share_scales(graph, op)}" for op in ops))


def _share_scales(graph: fx.Graph, op: Node) -> str:
    if op.target is not _MOE:
        return "shared_scales='vllm' is left out: only a block that is one op tells gate from up"
    given, emit = arguments(op), Emitter(graph, op)
    with graph.inserting_before(op):
        _share_activations(emit, given)
        given.up_global_scale = _gates(emit, given.layout, list(given.up_global_scale))
    put_arguments(op, given)
    done = ["one activation scale, the largest, for all experts"] * _has_scales(given)
    done += ["gate's weight scale for up"] * (given.layout != "plain")
    if not done:
        return "shared_scales='vllm' changes nothing: no static activation scales, and up has no gate"
    return f"as vLLM, not as the checkpoint: {'; '.join(done)}"


def _has_scales(given: Any) -> bool:
    return bool(given.up_act_scale) or given.down_act_scale is not None


def _share_activations(emit: Emitter, given: Any) -> None:
    if given.up_act_scale:
        largest = [emit(aten.amax.default, scale, []) for scale in given.up_act_scale]
        both = largest[0] if len(largest) == 1 else emit(aten.maximum.default, *largest)
        given.up_act_scale = [both] * len(largest)
    if given.down_act_scale is not None:
        given.down_act_scale = emit(aten.amax.default, given.down_act_scale, [])


def _gates(emit: Emitter, layout: str, scales: list[Node]) -> list[Node]:
    """Global scales with gate's in the place of up's."""
    if layout == "plain":
        return scales
    if layout == "separate":
        return [scales[0], scales[0]]
    (both,) = scales
    experts, rows = shape(both)
    if layout == "concatenated":
        gate = emit(aten.slice.Tensor, both, 1, 0, rows // 2)
        return [emit(aten.cat.default, [gate, gate], 1)]
    gate = emit(aten.slice.Tensor, both, 1, 0, rows, 2)
    pairs = emit(aten.expand.default, emit(aten.unsqueeze.default, gate, 2), [experts, rows // 2, 2])
    return [emit(aten.clone.default, emit.reshape(pairs, [experts, rows]), memory_format=torch.contiguous_format)]
