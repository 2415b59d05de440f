"""Quantisers of activations that are single ops of other projects, known by their qualified names.

What such an op computes cannot be evaluated here, so its name and its arguments are trusted, and the dialect's golden
vectors vouch for the bits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.fx import Node

from fx_nvfp4.format import BLOCK

from .activation_proof import Cut, Rule
from .activations import Spelled, results_of
from .found import Refused
from .nodes import arguments, is_tensor

MODELOPT = "tensorrt::dynamic_block_quantize_op"  # how ModelOpt registers its blockwise fake quantisation
# Ops that return codes and block scales by the hardware's rule; the graph dequantises them: vLLM's and torchao's.
_PACKERS = {"_C::scaled_fp4_quant", "ao::mslk_quantize_nvfp4"}
_OURS = "fx_nvfp4::fake_quantize"  # called by the model itself, or put there for another product of the same rows
_ADVICE = "spell the quantiser in PyTorch, or leave it to the packed tensor's activation scale"


def opaque_quantiser(operand: Node) -> Spelled | Literal["ours"] | None:
    """What a single op quantises an operand by: a known one's rule, "ours", or None if there is none.

    Raises:
        Refused: an op that quantises by its name, and is none of those known, or has arguments of another format.
    """
    for moves, node in results_of(operand):
        if (name := _name(node)) is None:
            continue
        if name == _OURS:
            return "ours"
        if name == MODELOPT:
            return Spelled(*_modelopt(node), moves, ())
        raise Refused(f"activations are quantised by the opaque op {name}, which is not known", _ADVICE)
    return None


def packer_of(codes: Node) -> str:
    """The qualified name of the op that packed activations, which the graph dequantises by itself.

    Raises:
        Refused: it is not known to make NVFP4.
    """
    call = codes
    while call.op == "call_function" and call.args and isinstance(call.args[0], Node):
        if isinstance(call.target, torch._ops.OpOverload) and call.target.namespace not in ("aten", "prims"):
            break
        call = call.args[0]
    target = call.target
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)
    if name not in _PACKERS:
        raise Refused(f"activations are packed by {name}, which is not known", _ADVICE)
    return name


def _name(node: Node) -> str | None:
    """The qualified name of an op that quantises, to judge by that name."""
    call = node.args[0] if node.op == "call_function" and not hasattr(node.target, "name") and node.args else node
    target = getattr(call, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return None
    name = target._schema.name
    quantises = "quant" in name and "dequant" not in name
    return name if quantises and (is_tensor(node) or name == _OURS) else None


def _modelopt(node: Node) -> tuple[Cut, Rule]:
    a = arguments(node)
    x, block, amax, *form = (getattr(a, argument.name) for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    if [block, *form] != [BLOCK, 4, 2, 8, 4] or not is_tensor(amax) or amax.meta["val"].numel() != 1:
        raise Refused(
            f"activations are quantised by {MODELOPT} to another format than NVFP4 with one global scale: block size, "
            f"bits and exponent bits of codes and of scales are {[block, *form]}, expected {[BLOCK, 4, 2, 8, 4]}",
            _ADVICE,
        )
    dtype = node.meta["val"].dtype
    return Cut(x, node, amax, "tensor", False), Rule("modelopt-kernel", dtype, "amax", 1.0, True, False)
