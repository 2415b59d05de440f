"""Makes recognised quantisers of activations part of the product behind them, or one op.

Before:  y = view(round_to_e2m1(blocks * g / scale) * scale / g);  linear(y, *weight)
After:   linear(x, *weight, act_scale=1 / g, "static", "hardware")

The product then multiplies codes by block scales, exactly, and applies the global scale once to the fp32 sum, where the
graph as written rounds code * scale * global scale to x's dtype first. One op `fake_quantize` stands in its place where
the product has no such argument, or where the graph's own rounding is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from fx_nvfp4.format import TWO_LEVEL_MAX

from .activations import Spelled, is_view
from .emitter import Emitter, shape
from .nodes import arguments, put_arguments, same_size
from .sample import inputs_of

aten = torch.ops.aten
nvfp4 = torch.ops.fx_nvfp4

_MOE = nvfp4.moe.default
TWICE = "the model quantises these activations itself, so that the scale of the packed tensor is not applied as well"


@dataclass(frozen=True)
class Quantised:
    """What became of a spelled quantiser: which way it went, and what a user may want to know.

    apart: what it is, where an op or the graph rounds before the product, whose own arguments do not say so.
    """

    how: str
    notes: tuple[str, ...]
    apart: str = ""


def quantise(graph: fx.Graph, op: Node, found: Spelled, as_written: bool) -> Quantised:
    """Replace the quantiser in front of an op; its operand is rounded once, also where the op's weight asks for it."""
    notes = (TWICE,) if mode_of(op) != "none" else ()
    set_activations(op, None, "none", "hardware")
    if not as_written and _fits(op, found):
        _absorb(graph, op, found)
        return Quantised("spelled", (*notes, *_differences(found)))
    if as_written and not (found.rule.signs and found.rule.special):
        return Quantised("spelled, as written", notes, _describe(found))
    _replace(graph, found)
    how = "spelled, as written" if as_written else "spelled"
    return Quantised(how, (*notes, *_differences(found)), _describe(found))


def _describe(found: Spelled) -> str:
    per = "" if found.cut.per == "tensor" else f" per-{found.cut.per}"
    return f"W4A4 {'dynamic' if found.cut.computed else 'static'}{per}, {found.rule.dialect} rule"


def _differences(found: Spelled) -> tuple[str, ...]:
    """What is not as in the graph, besides roundings that are left out."""
    if found.rule.special:
        return ()
    return (f"NaN and infinities among activations follow the {found.rule.dialect} rule, not the graph's",)


def set_activations(op: Node, scale: Node | None, mode: str, dialect: str) -> None:
    """Give a product, or the up product of a block that the model calls itself, a quantiser of its activations."""
    given = arguments(op)
    if op.target is _MOE:
        given.up_activations, given.up_act_scale = mode, None if scale is None else [scale] * len(given.up_qdata)
    else:
        given.act_scale, given.activations = scale, mode
    given.dialect = dialect if op.target is not _MOE else given.dialect
    put_arguments(op, given)


def mode_of(op: Node) -> str:
    """How a product, or the up product of a block, quantises its activations."""
    given = arguments(op)
    return str(getattr(given, "activations", getattr(given, "up_activations", "none")))


def _fits(op: Node, found: Spelled) -> bool:
    """Whether the op's arguments can say what the quantiser does."""
    cut = found.cut
    dtypes = {found.rule.dtype, *(n.meta["val"].dtype for n in (cut.x, cut.out, *found.moves))}
    if op.target is _MOE or len(dtypes) > 1 or not _keep_rows(found):
        return False
    if cut.per == "tensor":
        return True
    if not all(map(is_view, found.moves)):
        return False  # a row may have another scale then
    if cut.per == "expert":
        return op.target is nvfp4.batched.default
    return op.target is nvfp4.indexed.default and _scale_by_id(op, cut.scale) is not None


def _scale_by_id(op: Node, node: Node | None) -> Node | None:
    """Scales [E], of which `node` holds the one of each row's expert."""
    while node is not None and node.target is not aten.index.Tensor:
        source = node.args[0] if node.target in (aten.view.default, aten.unsqueeze.default) else None
        node = source if isinstance(source, Node) else None
    if node is None:
        return None
    chosen, own = arguments(node), arguments(op)
    (experts,) = shape(own.qdata)[:1]
    same = len(chosen.indices) == 1 and _source(chosen.indices[0], experts) is _source(own.ids, experts)
    return chosen.self if same and shape(chosen.self) == [experts] else None


