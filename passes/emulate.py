"""The pass: recognise, rewrite, verify, and write down what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx
from torch.fx import Node

from fx_nvfp4.report import Cost, Refusal, Report

from .activation_sites import settle_activations
from .emitter import CannotRewriteError
from .experts import Memo, Site, find_sites
from .lift import lift as lift_blocks
from .matches import Source, matches_of_blocks, matches_of_products
from .place import where
from .rewrite import rewrite
from .settings import Settings, adjust_products
from .shared_scales import share_all_scales
from .spoken import spoken
from .transformers_grad import spell_out_fallback
from .verify import find_dequantized, find_spelled, notes_on_unpacked


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
    refused = [Refusal(where(r.node), r.node.name, r.reason, r.advice) for r in near_misses]
    with cost.stage("rewrite"):
        written = _rewrite(graph, sites, settings)
        graph.eliminate_dead_code()
    with cost.stage("activations"):
        activations = settle_activations(graph, constants, settings, memo.recognise)
        graph.eliminate_dead_code()
        graph.lint()
    of_model = matches_of_blocks(graph, names)  # moe ops that the model calls, as prepare() makes it do
    of_products = matches_of_products(graph, names, written.sources)
    blocks = []
    if settings.lift:
        with cost.stage("lift"):
            lifted = lift_blocks(graph, names)
        blocks = lifted.entries
        of_products.update({n: replace(of_products[n], op="moe") for n in lifted.products})
    notes = [*written.left, *share_all_scales(graph, settings), *adjust_products(graph, settings)]
    notes += notes_on_unpacked(graph)
    matched = [activations.decided(n, row) for n, row in of_products.items()]
    matched += [activations.decided(n, row) for n, rows in of_model.items() for row in rows]
    refused += [*written.refused, *activations.refused]
    with cost.stage("verify"):
        known = {r.node for r in near_misses} | written.dense | activations.packed
        refused += [*find_dequantized(graph), *find_spelled(graph, memo.recognise, known)]
        refused, of_backward = _apart_from_backward(graph, refused)
    report = Report(matched, refused, blocks, [*notes, *of_backward], graphs=1, cost=cost)
    tables = {t for t in (*written.tables, *activations.tables) if t.op == "placeholder"}
    return spoken(report, names), tables


@dataclass
class _Written:
    """What became of the sites: ops with their weights' spelling, tables that these rely on, and what stays dense."""

    sources: dict[Node, Source] = field(default_factory=dict)
    tables: list[Node] = field(default_factory=list)
    dense: set[Node] = field(default_factory=set)
    refused: list[Refusal] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def _rewrite(graph: fx.Graph, sites: Sequence[Site], settings: Settings) -> _Written:
    """Rewrite each site in place, but those that the user wants as they are and those that no op serves."""
    written = _Written()
    for site in sites:
        if settings.as_written and _rounds_early(site):
            place, formula = where(site.product.node), site.weight.formula
            written.left.append(f"{place}: left as written, the weight rounded as {formula}")
            written.dense.add(site.weight.operand)
            continue
        try:
            done = rewrite(graph, site)
        except CannotRewriteError as error:
            written.refused.append(_not_served(site, error))
            written.dense.add(site.weight.operand)
            continue
        written.sources[done.op] = site.weight.formula, done.notes
        written.tables += site.weight.tables
    return written


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
