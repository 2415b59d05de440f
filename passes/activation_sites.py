"""How each product of a graph quantises its activations: what the model spells, what its tensor says, what is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch.fx import Node

from fx_nvfp4.report import Match, Refusal

from .activations import NearMiss, Quantisers, Spelled, holds_bytes
from .found import PackedWeight, Refused
from .nodes import arguments
from .opaque import Kept, opaque_quantiser, packer_of
from .place import where
from .quantise import TWICE, mode_of, quantise, set_activations
from .settings import PRODUCTS, Settings, apply_activations

_OURS = torch.ops.fx_nvfp4.fake_quantize.default
_OPS = (*PRODUCTS, torch.ops.fx_nvfp4.moe.default)
_NONE_OF = "activations are quantised by a formula that is none of the known rules"
_ADVICE = "see fx_nvfp4.dialects for the rules; until then they enter as the graph computes them"


@dataclass
class Sites:
    """sources: what decided each op's activations, "" where they are not quantised; apart: what rounds them before the
    op; notes, and refusals of near misses; tables: constants whose values were relied on; packed: operands that are
    dequantised from codes."""

    sources: dict[Node, str] = field(default_factory=dict)
    apart: dict[Node, str] = field(default_factory=dict)
    notes: dict[Node, tuple[str, ...]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    tables: set[Node] = field(default_factory=set)
    packed: set[Node] = field(default_factory=set)

    def decided(self, op: Node, match: Match) -> Match:
        """The record of an op, with what decided its activations."""
        notes = (*match.notes, *self.notes.get(op, ()))
        activations = self.apart.get(op) or match.activations
        return replace(match, activations=activations, activations_from=self.sources.get(op, ""), notes=notes)


def settle_activations(
    graph: fx.Graph, constants: Mapping[Node, Tensor], settings: Settings, packed: Callable[[Node], object]
) -> Sites:
    """Make every quantiser in front of a product part of it, and apply the settings to all other products.

    Args:
        packed: recognises operands that are dequantised from NVFP4 codes, which activations may be too.
    """
    sites, quantisers = Sites(), Quantisers(constants)
    for op in [n for n in graph.nodes if n.target in _OPS]:
        x = arguments(op).x
        try:
            # Asked of few: what a model's last layer multiplies is computed from everything before it.
            if holds_bytes(x) and isinstance(codes := packed(x), PackedWeight):
                sites.packed.add(x)
                _keep_packed(sites, op, packer_of(codes.qdata))
                continue
            found = opaque_quantiser(x) or quantisers.recognise(x)
        except Refused as refused:
            _refuse(sites, op, refused.reason, refused.advice)
            continue
        if isinstance(found, Spelled):
            done = quantise(graph, op, found, settings.as_written)
            sites.sources[op], sites.notes[op], sites.apart[op] = done.how, done.notes, done.apart
            sites.tables.update(found.tables)
        elif isinstance(found, NearMiss):
            _refuse(sites, op, _NONE_OF, _ADVICE)
        elif isinstance(found, Kept):
            set_activations(op, None, "none", "hardware")
            sites.sources[op] = "spelled, as written"
            sites.notes[op] = (f"activations are quantised by {found.name}, which stays as it is",)
        elif found == "ours":
            sites.notes[op] = (TWICE,) if mode_of(op) != "none" else ()
            set_activations(op, None, "none", "hardware")
            sites.sources[op] = "spelled"
        else:
            sites.sources[op] = apply_activations(op, settings.activations)
    return sites


def _keep_packed(sites: Sites, op: Node, packer: str) -> None:
    """Activations that arrive as codes are NVFP4 already."""
    set_activations(op, None, "none", "hardware")
    sites.sources[op] = "spelled, as written"
    sites.notes[op] = (f"activations are packed by {packer}, and dequantised by the graph",)


def _refuse(sites: Sites, op: Node, reason: str, advice: str) -> None:
    """What is quantised already, in whatever way, is not quantised again."""
    set_activations(op, None, "none", "hardware")
    sites.sources[op] = "spelled, as written"
    sites.refused.append(Refusal(where(op), op.name, reason, advice, dequantized=False))
