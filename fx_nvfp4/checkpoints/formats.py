"""The producers' conventions: what each calls the parts of a packed weight, and what its numbers mean.

ModelOpt and Quark store global scales as multipliers, compressed-tensors stores the reciprocals. Here every
global scale becomes the multiplier: float32 for weights, float64 for activations, whose fp32 reciprocal is then
the stored number bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import mismatch
from .reader import Reader, StoredTensor


@dataclass(frozen=True)
class Convention:
    """One producer's names and meanings.

    Attributes:
        method: config.json's quant_method.
        codes, block_scale, global_scale: last component of the tensor names of a linear layer; of 3-D experts
            they are appended to the parameter's name with an underscore, and the codes keep the bare name.
        input_scales: names the activation scale may have, the usual one first.
        reciprocal: global scales are stored as divisors.
        dialect: the rule by which this producer rounds activations.
    """

    method: str
    codes: str
    block_scale: str
    global_scale: str
    input_scales: tuple[str, ...]
    reciprocal: bool
    dialect: str


MODELOPT = Convention("modelopt", "weight", "weight_scale", "weight_scale_2", ("input_scale",), False, "modelopt")
COMPRESSED_TENSORS = Convention(
    "compressed-tensors",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    ("input_global_scale",),
    True,
    "compressed-tensors",
)
# Quark's rule is not written down here: torchao's comes closest, by far, to the bf16 output of one Quark MoE block
# (0.13's, where the rules differ at ties); blocks of very small scales were not in it.
QUARK = Convention(
    "quark", "weight", "weight_scale", "weight_scale_2", ("input_scale_2", "input_scale"), False, "torchao"
)
# torchao describes each tensor in the safetensors metadata instead (see torchao_files.py).
TORCHAO = Convention("torchao", "qdata", "scale", "per_tensor_scale", ("act_per_tensor_scale",), False, "torchao")

CONVENTIONS = {c.method: c for c in (MODELOPT, COMPRESSED_TENSORS, QUARK, TORCHAO)}


def weight_multiplier(reader: Reader, tensor: StoredTensor, convention: Convention) -> Tensor:
    """Global scale(s) of a weight: float32, flat."""
    scale = _checked(reader.read(tensor).double().reshape(-1), tensor)
    return _checked((1.0 / scale if convention.reciprocal else scale).float(), tensor)


def read_input_multiplier(reader: Reader, tensor: StoredTensor, convention: Convention) -> Tensor:
    """Global scale(s) of the activations: float64, flat, not checked; a divisor of 0 or inf comes out as inf or 0."""
    scale = reader.read(tensor).double().reshape(-1)
    return 1.0 / scale if convention.reciprocal else scale


def _checked(scale: Tensor, tensor: StoredTensor) -> Tensor:
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bad.any():
        raise mismatch(
            tensor.name,
            f"{scale[bad][0].item()}",
            "positive finite global scales",
            "the quantised layer saw no data or was damaged; export the checkpoint again",
        )
    return scale


def check_block_scales(block_scale: Tensor, tensor: StoredTensor, first_row: int = 0) -> None:
    """Raise unless float8_e4m3fn block scales, of a whole tensor or from a row of it on, are numbers and not negative.

    Raises:
        CheckpointError: a NaN or a negative scale, with its position.
    """
    raw = block_scale.view(torch.uint8)
    # 0x7f and 0xff are NaN, above 0x80 lie the negative numbers; the format has no infinities.
    bad = (raw == 0x7F) | (raw > 0x80)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        value = block_scale[tuple(first)].item()
        first[0] += first_row
        raise mismatch(
            tensor.name,
            f"{value} at {first} ({int(bad.sum())} such)",
            "block scales that are finite and not negative",
            "the checkpoint is damaged or was quantised from NaN weights; export it again",
        )
