"""The formats that are compared, and a model in each of them."""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Config


@dataclass(frozen=True)
class Variant:
    """How weights are quantised (None: not at all), and options of the backend with which the model is compiled."""

    name: str
    config: NVFP4Config | None = None
    options: dict[str, Any] = field(default_factory=dict)


_MERGED = {"shared_scales": "vllm"}
BF16 = "bf16"
VARIANTS = (
    Variant(BF16),
    Variant("W4A16, amax", NVFP4Config(block_scale="amax")),
    Variant("W4A16, mse", NVFP4Config(block_scale="mse")),
    Variant("W4A4 dynamic, amax", NVFP4Config("dynamic", "amax")),
    Variant("W4A4 dynamic, mse", NVFP4Config("dynamic", "mse")),
    Variant("W4A4 static, amax", NVFP4Config("static", "amax")),
    Variant("W4A4 static, mse", NVFP4Config("static", "mse")),
    # One activation scale for all experts, which have one each.
    Variant("W4A4 static, mse; merged", NVFP4Config("static", "mse"), _MERGED),
    # Gate and up have global scales of their own, of which an engine that merges them takes gate's for both.
    Variant("W4A4 static, mse, gate and up apart", NVFP4Config("static", "mse", "projection")),
    Variant("W4A4 static, mse, gate and up apart; merged", NVFP4Config("static", "mse", "projection"), _MERGED),
)


def chosen(names: Collection[str]) -> list[Variant]:
    """The variants of those names; without names all."""
    return [v for v in VARIANTS if v.name in names or not names]


def quantised(dense: nn.Module, variant: Variant, calibration: Iterable[Tensor]) -> nn.Module:
    """A copy of a model in a variant's format, its static scales from batches of token ids."""
    model = copy.deepcopy(dense)
    if variant.config is None:
        return model
    fx_nvfp4.quantize_(model, variant.config)
    if variant.config.activations == "static":
        with fx_nvfp4.calibrate(model):
            for ids in calibration:
                model(ids)
    return model
