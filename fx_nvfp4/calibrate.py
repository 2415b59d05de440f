"""``calibrate``: static activation scales from data that runs through the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .dialects import get_dialect
from .ops import UNCALIBRATED
from .parameters import replace_parameters
from .preparation.candidates import find_lists
from .quantization.observe import Observer
from .quantization.record import shorten
from .report import NVFP4Warning
from .tensor import PART_OF_K, NVFP4Weight

_CALIBRATED = ("static", UNCALIBRATED)  # modes of weights that get a scale

log = logging.getLogger("fx_nvfp4")


@dataclass
class Calibration:
    """What :func:`calibrate` found, complete when its block ends; prints as text.

    Attributes:
        amax: weight -> largest magnitude that entered it, fp32, [] or, of 3-D weights, [E]; 0 where none did.
        borrowed: experts that no token reached, "path.of.weight[expert]" or "path.of.weight" in a list of experts:
            they have the largest scale of those beside them.
        kept: what nothing reached and has a static scale from before, named likewise: it keeps that one.
        unreached: weights that nothing reached, nor any expert beside them: they stay uncalibrated.
    """

    amax: dict[str, Tensor] = field(default_factory=dict)
    borrowed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"calibrate: {len(self.amax)} weights, {len(self.borrowed)} weights of experts without a token"]
        what = {"largest scale of its layer": self.borrowed, "scale of before": self.kept}
        for text, names in (*what.items(), ("not calibrated", self.unreached)):
            lines += [f"{text}: {shorten(names)}"] if names else []
        return "\n".join(lines)


@contextmanager
def calibrate(model: nn.Module) -> Iterator[Calibration]:
    """Find static activation scales by running data.

        fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(activations="static"))
        with fx_nvfp4.calibrate(model) as calibration:
            for batch in data:
                model(batch)

    Inside, the model runs eagerly, with packed weights and activations as they are, and the largest magnitude that
    enters each weight is recorded, for each expert of the rows routed to it. When the block ends, each gets the scale
    at which that magnitude is the largest representable one. Weights that have a static scale already get a new one,
    but what nothing reached, an expert or a whole weight, keeps its own; weights of other modes are not looked at. Call
    it before :func:`fx_nvfp4.prepare` and torch.compile.

    An expert that no token reached, and that has no scale yet, takes the largest scale of the experts beside it (of its
    3-D weight, or of the same weight in its list), with a warning; more data, or data of more kinds, gives it its own.

    Yields:
        A :class:`Calibration`; it stays as ``model.nvfp4_calibration``.

    Raises:
        ValueError: the model has no such weight, or a part of its K alone on this rank, none was reached, or a value
            that entered one is not finite. Then, and where the block raises, the weights are as before.
    """
    _check_whole(model)
    observer, before, watched = Observer(), {}, {}

    def watch(name: str, weight: Tensor) -> Tensor | None:
        if not isinstance(weight, NVFP4Weight) or weight.activations not in _CALIBRATED:
            return None
        before[name], watched[name] = weight, observer.slots(weight)
        return watched[name]

    if not replace_parameters(model, watch):
        raise ValueError(
            "calibrate: the model has no packed weight with static activations; "
            'quantize_(model, NVFP4Config(activations="static")) packs some'
        )
    calibration, after = Calibration(), before
    try:
        with observer:
            yield calibration
        calibration.amax = {name: observer.amax(weight) for name, weight in watched.items()}
        after = _calibrated(model, before, calibration)
    finally:
        replace_parameters(model, lambda name, _: after.get(name))
    model.nvfp4_calibration = calibration  # type: ignore[assignment]
    log.info("%s", calibration)
    _warn(calibration)


def _check_whole(model: nn.Module) -> None:
    """Each rank would find the scale of the part of K that it holds, and no two the same."""
    parts = [
        name
        for name, p in model.named_parameters()
        if getattr(p, PART_OF_K, False) and isinstance(p.data, NVFP4Weight) and p.data.activations in _CALIBRATED
    ]
    if parts:
        raise ValueError(
            f"calibrate: this rank holds a part of K of {shorten(parts)}, and would not see all that enters it: "
            "calibrate the whole model, then shard it"
        )


@torch.inference_mode(False)
def _calibrated(model: nn.Module, weights: dict[str, NVFP4Weight], calibration: Calibration) -> dict[str, NVFP4Weight]:
    """The weights with their scales; what borrows, and what has none, is noted."""
    _check(calibration.amax)
    lent: dict[str, Tensor] = {}
    for peers in _peers(model, weights):
        lent.update(dict.fromkeys(peers, torch.stack([calibration.amax[peer] for peer in peers]).amax()))
    after = {}
    for name, weight in weights.items():
        amax = calibration.amax[name]
        missing = [f"{name}{e}" if e else name for e in (amax == 0).nonzero().tolist()]
        largest = lent.get(name, amax.amax())
        if weight.act_scale is not None:
            calibration.kept += missing
        elif largest == 0:
            calibration.unreached.append(name)
            after[name] = weight
            continue
        else:
            calibration.borrowed += missing
        scale = get_dialect(weight.dialect).global_scale(torch.where(amax == 0, largest, amax)).to(weight.qdata.device)
        if weight.act_scale is not None:
            scale = torch.where((amax == 0).to(scale.device), weight.act_scale, scale)
        after[name] = weight.replace(activations="static", act_scale=scale)
    return after


def _check(amax: dict[str, Tensor]) -> None:
    infinite = [name for name, found in amax.items() if not found.isfinite().all()]
    if infinite:
        raise ValueError(f"calibrate: NaN or infinity entered {shorten(infinite)}; find where it comes from")
    if not any(found.any() for found in amax.values()):
        raise ValueError(
            f"calibrate: nothing reached any of {len(amax)} packed weights; run the model, not a compiled copy of it, "
            "inside the with block"
        )


def _peers(model: nn.Module, weights: Iterable[str]) -> Iterator[list[str]]:
    """Names of the same weight of every expert, for each list of experts."""
    for path, _ in find_lists(model):
        inside: dict[str, list[str]] = {}
        for name in weights:
            if name.startswith(f"{path}."):
                _, _, same = name.removeprefix(f"{path}.").partition(".")
                inside.setdefault(same, []).append(name)
        yield from inside.values()


def _warn(calibration: Calibration) -> None:
    names = calibration.borrowed
    if names:
        warnings.warn(
            f"calibrate: no token reached {len(names)} weights of experts: {shorten(names)}. "
            "They take the largest scale beside them; run more data to give them their own",
            NVFP4Warning,
            stacklevel=4,
        )
    if calibration.unreached:
        warnings.warn(
            f"calibrate: nothing reached {shorten(calibration.unreached)}; products with these weights raise. Run data "
            "that reach them, or leave them out of quantize_ by its filter_fn",
            NVFP4Warning,
            stacklevel=4,
        )
