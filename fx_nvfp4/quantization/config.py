"""How a bf16 model is to be quantised."""

from __future__ import annotations

from dataclasses import dataclass

from torchao.core.config import AOBaseConfig

from ..dialects import get_dialect
from ..ops import ACTIVATION_MODES
from .blocks import BLOCK_SCALE_RULES

GLOBAL_SCALE_RULES = ("fused", "projection", "parameter")


@dataclass
class NVFP4Config(AOBaseConfig):
    """NVFP4 for linear layers and experts, as a config of torchao's ``quantize_`` and of :func:`fx_nvfp4.quantize_`.

    Attributes:
        activations: "none" packs weights alone (W4A16); "dynamic" rounds the left operands too, with the global scale
            of their own maximum; "static" with scales that :func:`fx_nvfp4.calibrate` finds: until then a product
            with such a weight raises.
        block_scale: "amax" maps the largest magnitude of a block to 6; "mse" takes the scale with the least squared
            error among that and its neighbours, two e4m3 steps below to six above.
        global_scale: what shares one. "fused": each expert has its own, and what engines multiply as one weight has one
            in common: gate and up of an expert or MLP, and q, k and v. "projection": each projection of each expert
            has its own. "parameter": each parameter has one, a 3-D one for all its experts.
        dialect: whose rule rounds weights and activations, see :mod:`fx_nvfp4.dialects`.
        transposed: whether 3-D weights are stored [E, in, out]; by default the module tells, and one that does not
            raises.

    Raises:
        ValueError: an unknown value; the message lists those there are.
    """

    activations: str = "none"
    block_scale: str = "amax"
    global_scale: str = "fused"
    dialect: str = "hardware"
    transposed: bool | None = None

    def __post_init__(self) -> None:
        get_dialect(self.dialect)
        for name, known in (
            ("activations", ACTIVATION_MODES),
            ("block_scale", BLOCK_SCALE_RULES),
            ("global_scale", GLOBAL_SCALE_RULES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"NVFP4Config: {name} must be one of {known}, got {getattr(self, name)!r}")
