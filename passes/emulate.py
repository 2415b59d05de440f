"""The pass: recognise, rewrite, verify, and write down what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from fx_nvfp4.layouts import is_tiled
from fx_nvfp4.report import Cost, Match, Refusal, Report

from .activation_sites import settle_activations
from .emitter import CannotRewriteError
from .experts import Memo, Site, find_sites
from .lift import lift as lift_blocks
from .nodes import arguments, hint, shape_of, weight_shape
from .place import origin, where
from .rewrite import rewrite
from .settings import Settings, adjust_products
from .shared_scales import share_all_scales
from .spoken import spoken
from .transformers_grad import spell_out_fallback
from .verify import find_dequantized, find_spelled, notes_on_unpacked

OP_NAMES = ("linear", "batched", "indexed", "grouped", "input_grad")
_AS_IT_IS: tuple[str, tuple[str, ...]] = ("packed tensor", ())
_MOE = torch.ops.fx_nvfp4.moe.default
_OPS = {getattr(torch.ops.fx_nvfp4, name).default: name for name in OP_NAMES}


def emulate(
    graph: fx.Graph,
    constants: Mapping[Node, Tensor],
    names: Mapping[Node, str],
    settings: Settings = Settings(),  # noqa: B008 - frozen
) -> tuple[Report, set[Node]]:
    """Rewrite every product with a packed weight in place, then whole blocks of them.

    Before:  mm(x, permute(mul(index(lut, nibbles), scales)))
    After:   fx_nvfp4.linear(x, qdata, block_scale, global_scale)

    Args:
        graph: AOTAutograd's joint or forward graph.
        constants: known values of small static placeholders.
        names: what placeholders are called in the user's model.
        settings: what the user decides.

    Returns:
        (report, placeholders whose values the rewriting relies on).
    """
    memo, cost = Memo(constants), Cost()
    with cost.stage("recognise"):
        spell_out_fallback(graph, memo)
        sites, near_misses = find_sites(graph, memo)
    known = {r.node for r in near_misses}
    sources: dict[Node, tuple[str, tuple[str, ...]]] = {}
    tables: set[Node] = set()
    refused = [Refusal(where(r.node), r.node.name, r.reason, r.advice) for r in near_misses]
    with cost.stage("rewrite"):
        as_written = []
        for site in sites:
            if settings.as_written and _rounds_early(site):
                as_written.append(
                    f"{where(site.product.node)}: left as written, the weight rounded as {site.weight.formula}"
                )
                known.add(site.weight.operand)
                continue
            try:
                done = rewrite(graph, site)
            except CannotRewriteError as error:
                refused.append(_not_served(site, error))
                known.add(site.weight.operand)
                continue
            sources[done.op] = site.weight.formula, done.notes
            tables.update(t for t in site.weight.tables if t.op == "placeholder")
        graph.eliminate_dead_code()
    with cost.stage("activations"):
        activations = settle_activations(graph, constants, settings, memo.recognise)
        refused += activations.refused
        known |= activations.packed
        tables.update(t for t in activations.tables if t.op == "placeholder")
        graph.eliminate_dead_code()
        graph.lint()
    called = [n for n in graph.nodes if n.target is _MOE]  # by the model itself, as fx_nvfp4.prepare makes it do
    matches = {n: _match(n, names, *sources.get(n, _AS_IT_IS)) for n in graph.nodes if n.target in _OPS}
    blocks = []
    if settings.lift:
        with cost.stage("lift"):
            lifted = lift_blocks(graph, names)
        blocks = lifted.entries
        matches.update({n: replace(matches[n], op="moe") for n in lifted.products})
    notes = [*as_written, *share_all_scales(graph, settings), *adjust_products(graph, settings)]
    notes += notes_on_unpacked(graph)
    blocks_of_model = {n: _moe_matches(n, names) for n in called}
    decided = activations.decided
    matched = [decided(n, m) for n, m in matches.items()]
    matched += [decided(n, row) for n, rows in blocks_of_model.items() for row in rows]
    with cost.stage("verify"):
        refused += [*find_dequantized(graph), *find_spelled(graph, memo.recognise, known)]
        refused, of_backward = _apart_from_backward(graph, refused)
    report = Report(matched, refused, blocks, [*notes, *of_backward], graphs=1, cost=cost)
    return spoken(report, names), tables


def _rounds_early(site: Site) -> bool:
    """Whether the graph's own dequantisation rounds: codes times block scales are exact, but for a global scale."""
    weight = site.weight
    return weight.global_scale is not None or math.frexp(abs(weight.factor))[0] != 0.5


