"""What the user decides about the arithmetic of the products, whatever their graph and their tensors say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from .activations import is_view
from .emitter import Emitter
from .nodes import arguments, is_size, put_arguments
from .place import where
from .quantise import mode_of, set_activations

prims = torch.ops.prims
nvfp4 = torch.ops.fx_nvfp4
PRODUCTS = tuple(getattr(nvfp4, name).default for name in ("linear", "batched", "indexed", "grouped"))
_MOE = nvfp4.moe.default


@dataclass(frozen=True)
class Settings:
    """Defaults are what the checkpoint says.

    lift: replace whole MoE blocks by one op where that is proven right.
    activations: where the model does not quantise them itself: "checkpoint", as the packed tensor says; "nvfp4", also
        those of weight-only weights, dynamically; "none", not at all.
    as_written: leave a site alone whose own formula rounds earlier than our op would.
    out_dtype: what products, or whole blocks, are rounded to, instead of the graph's dtype.
    shared_scales: "vllm": one activation scale for all experts, and gate's weight scale for up too.
    check_finite: raise where activations that are quantised are NaN or infinite.
    """

    lift: bool = True
    activations: str = "checkpoint"
    as_written: bool = False
    out_dtype: torch.dtype | None = None
    shared_scales: str | None = None
    check_finite: bool = False


def apply_activations(op: Node, wanted: str) -> str:
    """Set how an op quantises activations that the model does not; returns what decided it."""
    if wanted == "none" and _quantises(op):
        _leave_alone(op)
        return "option"
    if wanted == "nvfp4" and _round_the_rest(op):
        return "option"
    return "tensor" if _quantises(op) else ""


def _quantises(op: Node) -> bool:
    return mode_of(op) != "none" or getattr(arguments(op), "down_activations", "none") != "none"


def _leave_alone(op: Node) -> None:
    """Up products first; a whole block's down product too."""
    set_activations(op, None, "none", arguments(op).dialect)
    _set_down(op, "none")


def _round_the_rest(op: Node) -> bool:
    """Give a dynamic scale to products whose activations are left alone; whether there are any."""
    up = mode_of(op) == "none"
    if up:
        set_activations(op, None, "dynamic", arguments(op).dialect)
    down = getattr(arguments(op), "down_activations", "") == "none"
    if down:
        _set_down(op, "dynamic")
    return up or down


def _set_down(op: Node, mode: str) -> None:
    """Of a whole block; nothing of another op."""
    if op.target is _MOE:
        given = arguments(op)
        given.down_activations, given.down_act_scale = mode, None
        put_arguments(op, given)


def adjust_products(graph: fx.Graph, settings: Settings) -> list[str]:
    """Apply what concerns products and blocks one by one, blocks lifted; notes on what was left out."""
    notes: dict[str, None] = {}
    for op in [n for n in graph.nodes if n.target in (*PRODUCTS, _MOE)]:
        if settings.check_finite and _quantises(op):
            _check_finite(graph, op)
        if settings.out_dtype is not None and (why := _cast_result(graph, op, settings.out_dtype)):
            notes[f"{where(op)}: out_dtype={settings.out_dtype} is left out: {why}"] = None
    if notes or settings.check_finite or settings.out_dtype is not None:
        graph.eliminate_dead_code()
        graph.lint()
    return list(notes)


def _check_finite(graph: fx.Graph, op: Node) -> None:
    """Look at an op's activations before it rounds them, which turns NaN into 6."""
    emit = Emitter(graph, op)
    with graph.inserting_before(op):
        if op.target is _MOE:
            x = emit(nvfp4.check_finite_block.default, *op.args, **op.kwargs, site=where(op))
        else:
            x = emit(nvfp4.check_finite.default, op.args[0], where(op))
    op.args = (x, *op.args[1:])


def _cast_result(graph: fx.Graph, op: Node, dtype: torch.dtype) -> str:
    """Round an op's result to dtype instead of to the graph's, or say why not."""
    own = op.meta["val"].dtype
    if own == dtype:
        return ""
    if dtype == torch.float32:
        return _widen(graph, op)
    if own != torch.float32:
        return f"the graph's {own} does not hold all numbers of that dtype"
    emit = Emitter(graph, op)
    with graph.inserting_after(op):
        rounded = emit(nvfp4.round_to.default, op, str(dtype).removeprefix("torch."))
    op.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
    return ""


def _widen(graph: fx.Graph, op: Node) -> str:
    """Where the graph casts the result at once: the op on activations in fp32, whose sum is not rounded again."""
    given, readers = arguments(op), list(_readers(op))
    if not readers or not all(_is_cast_to_float32(node) or is_view(node) for node in readers):
        return f"the graph takes the result as {op.meta['val'].dtype}, not cast to float32"
    if op.target is _MOE:
        op.kwargs = {**op.kwargs, "out_dtype": torch.float32}
    elif given.activations != "none" and given.dialect == "compressed-tensors":
        return "the compressed-tensors rule rounds by the dtype of the activations"
    else:
        emit = Emitter(graph, op)
        with graph.inserting_before(op):
            op.args = (emit.cast(given.x, torch.float32), *op.args[1:])
    for node in (op, *readers):
        if _is_cast_to_float32(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        else:
            node.meta["val"] = node.meta["val"].float()
    return ""


def _readers(node: Node) -> Iterator[Node]:
    """What reads a tensor, itself or by views of it; each before what reads it."""
    for user in list(node.users):
        if is_size(user):
            continue
        yield user
        if is_view(user):
            yield from _readers(user)


def _is_cast_to_float32(node: Node) -> bool:
    return node.target is prims.convert_element_type.default and node.args[1] == torch.float32
