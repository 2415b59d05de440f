"""The op of a whole routed block, ``fx_nvfp4::moe``: up product, activation, down product and weighted sum in one.

    out[t] = sum over a of weights[t, a] * (down_e(h) + down_bias[e]),  h = activation(up_e(x[t]) + up_bias[e]),
    e = ids[t, a]; a slot whose id is outside 0..E-1 contributes nothing.

x [T, K] float32, bfloat16 or float16; ids int32 or int64 [T, A]; weights floating [T, A]. Packed weights as in
:mod:`fx_nvfp4.ops`, in either layout: up, one or two, [E, N, K]; down [E, H, I]. ``layout`` says how up's N rows hold
gate and up: "concatenated" (gate rows first), "interleaved" (row by row), "plain" (no gate), "separate" (two weights,
gate first). ``activation`` is an expression, see :mod:`fx_nvfp4.activation`. Biases [E, N] and [E, H], static
activation scales float64 [] or [E]. ``weighted`` is "output", or "input" where x is multiplied, and rounded, before
the up product.

Rounded to x's dtype are the products, their sums with the bias, and h; activation and weighted sum are fp32. The result
[T, H] is that sum, rounded to ``out_dtype``, by default x's dtype. Dynamic activations take one scale for all
rows of an expert in the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import block as plain
from . import ops, reference
from .activation import parse
from .block import Block, Projection
from .block_grad import hidden
from .block_grad import moe_backward as block_backward
from .layouts import weight_sizes
from .ops import X_DTYPES, check_activations, check_weight
from .reference import Activations
from .routing_checks import check_ids

_OUT_DTYPE = 16  # place among the operands after x, ids and weights
LAYOUTS = ("concatenated", "interleaved", "separate", "plain")
_OPERANDS = (
    "Tensor x, Tensor ids, Tensor weights,"
    " Tensor[] up_qdata, Tensor[] up_block_scale, Tensor[] up_global_scale,"
    " Tensor down_qdata, Tensor down_block_scale, Tensor down_global_scale, str activation, str layout,"
    " Tensor[]? up_bias=None, Tensor? down_bias=None, Tensor[]? up_act_scale=None, Tensor? down_act_scale=None,"
    ' str up_activations="none", str down_activations="none", str dialect="hardware", str weighted="output",'
    " ScalarType? out_dtype=None"
)


@torch.library.custom_op("fx_nvfp4::moe", mutates_args=(), schema=f"({_OPERANDS}) -> Tensor")
def moe(x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, **options: Any) -> Tensor:
    """See the module docstring; ValueError names the operand that does not fit."""
    block = make_block(*operands, **options)
    check_block(x, ids, weights, block)
    check_ids("moe", ids, block.experts)
    body = ops.bodies(x)
    return (plain if body is reference else body).moe(x, ids, weights, block)


@torch.library.custom_op(
    "fx_nvfp4::moe_backward", mutates_args=(), schema=f"(Tensor grad, {_OPERANDS}) -> (Tensor, Tensor)"
)
def moe_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights, for grad [T, H]; the packed weights have none."""
    return block_backward(grad, x, ids, weights, make_block(*operands, **options))


@torch.library.custom_op(
    "fx_nvfp4::check_finite_block", mutates_args=(), schema=f"({_OPERANDS}, *, str site) -> Tensor"
)
def check_finite_block(x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, site: str, **options: Any) -> Tensor:
    """A copy of x, for the moe op of these operands: for debugging, it computes the activations h once more, and waits.

    Raises:
        FloatingPointError: x or h, where the block rounds them, holds NaN or an infinity; names the site and the place.
    """
    block = make_block(*operands, **options)
    if any(p.act.mode != "none" for p in block.up):
        ops.require_finite(x, site)
    if block.down.act.mode != "none":
        ops.require_finite(hidden(x, ids, weights, block), f"{site}, between its products (token, slot, column)")
    return x.clone(memory_format=torch.contiguous_format)


@check_finite_block.register_fake
def _(x: Tensor, *_operands: Any, **_options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@moe.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, **options: Any) -> Tensor:
    dtype = options.get("out_dtype") or (operands[_OUT_DTYPE] if len(operands) > _OUT_DTYPE else None)
    return x.new_empty(x.shape[0], weight_sizes(operands[3])[1], dtype=dtype or x.dtype)


