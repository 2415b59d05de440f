"""Replaces whole mixture-of-experts blocks by one op.

Before:  sort -> gather -> grouped -> silu, mul -> grouped -> index_put -> mul -> sum
After:   fx_nvfp4.moe(x, ids, weights, up parts, down parts, "silu(g) * u", "concatenated")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fx_nvfp4 import report

from .block import Block, Candidate, Unit
from .emitter import CannotRewriteError, Emitter, shape
from .expert_ids import count_from_zero
from .expert_products import own_parts
from .found import Almost, Refused
from .known import Known
from .nodes import arguments, same_size, shape_of, weight_shape
from .place import origin, where
from .rounding import result_dtype
from .search import candidates, find_units, why_none, why_trained

aten = torch.ops.aten
moe = torch.ops.fx_nvfp4.moe.default

_PREPARE = "fx_nvfp4.prepare(model) makes them one weight, in place"


@dataclass(frozen=True)
class Lifted:
    """entries: one for each block. products: op nodes that are part of a moe op now."""

    entries: list[report.Block]
    products: frozenset[Node]


def lift(graph: fx.Graph, names: Mapping[Node, str]) -> Lifted:
    """Replace every block that is proven to be one; the others stay as they are, with the reason.

    Args:
        graph: with products rewritten to fx_nvfp4 ops.
        names: what placeholders are called in the user's model.
    """
    entries = [_fused_entry(n, names) for n in graph.find_nodes(op="call_function", target=moe)]
    products: set[Node] = set()
    known = Known()
    found = [(units, _find(units, known)) for units in find_units(graph)]  # before any of them is replaced
    replaced: dict[Node, Node] = {}
    for units, block in found:
        if isinstance(block, Block):
            try:
                out = _emit(graph, block, replaced)
            except CannotRewriteError as error:
                block = Refused(error.reason, error.advice)
            else:
                replaced[block.candidate.out] = out
                products.update(p.node for unit in units for p in unit.products)
        entries.append(_entry(units, block, names))
    graph.eliminate_dead_code()
    graph.lint()
    return Lifted(entries, frozenset(products))


def _find(units: tuple[Unit, ...], known: Known) -> Block | Refused:
    """The block of some units, or why there is none: the reason of the one nearest to a block."""
    if units[0].down.experts == 0:
        return Refused(f"its {len(units)} experts are weights by themselves", _PREPARE)
    if len(units) > 1 and sorted(u.expert or 0 for u in units) != list(range(units[0].down.experts)):
        used, all_of = [u.expert for u in units], units[0].down.experts
        return Refused(f"of {all_of} experts {used} are multiplied, in products of their own", "use each expert once")
    reason: Refused | None = None
    for candidate in candidates(units):
        found = known.prove(candidate)
        if isinstance(found, Block):
            return found
        if reason is None or (isinstance(found, Almost) and not isinstance(reason, Almost)):
            reason = found
    return why_trained(units) or reason or why_none(units)


def _entry(units: tuple[Unit, ...], block: Block | Refused, names: Mapping[Node, str]) -> report.Block:
    first = units[0]
    at, style = where(first.down.node), first.down.kind if len(units) == 1 else "one expert's"
    experts = first.down.experts or len(units)
    if isinstance(block, Refused):
        return report.Block(at, False, experts, style=style, reason=block.reason, advice=block.advice)
    weights = tuple(dict.fromkeys(origin(p.parts[0], names) for p in first.products))
    activation, slots = block.gating.activation, block.candidate.slots
    return report.Block(at, True, experts, slots, activation, "dense" if block.dense else style, weights=weights)


def _fused_entry(node: Node, names: Mapping[Node, str]) -> report.Block:
    """Of an op that the model has called itself."""
    a = arguments(node)
    weights = tuple(origin(codes, names) for codes in (*a.up_qdata, a.down_qdata))
    experts, slots = shape_of(a.down_qdata)[0], shape_of(a.ids)[1]
    return report.Block(where(node), True, experts, slots, a.activation, "fused", weights=weights)


def _emit(graph: fx.Graph, block: Block, replaced: Mapping[Node, Node]) -> Node:
    """Put the op in place of a block's end."""
    c = block.candidate
    emit = Emitter(graph, c.out)
    try:
        with graph.inserting_before(c.out):
            x = emit.cast(emit.reshape(replaced.get(c.x, c.x), [-1, c.k]), c.units[0].ups[0].x.meta["val"].dtype)
            ids = _ids(emit, c)
            out = emit(moe, x, ids, _weights(emit, c, ids), **_operands(emit, block))
            result = emit.cast(emit.reshape(out, _sizes(emit, c)), c.out.meta["val"].dtype)
    except CannotRewriteError:
        emit.undo()
        raise
    c.out.replace_all_uses_with(result)
    return result