def _apart_from_backward(graph: fx.Graph, refused: list[Refusal]) -> tuple[list[Refusal], list[str]]:
    """Refusals of the forward pass, and a note on the others: gradients may use dense weights without any harm."""
    backward = {n.name for n in graph.nodes if n.meta.get("partitioner_tag") == "is_backward"}
    kept = [r for r in refused if r.node not in backward]
    count = len(refused) - len(kept)
    note = f"{count} products of the backward pass use dequantised weights: gradients are right, and take their memory"
    return kept, [note] if count else []


def _not_served(site: Site, error: CannotRewriteError) -> Refusal:
    node = site.product.node
    return Refusal(where(node), node.name, f"an NVFP4 weight that no op serves: {error.reason}", error.advice)


def _moe_matches(node: Node, names: Mapping[Node, str]) -> list[Match]:
    """One for each weight of a moe op that the model calls itself."""
    a = arguments(node)
    rows = -(-math.prod(shape_of(a.ids)) // weight_shape(a.down_qdata)[0])
    x, down = a.x.meta["val"], a.down_qdata
    hidden = f"{math.prod(shape_of(a.ids))} x {weight_shape(down)[2]}"
    given = [(q, " x ".join(map(str, x.shape)), a.up_activations, (a.up_act_scale or [None])[0]) for q in a.up_qdata]
    given.append((down, hidden, a.down_activations, a.down_act_scale))
    return [
        Match(
            where=where(node),
            weight=origin(codes, names),
            op="moe",
            experts=experts,
            n=n,
            k=k,
            x=left,
            dtype=str(x.dtype).removeprefix("torch."),
            activations=_format(mode, scale, a.dialect),
            source=_source(_AS_IT_IS[0], codes),
            rows=rows,
            device=x.device.type,
        )
        for codes, left, mode, scale in given
        for experts, n, k in (weight_shape(codes),)
    ]


def _match(node: Node, names: Mapping[Node, str], source: str, notes: tuple[str, ...]) -> Match:
    left, codes = node.all_input_nodes[:2]
    x = left.meta["val"]
    *lead, n, k = weight_shape(codes)
    experts = lead[0] if lead else 0
    return Match(
        where=where(node),
        weight=origin(codes, names),
        op=_OPS[node.target],  # type: ignore[index]
        experts=experts,
        n=n,
        k=k,
        x=" x ".join(map(str, x.shape)),
        dtype=str(x.dtype).removeprefix("torch."),
        activations=_activations(node),
        source=_source(source, codes),
        notes=notes,
        rows=-(-math.prod(map(hint, x.shape[:-1])) // max(1, experts)),
        device=x.device.type,
    )


def _source(source: str, codes: Node) -> str:
    return f"{source}, tiles" if is_tiled(codes.meta["val"]) else source


def _activations(node: Node) -> str:
    a = arguments(node)  # gradients have none
    return _format(getattr(a, "activations", "none"), getattr(a, "act_scale", None), getattr(a, "dialect", "hardware"))


def _format(mode: str, scale: Any, dialect: str) -> str:
    if mode == "none":
        return "W4A16"
    per_expert = " per-expert" if isinstance(scale, Node) and scale.meta["val"].dim() else ""
    return f"W4A4 {mode}{per_expert}, {dialect} rule"