@moe_backward.register_fake
def _(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def make_block(
    up_qdata: list[Tensor],
    up_block_scale: list[Tensor],
    up_global_scale: list[Tensor],
    down_qdata: Tensor,
    down_block_scale: Tensor,
    down_global_scale: Tensor,
    activation: str,
    layout: str,
    up_bias: list[Tensor] | None = None,
    down_bias: Tensor | None = None,
    up_act_scale: list[Tensor] | None = None,
    down_act_scale: Tensor | None = None,
    up_activations: str = "none",
    down_activations: str = "none",
    dialect: str = "hardware",
    weighted: str = "output",
    out_dtype: torch.dtype | None = None,
) -> Block:
    """The op's operands sorted; ValueError where lists or names do not fit (shapes: see check_block)."""
    _one_of("layout", layout, LAYOUTS)
    _one_of("weighted", weighted, ("output", "input"))
    count = 2 if layout == "separate" else 1
    for name, tensors, needed in (
        ("up_qdata", up_qdata, True),
        ("up_block_scale", up_block_scale, True),
        ("up_global_scale", up_global_scale, True),
        ("up_bias", up_bias, False),
        ("up_act_scale", up_act_scale, up_activations == "static"),
    ):
        if len(tensors or ()) != count and (needed or tensors):
            raise ValueError(
                f"moe: layout {layout!r} has {count} up weight(s): {name} must have as many tensors"
                f"{'' if needed else ', or none'}; got {len(tensors or ())}"
            )
    if out_dtype not in (None, *X_DTYPES):
        raise ValueError(f"moe: out_dtype must be None, float32, bfloat16 or float16, got {out_dtype}")
    expression = parse(activation)
    if layout == "plain" and "g" in expression.names:
        raise ValueError(f"moe: activation {activation!r} uses the gate g, which layout 'plain' does not have")
    up = tuple(
        Projection(
            up_qdata[i],
            up_block_scale[i],
            up_global_scale[i],
            up_bias[i] if up_bias else None,
            Activations(up_activations, up_act_scale[i] if up_act_scale else None, dialect),
        )
        for i in range(count)
    )
    down_act = Activations(down_activations, down_act_scale, dialect)
    down = Projection(down_qdata, down_block_scale, down_global_scale, down_bias, down_act)
    return Block(up, down, expression, layout, weighted, out_dtype)


def check_block(x: Tensor, ids: Tensor, weights: Tensor, block: Block) -> None:
    """Raise ValueError, naming op and operand, unless shapes and dtypes are those of the module docstring."""
    if x.dim() != 2 or x.dtype not in X_DTYPES:
        raise ValueError(f"moe: x must be float32, bfloat16 or float16 [T, K], got {x.dtype} {list(x.shape)}")
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"moe: ids must be int32 or int64 [{x.shape[0]}, A], got {ids.dtype} {list(ids.shape)}")
    if not weights.is_floating_point() or weights.shape != ids.shape:
        raise ValueError(
            f"moe: weights must be floating point {list(ids.shape)}, one per id, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    check_weight("moe, down weight", *block.down.weight, 1)
    inner = block.down.k
    _check_projection("moe, down weight", block.down, block.experts, inner)
    rows = inner * 2 if block.layout in ("concatenated", "interleaved") else inner
    for i, up in enumerate(block.up):
        _check_projection(f"moe, up weight {i}", up, block.experts, x.shape[1])
        if up.n != rows:
            raise ValueError(
                f"moe, up weight {i}: layout {block.layout!r} needs {rows} rows for the down weight's K = {inner}, "
                f"got {up.n}"
            )


def _check_projection(op: str, p: Projection, experts: int, k: int) -> None:
    check_weight(op, *p.weight, 1)
    check_activations(op, p.qdata, p.act.scale, p.act.mode)
    if p.qdata.shape[0] != experts or p.k != k:
        raise ValueError(
            f"{op}: expected {experts} experts (as the down weight has) and K = {k}, "
            f"got {p.qdata.shape[0]} experts and K = {p.k}"
        )
    if p.bias is not None and (not p.bias.is_floating_point() or p.bias.shape != p.global_scale.shape):
        raise ValueError(
            f"{op}: bias must be floating point {list(p.global_scale.shape)}, got {p.bias.dtype} {list(p.bias.shape)}"
        )


def _one_of(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise ValueError(f"moe: {name} must be one of {allowed}, got {found!r}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Tensors go through save_for_backward, which sees in-place changes; their places are marked by their class."""
    tensors: list[Tensor] = []
    ctx.arguments = []
    for argument in inputs:
        found = list(argument) if isinstance(argument, (list, tuple)) else [argument]
        found = [t for t in found if isinstance(t, Tensor)]
        tensors += found
        ctx.arguments.append(
            [Tensor] * len(found) if isinstance(argument, (list, tuple)) else Tensor if found else argument
        )
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    arguments = [
        [next(saved) for _ in a] if isinstance(a, list) else next(saved) if a is Tensor else a for a in ctx.arguments
    ]
    needed = zip(torch.ops.fx_nvfp4.moe.default._schema.arguments[3:], ctx.needs_input_grad[3:], strict=False)
    learning = [argument.name for argument, needs in needed if any(tree_leaves(needs))]
    if learning:
        raise RuntimeError(
            f"fx_nvfp4.moe has no gradient for {', '.join(learning)}: freeze what is passed there with "
            "requires_grad_(False), or keep the products apart (the backend does where they are trained)"
        )
    grad_x, grad_weights = moe_backward(grad, *arguments)
    # One entry for each operand of the call; PyTorch has dropped those that equal their defaults.
    passed = ctx.arguments[3 : len(ctx.needs_input_grad)]
    frozen = [[None] * len(a) if isinstance(a, list) else None for a in passed]
    return grad_x, None, grad_weights, *frozen


moe.register_autograd(_backward, setup_context=_save)