def _sizes(emit: Emitter, c: Candidate) -> list[Any]:
    """The sizes of out as arguments, taken from x where several are symbols."""
    sizes = shape(c.out)
    if sum(isinstance(size, torch.SymInt) for size in sizes) <= 1:
        return [-1 if isinstance(size, torch.SymInt) else size for size in sizes]
    known = [*enumerate(shape(c.x))]
    found: list[Any] = []
    for size in sizes:
        dim = next((d for d, s in known if same_size(s, size)), None)
        if not isinstance(size, int) and dim is None:
            raise CannotRewriteError(f"the result's sizes {sizes} are not those of x", "keep the tokens' dims")
        found.append(size if isinstance(size, int) else emit.size(c.x, dim))  # type: ignore[arg-type]
    return found


def _ids(emit: Emitter, c: Candidate) -> Node:
    """Ids [T, A], counted from 0 where indexing also counted from the end."""
    ids = emit.reshape(c.ids, [-1, c.slots])
    return count_from_zero(emit, ids, c.experts) if c.wraps else ids


def _weights(emit: Emitter, c: Candidate, ids: Node) -> Node:
    """Weights [T, A]."""
    if c.weights is None:
        size = emit.size(ids, 0)
        device, dtype = c.x.meta["val"].device, torch.float32
        return emit(aten.full.default, [size, c.slots], 1.0, dtype=dtype, device=device, pin_memory=False)
    if not c.per_expert:
        return emit.reshape(c.weights, [-1, c.slots])
    inside = emit(aten.clamp_max.default, emit(aten.clamp_min.default, emit.cast(ids, torch.int64), 0), c.experts - 1)
    return emit(aten.gather.default, emit.reshape(c.weights, [-1, c.experts]), 1, inside)


def _operands(emit: Emitter, block: Block) -> dict[str, Any]:
    """The op's arguments from the up weights on."""
    c, gating = block.candidate, block.gating
    ups, down = [up.product for up in gating.ups], c.units[0].down
    quantised = [p for p in (*ups, down) if p.activations != "none"]
    if len({p.activations for p in ups}) > 1 or len({p.dialect for p in quantised}) > 1:
        raise CannotRewriteError("products of one block quantise activations differently", "give them one rule")
    down_parts = down.parts if down.kind == "linear" else own_parts(down)
    for part, rows in ((down_parts[0], down.rows), *((up.parts[0], None) for up in gating.ups)):
        whole = weight_shape(part)
        if len(whole) != 3 or rows not in (None, whole[1]):
            raise CannotRewriteError(f"only some rows of a weight {list(whole)} are used", "use all of them")
    names = ("qdata", "block_scale", "global_scale")
    parts: dict[str, Any] = {f"up_{name}": [up.parts[i] for up in gating.ups] for i, name in enumerate(names)}
    parts.update({f"down_{name}": part for name, part in zip(names, down_parts, strict=True)})
    up_bias = None
    if any(up.bias for up in gating.ups):
        up_bias = [_bias(emit, up.bias, c, weight_shape(up.parts[0])[1]) for up in gating.ups]
    down_bias = _bias(emit, block.down_biases[0], c, down.rows) if block.down_biases else None
    return {
        **parts,
        "activation": gating.activation,
        "layout": gating.layout,
        "up_bias": up_bias,
        "down_bias": down_bias,
        "up_act_scale": [up.act_scale for up in ups] if ups[0].act_scale is not None else None,
        "down_act_scale": down.act_scale,
        "up_activations": ups[0].activations,
        "down_activations": down.activations,
        "dialect": quantised[0].dialect if quantised else "hardware",
        "weighted": block.weighted,
        "out_dtype": result_dtype(c),  # by its readers, which no proof knows
    }


def _bias(emit: Emitter, bias: Node | None, c: Candidate, rows: int) -> Node:
    """A bias [E, rows] in x's dtype or float32; zeros for a half that has none."""
    if bias is None:
        return emit.full([c.experts, rows], 0.0, c.x)
    allowed = (torch.float32, c.units[0].ups[0].x.meta["val"].dtype)
    if bias.meta["val"].dtype not in allowed:
        bias = emit.cast(bias, torch.float32)
    return emit.reshape(bias, [c.experts, rows])