def _source(ids: Node, experts: int) -> Node:
    """What ids are a view or a copy of, one for one, or are with those below zero counted from the end."""
    while True:
        if ids.target in (aten.view.default, aten.unsqueeze.default, aten.expand.default, aten.clone.default):
            (source,) = inputs_of(ids)
            if not same_size(math.prod(shape(source)), math.prod(shape(ids))):
                return ids
        elif ids.target is aten.where.self and _counts_from_end(ids, experts):
            source = arguments(ids).other
        else:
            return ids
        ids = source


def _counts_from_end(choice: Node, experts: int) -> bool:
    """Whether a node is where(ids < 0, ids + experts, ids)."""
    below, moved, ids = choice.args
    calls = getattr(below, "target", None), getattr(moved, "target", None)
    if calls != (aten.lt.Scalar, aten.add.Tensor):
        return False
    return below.args == (ids, 0) and moved.args == (ids, experts) and not moved.kwargs  # type: ignore[union-attr]


def _keep_rows(found: Spelled) -> bool:
    """Whether every row of K that moves lead to is one that they come from: views may split rows on their way."""
    whole, k = True, shape(found.cut.x)[-1]
    for move in reversed(found.moves):
        if not is_view(move) and not (whole and _moves_rows(move)):
            return False
        whole = bool(shape(move)[-1:] == [k])
        if not is_view(move) and not whole:
            return False
    return whole


def _moves_rows(move: Node) -> bool:
    """Whether a move that is no view leaves the last dimension alone, if that keeps its size."""
    given = arguments(move)
    if move.target is aten.permute.default:
        return bool(given.dims[-1] in (-1, len(given.dims) - 1))
    return move.target is not aten.index.Tensor or len(given.indices) < len(shape(given.self))


def _absorb(graph: fx.Graph, op: Node, found: Spelled) -> None:
    x, scale = found.cut.x, found.cut.scale
    emit = Emitter(graph, op)
    with graph.inserting_before(op):
        for move in reversed(found.moves):
            x = emit(move.target, x, *move.args[1:], **move.kwargs)
        scale = _scale_by_id(op, scale) if found.cut.per == "row" else scale
        multiplier = _multiplier(emit, found, scale)
        multiplier = emit.view(multiplier, [] if found.cut.per == "tensor" else [-1])
    set_activations(op, multiplier, "static", found.rule.dialect)
    op.args = (x, *op.args[1:])


def _replace(graph: fx.Graph, found: Spelled) -> None:
    cut, rule = found.cut, found.rule
    emit = Emitter(graph, cut.out)
    with graph.inserting_before(cut.out):
        scale = _multiplier(emit, found, cut.scale)
        x, sizes = emit.cast(cut.x, rule.dtype), [emit.size(cut.x, d) for d in range(len(shape(cut.x)))]
        if cut.per == "tensor":
            y = emit(nvfp4.fake_quantize.default, x, emit.view(scale, []), rule.dialect)
        else:
            if cut.per == "expert":
                scale = emit(aten.expand.default, emit.reshape(scale, [sizes[0], 1]), sizes[:2])
            rows = emit.reshape(x, [-1, sizes[-1]])
            y = emit.reshape(emit(nvfp4.fake_quantize.default, rows, emit.reshape(scale, [-1]), rule.dialect), sizes)
        y = emit.cast(y, cut.out.meta["val"].dtype)
    cut.out.replace_all_uses_with(y)


def _multiplier(emit: Emitter, found: Spelled, scale: Node | None) -> Node:
    """The global scale as float64, which keeps the producer's own number and its reciprocal."""
    if scale is None:
        device = found.cut.x.meta["val"].device
        return emit(aten.full.default, [], found.rule.factor, dtype=torch.float64, device=device, pin_memory=False)
    if found.rule.op == "amax":
        scale = emit(aten.div.Tensor, emit.cast(scale, torch.float32), TWO_LEVEL_MAX)
    exact = emit.cast(scale, torch.float64)
    return emit(aten.reciprocal.default, exact) if found.rule.op == "divide" else exact
