"""Fuses one list of experts: what its module computes is recorded, rewritten around one call, and proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..fused import BIAS, DOWN_NAME, UP_NAMES, FusedExperts
from ..report import ROOT
from ..tensor import NVFP4Weight
from .candidates import ExpertList, find_parents, structure
from .combine import find_combines
from .expert import ExpertPlan, leaves_of
from .forwards import Variant, prepared_class, source_of
from .rebuild import Found, rebuild
from .record import FusedList, Unsuited, join, replace_module
from .recorder import untouched
from .routing import find_routing
from .stack import Stack
from .verify import check_expert, check_real, check_synthetic, real_outputs

# Leading dims of the inputs of the two recordings; sizes are told apart by them, so they share no factor.
_RECORDED: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {3: ((3, 7), (5, 11)), 2: ((21,), (55,))}
_CHECKED: dict[int, tuple[tuple[int, ...], ...]] = {3: ((1, 1), (2, 48)), 2: ((1,), (96,))}
_LARGE = 32.0  # times the usual: where weights come near to 0 and 1, and thresholds show
_SAMPLED = 4  # experts of each list that are compared one by one


@dataclass(frozen=True)
class Forwards:
    """The forwards of one kind of module: their sources, by mode and rank of the input."""

    sources: tuple[tuple[Variant, str], ...]
    top_k: int
    weighted: str
    width: int


@dataclass
class Memo:
    """What equal layers share."""

    plans: dict[Hashable, ExpertPlan | Unsuited] = field(default_factory=dict)
    forwards: dict[Hashable, Forwards] = field(default_factory=dict)


def fuse(model: nn.Module, found: ExpertList, memo: Memo) -> FusedList:
    """Fuse a list of experts in place.

    Raises:
        Unsuited: it stays as it is, and computes what it did.
    """
    found = replace(found, dtype=_dtype(found.experts[0], model))
    plan = _plan(found, memo)
    for name, expert in zip(found.container._modules, found.experts, strict=True):
        plan.check_tables(name, expert)
    reasons: list[Unsuited] = []
    for parent_path in find_parents(model, found.path):
        parent = model.get_submodule(parent_path)
        try:
            return _fuse_in(model, parent_path, parent, found, plan, memo)
        except Unsuited as reason:
            reasons.append(reason)
    if reasons:
        raise reasons[0]
    advice = "give the owner of the list a forward(hidden_states)"
    raise Unsuited("no module around it takes hidden states alone", advice)


def _plan(found: ExpertList, memo: Memo) -> ExpertPlan:
    dtype = found.dtype
    key = structure(found.experts[0]), dtype
    if key not in memo.plans:
        try:
            memo.plans[key] = ExpertPlan(found.experts[0], dtype)
        except Unsuited as reason:
            memo.plans[key] = reason
    plan = memo.plans[key]
    if isinstance(plan, Unsuited):
        raise plan
    return plan


def _fuse_in(
    model: nn.Module, parent_path: str, parent: nn.Module, found: ExpertList, plan: ExpertPlan, memo: Memo
) -> FusedList:
    path = found.path[len(parent_path) + 1 :] if parent_path else found.path
    if "forward" in vars(parent):
        raise Unsuited(
            f"{parent_path or ROOT} has a forward of its own, which its class does not know",
            "prepare() before another library (accelerate) replaces forwards",
        )
    with untouched(parent, found.experts):
        forwards = _forwards(parent, path, found, plan, memo)
        fused, names = _exchange(parent, path, found, plan, forwards)
    replace_module(parent, path, fused)
    parent.__class__ = prepared_class(type(parent), forwards.sources)
    where = parent_path or ROOT
    return FusedList(found.path, where, len(found.experts), forwards.top_k, plan.activation, names)


def _exchange(
    parent: nn.Module, path: str, found: ExpertList, plan: ExpertPlan, forwards: Forwards
) -> tuple[FusedExperts, dict[str, tuple[str, ...]]]:
    """Move the experts' weights into a fused module, which is then compared with what they gave.

    Returns:
        The module, and its parameters' names before.

    Raises:
        Unsuited: it gives something else; the weights are back in their places.
    """
    dtype, rank = found.dtype, forwards.sources[0][0][1]
    inputs = [_random(shape, forwards.width, found) for shape in (_RECORDED[rank][0], _CHECKED[rank][0])]
    probe = _random((2,), plan.in_features, found)
    sampled = {*range(0, len(found.experts), max(1, len(found.experts) // _SAMPLED)), len(found.experts) - 1}
    alone = {e: real_outputs(found.experts[e], [probe]) for e in sampled}
    together = real_outputs(parent.forward, inputs)
    quantized = any(p.activations != "none" for p in plan.products)
    names = _names(found, plan)
    stack = Stack(plan, found.experts)
    try:
        fused = stack.module(dtype, forwards.weighted).train(parent.training)
        for e, outputs in alone.items():
            check_expert(fused, e, probe, outputs, quantized)
        run = prepared_class(type(parent), forwards.sources)._variants[parent.training, rank]  # type: ignore[attr-defined]
        replace_module(parent, path, fused)
        check_real(together, real_outputs(lambda x: run(parent, x), inputs), quantized)
    except Exception:
        stack.undo()
        raise
    finally:
        replace_module(parent, path, found.container)
    return fused, names


def _forwards(parent: nn.Module, path: str, found: ExpertList, plan: ExpertPlan, memo: Memo) -> Forwards:
    """The parent's forwards: those of an equal layer where they hold for this one, else derived anew."""
    key = type(parent), path, structure(found.experts[0]), len(found.experts), _children(parent), parent.training
    known = memo.forwards.get(key)
    if known is not None:
        try:
            for (training, rank), _ in known.sources:
                with untouched(parent, found.experts):
                    parent.train(training)
                    _check(parent, path, found, plan, known, rank, _CHECKED[rank][-1:])
            return known
        except Unsuited:
            pass
    derived = _derive(parent, path, found, plan, memo)
    memo.forwards[key] = derived
    return derived


