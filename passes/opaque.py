"""Quantisers of activations that are single ops or kernels of other projects, known by their qualified names.

What such an op computes cannot be evaluated here, so its name and its arguments are trusted, and the dialect's golden
vectors vouch for the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from fx_nvfp4.format import BLOCK

from .activation_proof import Cut, Rule
from .activations import Spelled, results_of
from .found import Refused
from .nodes import CASTS, arguments, is_tensor
from .sample import MOVES, inputs_of

aten = torch.ops.aten

MODELOPT = "tensorrt::dynamic_block_quantize_op"  # how ModelOpt registers its blockwise fake quantisation
# What returns, or fills, codes and block scales; the graph dequantises them: vLLM's, torchao's, compressed-tensors'.
_PACKERS = {
    *("_C::scaled_fp4_quant", "_C::scaled_fp4_experts_quant"),
    *("_C::silu_and_mul_nvfp4_quant", "_C::silu_and_mul_scaled_fp4_experts_quant"),
    *("ao::mslk_quantize_nvfp4", "ao::mslk_quantize_nvfp4_stacked"),
    "triton::_quantize_and_pack_fp4_kernel",
}
# Triton kernels that quantise to NVFP4 and back, and stay as they are: ModelOpt's.
_KERNELS = {"triton::fp4_fake_quant_kernel", "triton::fp4_fake_quant_kernel_blockptr"}
_OURS = "fx_nvfp4::fake_quantize"  # called by the model itself, or put there for another product of the same rows
# What mixes elements of its inputs, beside what only moves them.
_MIXES = {
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.roll.default),
    *(aten.index_put.default, aten.index_copy.default, aten.scatter.src),
}
_MOST_NODES = 512
_ADVICE = "spell the quantiser in PyTorch, or leave it to the packed tensor's activation scale"


@dataclass(frozen=True)
class Kept:
    """A known quantiser that stays where it is."""

    name: str


def opaque_quantiser(operand: Node) -> Spelled | Kept | Literal["ours"] | None:
    """What a single op quantises an operand by: a known one's rule or name, "ours", or None if there is none.

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
        if name in _KERNELS:
            return Kept(name)
        raise Refused(f"activations are quantised by the opaque op {name}, which is not known", _ADVICE)
    if (name := _behind_rearrangement(operand)) is not None:
        raise Refused(
            f"activations are quantised by {name} and then chosen, joined or masked by ops that are not followed",
            _ADVICE,
        )
    return None


def _behind_rearrangement(operand: Node) -> str | None:
    """A quantiser of rows that are rearranged, some of them perhaps among others, to become the operand."""
    seen, left = {operand}, [operand]
    while left and len(seen) < _MOST_NODES:
        node = left.pop()
        if (name := _name(node)) is not None:
            return name
        masks = node.target is aten.mul.Tensor and any(map(_is_mask, inputs_of(node)))
        if masks or MOVES.of(node) is not None or node.target in CASTS or node.target in _MIXES:
            new = [n for n in inputs_of(node) if n not in seen]
            seen.update(new)
            left += new
    return None


def _is_mask(operand: Node) -> bool:
    return any(is_tensor(n) and n.meta["val"].dtype == torch.bool for _, n in results_of(operand))


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
    name = _qualified(call) or str(call.target)
    if name not in _PACKERS:
        raise Refused(f"activations are packed by {name}, which is not known", _ADVICE)
    return name


def _name(node: Node) -> str | None:
    """The qualified name of an op that quantises, to judge by that name."""
    call = node.args[0] if node.op == "call_function" and not hasattr(node.target, "name") and node.args else node
    name = _qualified(call) if isinstance(call, Node) else None
    if name is None or "quant" not in name or "dequant" in name:
        return None
    return name if is_tensor(node) or name == _OURS else None


def _qualified(call: Node) -> str | None:
    """namespace::name of what a node calls, triton::name of a kernel; None for PyTorch's own ops.

    Ops that fill their arguments, and kernels, are wrapped when a graph is made functional.
    """
    target: Any = call.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        if "kernel_idx" in call.kwargs:
            return f"triton::{_kernel_name(call.kwargs['kernel_idx'])}"
        target = call.args[0] if call.args else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return None
    return target._schema.name


def _kernel_name(number: Any) -> str:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(number)
    while hasattr(kernel, "fn"):  # autotuners and heuristics hold a kernel, which holds a function
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", kernel))


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
