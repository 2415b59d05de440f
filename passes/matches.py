"""What the report says of each op that takes packed weights: one row a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from fx_nvfp4.layouts import is_tiled
from fx_nvfp4.report import Match

from .nodes import arguments, hint, shape_of, weight_shape
from .place import origin, where

_MOE = torch.ops.fx_nvfp4.moe.default
_PRODUCTS = ("linear", "batched", "indexed", "grouped", "input_grad")
_OPS = {getattr(torch.ops.fx_nvfp4, name).default: name for name in _PRODUCTS}
# How a product got its weight: what the graph spelled, and notes on that.
Source = tuple[str, tuple[str, ...]]
_AS_IT_IS: Source = ("packed tensor", ())


def matches_of_products(
    graph: fx.Graph, names: Mapping[Node, str], sources: Mapping[Node, Source]
) -> dict[Node, Match]:
    """One for each product; sources: those whose dequantisation the graph spelled."""
    return {n: _match(n, names, *sources.get(n, _AS_IT_IS)) for n in graph.nodes if n.target in _OPS}


def matches_of_blocks(graph: fx.Graph, names: Mapping[Node, str]) -> dict[Node, list[Match]]:
    """For each moe op in the graph, one for each of its weights."""
    return {n: _moe_matches(n, names) for n in graph.nodes if n.target is _MOE}


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