def _derive(parent: nn.Module, path: str, found: ExpertList, plan: ExpertPlan, memo: Memo) -> Forwards:
    variants: dict[Variant, tuple[str, int, str, int]] = {}
    reasons: dict[Variant, Unsuited] = {}
    mode = parent.training
    for training in (mode, not mode):
        for rank in _RECORDED:
            try:
                with untouched(parent, found.experts):
                    parent.train(training)
                    if not _plan(found, memo).computes_as(plan):
                        raise Unsuited("its experts compute something else in training mode (dropout?)")
                    variants[training, rank] = _derive_variant(parent, path, found, plan, rank)
            except Unsuited as reason:
                reasons[training, rank] = reason
        if training == mode and not variants:
            raise next(iter(reasons.values()))
    first = next(iter(variants.values()))
    same = {variant: v for variant, v in variants.items() if v[1:] == first[1:]}
    return Forwards(tuple((variant, v[0]) for variant, v in same.items()), *first[1:])


def _derive_variant(
    parent: nn.Module, path: str, found: ExpertList, plan: ExpertPlan, rank: int
) -> tuple[str, int, str, int]:
    """(source, top_k, weighted, width) of the forward for inputs of one rank, in the parent's mode."""
    learning = [n for n, p in found.experts[0].named_parameters() if p.requires_grad]
    if parent.training and learning:
        advice = "freeze it with requires_grad_(False), or prepare() after training"
        raise Unsuited(f"its experts learn {learning[0]}, and the fused op has no gradient for it", advice)
    reasons = []
    for width in _widths(parent, plan):
        try:
            first, second = (_find(parent, found, plan, shape, width) for shape in _RECORDED[rank])
            combine = first.combine
            if not combine.only_chosen and any(p.activations == "dynamic" for p in plan.products):
                raise Unsuited(
                    "it gives its experts tokens that did not choose them, which takes part in dynamic scales",
                    "give experts the tokens that chose them alone",
                )
            text = source_of(rebuild(first, second, path))
            result = text, first.routing.top_k, combine.weighted, width
            _check(parent, path, found, plan, Forwards((((parent.training, rank), text),), *result[1:]), rank)
            return result
        except Unsuited as reason:
            reasons.append(reason)
    raise reasons[0]


