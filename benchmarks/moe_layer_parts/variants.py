"""Everything that is timed, by name: the packed layer compiled by nvfp4_emu, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_nvfp4.backend import collect_reports
from fx_nvfp4.report import Report

from . import triton_kernels_peers, vllm_peers
from .data import Layer
from .experts import GroupedExperts, SpelledExperts, dense_weight

OURS_BOUND = 6e-3
# Weights that are rounded to bf16 before the product are off by that much more.
ROUNDED_BOUND = 1e-2

Prepare = Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]


@dataclass(frozen=True)
class Runner:
    """A variant on one layer's weights.

    call: what is timed, on what ``prepare`` makes of x, ids and routing weights; preparing is the router's part.
    """

    call: Callable[..., Tensor]
    prepare: Prepare = lambda *given: given


@dataclass(frozen=True)
class Variant:
    """One column of the table.

    format: whose exact result this is compared with; bound: the relative error allowed; note: what to know of it.
    whole: whether it does the whole layer's work, and may be called the best peer.
    """

    name: str
    build: Callable[[Layer], Runner]
    format: str = "w4a16"
    bound: float = ROUNDED_BOUND
    ours: bool = False
    whole: bool = True
    note: str = ""


def ours(format: str) -> Variant:
    """The packed layer through the backend, in one of the formats."""
    return Variant(f"ours {format}", lambda layer: Runner(Emulated(layer, format)), format, OURS_BOUND, ours=True)


class Emulated:
    """The packed layer through the backend; every compilation has to lift it, also one that more tokens bring about.

    The report of each compilation is looked at, as fx_nvfp4.explain gives it: of the very graphs that are timed.

    Raises:
        RuntimeError: a graph is not one ``fx_nvfp4.moe`` op; has the whole report.
    """

    def __init__(self, layer: Layer, format: str) -> None:
        experts = GroupedExperts(*layer.weights(format, tiled=True))
        self.compiled = torch.compile(experts, backend="nvfp4_emu", dynamic=True)
        self.report = Report()

    def __call__(self, *given: Tensor) -> Tensor:
        with collect_reports() as report:
            result = self.compiled(*given)
        self.report.extend(report)
        lifted = [block.lifted for block in self.report.blocks]
        if lifted != [True] * self.report.graphs or self.report.refused:
            raise RuntimeError(f"the layer was not lifted to one fx_nvfp4.moe op:\n{self.report.table(full=True)}")
        return result


def _dense(layer: Layer) -> Runner:
    module = GroupedExperts(dense_weight(layer.gate_up), dense_weight(layer.down))
    return Runner(torch.compile(module, dynamic=True))


def _in_graph(layer: Layer) -> Runner:
    return Runner(torch.compile(SpelledExperts(layer.gate_up, layer.down), dynamic=True))


PEERS = {
    "bf16": Variant("bf16 grouped_mm", _dense, note="bf16 weights, grouped_mm, compiled by Inductor"),
    "in-graph": Variant("dequantised in graph", _in_graph, note="all experts dequantised by Inductor at each call"),
    "vllm-emulation": Variant(
        "vLLM emulation w4a4",
        lambda layer: Runner(vllm_peers.emulation(layer), vllm_peers.prepare),
        format="w4a4-shared",
        bound=0.3,
        note="NVFP4 emulation; activations by a rule of its own, with one scale for all experts",
    ),
    "vllm-marlin": Variant("vLLM Marlin w4a16", lambda layer: Runner(vllm_peers.marlin(layer), vllm_peers.prepare)),
    "vllm-bf16": Variant(
        "vLLM bf16", lambda layer: Runner(vllm_peers.dense(layer), vllm_peers.prepare), note="bf16 weights, fused MoE"
    ),
    "matmul-ogs": Variant(
        "matmul_ogs mxfp4",
        lambda layer: Runner(triton_kernels_peers.layer_call(layer), triton_kernels_peers.prepare(layer)),
        bound=0.5,
        note="MXFP4, which is another format: block 32, coarser scales",
    ),
    "matmul-ogs-routed": Variant(
        "matmul_ogs, routed before",
        lambda layer: Runner(triton_kernels_peers.routed_call(layer), triton_kernels_peers.prepare_routed(layer)),
        bound=0.5,
        whole=False,
        note="sorted by expert beforehand: no whole layer, so never called the best",
    ),
}
