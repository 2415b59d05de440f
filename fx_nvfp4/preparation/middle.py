"""TEMPORARY middle analysis until the lift's arrives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from ..activation.names import _KNOWN
from ..activation import parse
from .record import Unsuited

aten = torch.ops.aten
LINEAR = torch.ops.fx_nvfp4.linear.default


@dataclass(frozen=True)
class Middle:
    up: tuple[Node, ...]
    down: Node
    up_bias: tuple[Node | None, ...]
    down_bias: Node | None
    activation: str
    layout: str


def _bias(node: Node) -> tuple[Node, Node | None]:
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor:
        other = [a for a in users[0].args if a is not node][0]
        if isinstance(other, Node) and other.meta["val"].dim() == 1:
            return users[0], other
    return node, None


def find_middle(graph: fx.Graph) -> Middle:
    ops = [n for n in graph.nodes if n.target is LINEAR]
    out = next(n for n in graph.nodes if n.op == "output").args[0]
    if isinstance(out, (list, tuple)):
        out = out[0]
    if len(ops) not in (2, 3):
        raise Unsuited(f"its experts have {len(ops)} packed products", "experts are up, activation, down")
    *ups, down = ops
    end, down_bias = _bias(down)
    if end is not out:
        raise Unsuited("its experts do more after the down product")
    starts = [_bias(u) for u in ups]
    n = [s.meta["val"].shape[-1] for s, _ in starts]
    inter = down.args[0].meta["val"].shape[-1]
    rows = starts[0][0].meta["val"].shape[0]
    order = {id(s): i for i, (s, _) in enumerate(starts)}

    def run(values):
        env = {s: v for (s, _), v in zip(starts, values)}

        def of(node):
            if node not in env:
                if node.op == "placeholder" or node.target is LINEAR:
                    raise Unsuited("more than a function of its up products")
                a, k = fx.map_arg((node.args, node.kwargs), of)
                env[node] = node.target(*a, **k)
            return env[node]

        return of(down.args[0]).float()

    dtype = starts[0][0].meta["val"].dtype
    torch.manual_seed(0)
    values = [torch.randn(rows, k, dtype=dtype) * 3 for k in n]
    h = run(values)
    if len(ups) == 2:
        layouts = {"separate": (values[0], values[1])}
    elif n[0] == inter:
        layouts = {"plain": (None, values[0])}
    else:
        layouts = {"concatenated": values[0].chunk(2, -1), "interleaved": (values[0][:, ::2], values[0][:, 1::2])}
    for layout, (g, u) in layouts.items():
        for _, text in _KNOWN:
            for t in {text, text.replace("g", "#").replace("si#", "sig").replace("u", "g").replace("#", "u")} if layout != "plain" and text.count("g") else {text}:
                try:
                    e = parse(t)
                except ValueError:
                    continue
                if ("g" in e.names) != (layout != "plain"):
                    continue
                if torch.allclose(e.evaluate(g, u).to(dtype).float(), h, rtol=0.02, atol=0.02):
                    return Middle(tuple(ups), down, tuple(b for _, b in starts), down_bias, t, layout)
    raise Unsuited("unknown activation")