def _find(parent: nn.Module, found: ExpertList, plan: ExpertPlan, shape: tuple[int, ...], width: int) -> Found:
    x = _random(shape, width, found)
    reason = Unsuited("the experts' results are not added up row by row", "weigh each token's results and add them")
    candidates = []
    for combine in find_combines(parent, found.experts, x, plan.out_features):
        try:
            candidates.append(Found(combine, find_routing(combine)))
        except Unsuited as other:
            reason = other
    if not candidates:
        raise reason
    # The fused experts' dtype first: a sum in another is rounded right after.
    return next((c for c in candidates if c.combine.node.meta["value"].dtype == x.dtype), candidates[0])


def _check(
    parent: nn.Module,
    path: str,
    found: ExpertList,
    plan: ExpertPlan,
    forwards: Forwards,
    rank: int,
    shapes: tuple[tuple[int, ...], ...] | None = None,
) -> None:
    """Synthetic experts, at sizes that were not recorded, with tokens that all choose the same experts, and large."""
    made = prepared_class(type(parent), forwards.sources)
    run = made._variants[parent.training, rank]  # type: ignore[attr-defined]
    inputs = [_random(shape, forwards.width, found) for shape in shapes or _CHECKED[rank]]
    inputs += [inputs[-1][..., :1, :].expand_as(inputs[-1]).contiguous(), inputs[-1][..., :24, :] * _LARGE]
    check_synthetic(parent, found.experts, path, run, inputs, plan.out_features, forwards.weighted)


def _widths(parent: nn.Module, plan: ExpertPlan) -> list[int]:
    """What the parent's hidden states may be wide: as the experts take them, or as one of its linears does."""
    linears = [m.in_features for m in parent.children() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys([plan.in_features, *linears]))


def _random(shape: tuple[int, ...], width: int, found: ExpertList) -> Tensor:
    device = next(leaves_of(found.experts[0])).get().device
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, width, generator=generator).to(device, found.dtype)


def _dtype(expert: nn.Module, model: nn.Module) -> torch.dtype:
    """What the experts' hidden states are: packed parameters show it, else other parameters and buffers do.

    Experts may hold codes, scales and nothing else; then it is what most of the model's parameters are.
    """
    shown = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [*expert.parameters(), *expert.buffers()]
    for dims in (2, 1):  # of what has one dim, biases are in 16 bits; scales and tables need not be
        found = [t.dtype for t in tensors if t.dtype in (shown if dims == 2 else shown[1:]) and t.dim() >= dims]
        if found:
            return found[0]
    sizes: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.dtype in shown and not isinstance(p.data, NVFP4Weight):
            sizes[p.dtype] += p.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


def _children(parent: nn.Module) -> Hashable:
    return tuple((name, type(m)) for name, m in parent.named_children())


def _names(found: ExpertList, plan: ExpertPlan) -> dict[str, tuple[str, ...]]:
    """New parameter -> its names before, one an expert."""
    names: dict[str, tuple[str, ...]] = {}
    leaves = [leaf.name for leaf in leaves_of(found.experts[0])]
    for new, source in zip((*UP_NAMES[plan.layout], DOWN_NAME), plan.sources(), strict=True):
        for name, part in ((new, "qdata"), (new + BIAS, "bias")):
            leaf = source.get(part)
            if leaf is not None:
                old = leaves[leaf].removesuffix(".qdata")
                names[join(found.path, name)] = tuple(join(found.path, key, old) for key in found.container._modules)
    return names
