"""Weights that a compiled model owns are permuted into tiles where they lie, when it is compiled first.

Dynamo has traced with the canonical layout by then, and traces again. The guards of graphs that were compiled before
fail, as the parts have other dtypes, and so have new graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .layouts import is_tiled
from .lowering import compat
from .prepack_model import tile_all
from .report import module_path
from .state_dict import keep_state_dict_canonical
from .tensor import NVFP4Weight

Inputs = dict[fx.Node, tuple[str, Any]]  # placeholder -> its name as Dynamo has it, and its value
# Codes of a packed weight that is a parameter or buffer. A module's own tensors may be called so, and are not touched:
# the module may read them as they were, and stores them.
_CODES_OF_A_WEIGHT = re.compile(r"_(parameters|buffers)\[[^\[\]]+\]\.qdata")
# The end of a source's name, behind that of the module.
_HELD = re.compile(r"\._(parameters|buffers)\[[^\[\]]+\](\.qdata)?$")
_MOE = (torch.ops.fx_nvfp4.moe, torch.ops.fx_nvfp4.moe.default)  # Dynamo keeps the call as the model writes it


def tile_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], everywhere: bool) -> list[str]:
    """Permute the packed parameters and buffers of a Dynamo graph for which kernels read tiles, or all of them.

    Also those of which the graph sees the parts alone, as :class:`fx_nvfp4.fused.FusedExperts` gives them to its op.
    Tiles are for weights on a GPU that show 16 bits, in graphs without gradients; others would be unpacked at each
    call. Does not return where there were any: see :func:`compat.trace_again`.

    Returns:
        Why those that are in the canonical layout stay so.
    """
    if not compat.can_trace_again() or (_differentiates(example_inputs) and not everywhere):
        return []
    placeholders = gm.graph.find_nodes(op="placeholder")
    owned: Inputs = {
        node: (name, value)
        for node, value, (name, _), is_owned in zip(
            placeholders, example_inputs, compat.input_sources(gm), compat.owned_inputs(gm), strict=False
        )
        if is_owned
    }
    weights = [*owned.values(), *_given_to_blocks(gm.graph, owned)]
    done = tile_all((module_path(name), w) for name, w in weights if _is_whole(w) and (everywhere or _gains(w)))
    if done.converted:
        _keep_state_dicts(owned)
        compat.trace_again("packed weights were permuted into tiles")
    return [f"not in tiles: {reason}" for reason in dict.fromkeys(done.left.values())]


def _keep_state_dicts(owned: Inputs) -> None:
    """What modules store stays as it was, though the weights that they hold were permuted."""
    variables = compat.frame_variables()
    for name, _ in owned.values():
        module = _evaluated(_HELD.sub("", name), variables) if _HELD.search(name) else None
        if isinstance(module, nn.Module):
            keep_state_dict_canonical(module)


def _evaluated(name: str, variables: dict[str, Any]) -> Any:
    """What a source's name stands for, as guards look it up; None where that takes more than the frame's variables."""
    try:
        return eval(name, {}, variables)
    except Exception:  # a version of Dynamo that means it otherwise
        return None


def _given_to_blocks(graph: fx.Graph, owned: Inputs) -> Iterator[tuple[str, NVFP4Weight]]:
    """The weights whose parts the model hands to the moe op; they are the tensors that its packed weights hold."""
    for node in graph.nodes:
        if node.target not in _MOE:
            continue
        call = _by_name(node)
        up = zip(call["up_qdata"], call["up_block_scale"], call["up_global_scale"], strict=True)
        for parts in (*up, (call["down_qdata"], call["down_block_scale"], call["down_global_scale"])):
            if not all(part in owned and all(user.target in _MOE for user in part.users) for part in parts):
                continue
            name, codes = owned[parts[0]]
            scale, row_scale = (owned[part][1] for part in parts[1:])
            if _CODES_OF_A_WEIGHT.search(name) and compat.is_real(codes) and scale.dtype == torch.float8_e4m3fn:
                dtype = call["x"].meta["example_value"].dtype
                yield name.removesuffix(".qdata"), NVFP4Weight(codes, scale, row_scale, dtype)


def _by_name(call: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in torch.ops.fx_nvfp4.moe.default._schema.arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _differentiates(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _gains(weight: NVFP4Weight) -> bool:
    return _on_gpu(weight) and weight.dtype.itemsize == 2


def _on_gpu(weight: NVFP4Weight) -> bool:
    return weight.is_cuda


def _is_whole(value: Any) -> bool:
    """Whether a graph input is a canonical weight with values, and no view of chosen experts."""
    whole = isinstance(value, NVFP4Weight) and value.expert_ids is None
    return whole and not is_tiled(value.qdata) and compat.is_real(value.qdata)
