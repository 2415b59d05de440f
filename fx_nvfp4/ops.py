"""The op set (``torch.ops.fx_nvfp4``): matmuls with packed NVFP4 weights, opaque to Dynamo and AOTAutograd.

Weights have either of the layouts of :mod:`fx_nvfp4.layouts`: qdata uint8 [.., N, K/2], block_scale [.., N, K/16] as
float8_e4m3fn or its bytes in uint8; or tiles, qdata int32 [.., N/16, K/64, 32, 4], block_scale uint8 [.., N/16, K/64,
32, 2]. global_scale is float32 [.., N], per output row. ``activations`` is "none", "static" (act_scale:
float64 scalar, or [E] one per expert) or "dynamic" (amax / 2688 of the rows one weight multiplies in this call);
``dialect`` names the quantising rule of :mod:`fx_nvfp4.dialects`. Results have x's dtype, rounded once from the
fp32 sum.

The plain bodies of :mod:`fx_nvfp4.reference` serve every device; on CUDA and ROCm Triton kernels do, and on a CPU
:mod:`fx_nvfp4.cpu`, where there is a C++ compiler.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from .format import BLOCK
from .layouts import canonical, check_packed, is_tiled, weight_sizes
from .reference import Activations
from .routing_checks import check_ids, check_offsets

_HAS_TRITON = importlib.util.find_spec("triton") is not None
ACTIVATION_MODES = ("none", "static", "dynamic")
UNCALIBRATED = "uncalibrated"  # of weights whose static scale is yet to be found; no op computes with it
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WEIGHT = "Tensor x, Tensor qdata, Tensor block_scale, Tensor global_scale"
_ACT = 'Tensor? act_scale=None, str activations="none", str dialect="hardware"'


def check_operands(
    op: str,
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    act_scale: Tensor | None,
    activations: str,
    expert_dims: int,
) -> None:
    """Raise ValueError, naming op and operand, unless shapes and dtypes are those of the module docstring."""
    check_weight(op, qdata, block_scale, global_scale, expert_dims)
    if x.dtype not in X_DTYPES:
        raise ValueError(f"{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    k = weight_sizes(qdata)[2]
    if x.shape[-1] != k:
        raise ValueError(f"{op}: x has K = {x.shape[-1]}, the packed weight K = {k}")
    check_activations(op, qdata, act_scale, activations)


def check_weight(op: str, qdata: Tensor, block_scale: Tensor, global_scale: Tensor, expert_dims: int) -> None:
    """Raise ValueError unless the three tensors form one packed weight, [N, K] or with expert_dims = 1 [E, N, K]."""
    try:
        check_packed(qdata, block_scale if is_tiled(qdata) else reference.as_e4m3(block_scale))
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    lead, n, _ = weight_sizes(qdata)
    if len(lead) != expert_dims:
        expected = f"{2 + expert_dims}-D codes, or {4 + expert_dims}-D words of tiles"
        raise ValueError(f"{op}: expected {expected}, got {qdata.dtype} {list(qdata.shape)}")
    if global_scale.dtype != torch.float32 or global_scale.shape != (*lead, n):
        raise ValueError(
            f"{op}: global_scale must be float32 {[*lead, n]}, one per output row, "
            f"got {global_scale.dtype} {list(global_scale.shape)}"
        )


def _check_routing(op: str, name: str, routing: Tensor, x: Tensor, length: int) -> None:
    if x.dim() != 2 or routing.dtype not in (torch.int32, torch.int64) or list(routing.shape) != [length]:
        raise ValueError(
            f"{op}: {name} must be int32 or int64 [{length}] for x [S, K] = {list(x.shape)}, "
            f"got {routing.dtype} {list(routing.shape)}"
        )


def check_activations(op: str, qdata: Tensor, act_scale: Tensor | None, activations: str) -> None:
    """Raise ValueError unless the mode is known and has the scale it needs."""
    if activations == UNCALIBRATED:
        raise ValueError(
            f"{op}: codes {list(qdata.shape)} have static activations without a scale yet; run data through the model, "
            "with fx_nvfp4.calibrate(model): model(x)"
        )
    if activations not in ACTIVATION_MODES:
        raise ValueError(f"{op}: activations must be one of {ACTIVATION_MODES}, got {activations!r}")
    if activations != "static":
        return
    lead, _, _ = weight_sizes(qdata)
    shapes = [[], list(lead)] if lead else [[]]
    if act_scale is None or act_scale.dtype != torch.float64 or list(act_scale.shape) not in shapes:
        found = "None" if act_scale is None else f"{act_scale.dtype} {list(act_scale.shape)}"
        raise ValueError(f"{op}: static activations need a float64 act_scale of shape {shapes}, got {found}")


def uses_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels compute on tensor's device."""
    return tensor.is_cuda and _HAS_TRITON


def bodies(tensor: Tensor) -> ModuleType:
    """The module that computes on tensor's device."""
    if uses_kernels(tensor):
        from . import gpu  # at the first call, as it imports Triton

        return gpu
    return cpu if tensor.device.type == "cpu" and cpu.available() else reference


@torch.library.custom_op("fx_nvfp4::linear", mutates_args=(), schema=f"({_WEIGHT}, {_ACT}) -> Tensor")
def linear(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    act_scale: Tensor | None = None,
    activations: str = "none",
    dialect: str = "hardware",
) -> Tensor:
    """x [..., K] times one weight [N, K] transposed -> [..., N]."""
    check_operands("linear", x, qdata, block_scale, global_scale, act_scale, activations, 0)
    return bodies(x).linear(x, qdata, block_scale, global_scale, Activations(activations, act_scale, dialect))


@torch.library.custom_op("fx_nvfp4::batched", mutates_args=(), schema=f"({_WEIGHT}, {_ACT}) -> Tensor")
def batched(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    act_scale: Tensor | None = None,
    activations: str = "none",
    dialect: str = "hardware",
) -> Tensor:
    """x [E, M, K] times expert weights [E, N, K] transposed, expert by expert -> [E, M, N]."""
    check_operands("batched", x, qdata, block_scale, global_scale, act_scale, activations, 1)
    if x.dim() != 3 or x.shape[0] != qdata.shape[0]:
        raise ValueError(f"batched: x must be [{qdata.shape[0]}, M, K], one batch an expert, got {list(x.shape)}")
    return bodies(x).batched(x, qdata, block_scale, global_scale, Activations(activations, act_scale, dialect))


@torch.library.custom_op("fx_nvfp4::indexed", mutates_args=(), schema=f"({_WEIGHT}, Tensor ids, {_ACT}) -> Tensor")
def indexed(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    ids: Tensor,
    act_scale: Tensor | None = None,
    activations: str = "none",
    dialect: str = "hardware",
) -> Tensor:
    """Row s of x [S, K] times the weight of expert ids[s] transposed -> [S, N]; ids outside 0..E-1 give zeros."""
    check_operands("indexed", x, qdata, block_scale, global_scale, act_scale, activations, 1)
    _check_routing("indexed", "ids", ids, x, x.shape[0])
    check_ids("indexed", ids, weight_sizes(qdata)[0][0])
    return bodies(x).indexed(x, qdata, block_scale, global_scale, ids, Activations(activations, act_scale, dialect))


@torch.library.custom_op("fx_nvfp4::grouped", mutates_args=(), schema=f"({_WEIGHT}, Tensor offs, {_ACT}) -> Tensor")
def grouped(
    x: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    offs: Tensor,
    act_scale: Tensor | None = None,
    activations: str = "none",
    dialect: str = "hardware",
) -> Tensor:
    """Rows of x [S, K] sorted by expert, expert e's ending at offs[e] -> [S, N]; rows past offs[-1] give zeros."""
    check_operands("grouped", x, qdata, block_scale, global_scale, act_scale, activations, 1)
    _check_routing("grouped", "offs", offs, x, qdata.shape[0])
    check_offsets("grouped", offs, x.shape[0])
    return bodies(x).grouped(x, qdata, block_scale, global_scale, offs, Activations(activations, act_scale, dialect))


@torch.library.custom_op(
    "fx_nvfp4::fake_quantize",
    mutates_args=(),
    schema='(Tensor x, Tensor scale, str dialect="hardware") -> Tensor',
)
def fake_quantize(x: Tensor, scale: Tensor, dialect: str = "hardware") -> Tensor:
    """Round activations [..., K] to NVFP4 and back, in x's dtype; scale: float64 multiplier, [] or one per row."""
    if scale.dtype != torch.float64 or (scale.dim() and (x.dim() != 2 or scale.shape != x.shape[:1])):
        raise ValueError(
            f"fake_quantize: scale must be float64, [] or one per row of a 2-D x {list(x.shape)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    return bodies(x).fake_quantize(x, scale, dialect)


@torch.library.custom_op("fx_nvfp4::check_finite", mutates_args=(), schema="(Tensor x, str site) -> Tensor")
def check_finite(x: Tensor, site: str) -> Tensor:
    """A copy of activations x that are about to be rounded, which would turn NaN into 6: for debugging, it waits for x.

    Raises:
        FloatingPointError: x holds NaN or an infinity; names the site and the first one's place.
    """
    require_finite(x, site)
    return x.clone(memory_format=torch.contiguous_format)


def require_finite(x: Tensor, site: str) -> None:
    """Raise FloatingPointError where x holds NaN or an infinity."""
    odd = (~x.isfinite()).nonzero()
    if len(odd):
        place = odd[0].tolist()
        value = x[tuple(place)].item()
        raise FloatingPointError(f"{site}: {len(odd)} activations are not finite, the first is {value} at {place}")


@torch.library.custom_op("fx_nvfp4::round_to", mutates_args=(), schema="(Tensor x, str dtype) -> Tensor")
def round_to(x: Tensor, dtype: str) -> Tensor:
    """x [...], float32, rounded to "float16" or "bfloat16", and held in float32; gradients pass unchanged.

    An op of its own, since compilers drop a cast that the next one takes back, and the rounding with it.

    Raises:
        ValueError: x or dtype is another.
    """
    return x.to(_narrow(x, dtype)).to(x.dtype)


def _narrow(x: Tensor, dtype: str) -> torch.dtype:
    narrow = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype)
    if x.dtype != torch.float32 or narrow is None:
        raise ValueError(f"round_to: expected float32 and float16 or bfloat16, got {x.dtype} and {dtype}")
    return narrow


@round_to.register_fake
def _(x: Tensor, dtype: str) -> Tensor:
    _narrow(x, dtype)
    return torch.empty_like(x)


round_to.register_autograd(lambda ctx, grad: (grad, None))


@torch.library.custom_op(
    "fx_nvfp4::dequantize",
    mutates_args=(),
    schema="(Tensor qdata, Tensor block_scale, Tensor global_scale, ScalarType dtype) -> Tensor",
)
def dequantize(qdata: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole weight [.., N, K] in dtype. In a compiled graph each of these is reported: it undoes the packing."""
    return bodies(qdata).dequantize(qdata, block_scale, global_scale, dtype)


@torch.library.custom_op(
    "fx_nvfp4::input_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor qdata, Tensor block_scale, Tensor global_scale,"
    " Tensor? ids=None, Tensor? offs=None) -> Tensor",
)
def input_grad(
    grad: Tensor,
    qdata: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    ids: Tensor | None = None,
    offs: Tensor | None = None,
) -> Tensor:
    """The gradient of x from that of linear (2-D codes), indexed (ids), grouped (offs) or batched (neither).

    grad [.., N] times the weight, summed over its rows N -> [.., K] in grad's dtype. Rounding of activations counts as
    the identity, and rows of nobody get zeros. The global scale belongs to the rows that are summed over, so it cannot
    multiply the sum once: grad * global_scale enters in fp32 (the plain body, and fp32 gradients everywhere) or to
    16 bits at least (16-bit gradients on a GPU); products are exact, sums fp32, and the result is rounded once.
    """
    return bodies(grad).input_grad(grad, qdata, block_scale, global_scale, ids, offs)


@torch.library.custom_op(
    "fx_nvfp4::unpack_tiles", mutates_args=(), schema="(Tensor words, Tensor scales) -> (Tensor, Tensor)"
)
def unpack_tiles(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the bytes of block scales in the canonical layout: what views need that cut through tiles."""
    if not is_tiled(words):
        raise ValueError(f"unpack_tiles: expected int32 words of tiles, got {words.dtype} {list(words.shape)}")
    check_packed(words, scales)
    qdata, block_scale = canonical(words, scales)
    return qdata, block_scale.view(torch.uint8)


@unpack_tiles.register_fake
def _(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    lead, n, k = weight_sizes(words)
    return tuple(words.new_empty(*lead, n, k // part, dtype=torch.uint8) for part in (2, BLOCK))  # type: ignore[return-value]


@linear.register_fake
def _(x: Tensor, qdata: Tensor, *_args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_sizes(qdata)[1])


@batched.register_fake
@indexed.register_fake
@grouped.register_fake
def _(x: Tensor, qdata: Tensor, *_args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_sizes(qdata)[1])


@check_finite.register_fake
def _(x: Tensor, site: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, dialect: str = "hardware") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dequantize.register_fake
def _(qdata: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    lead, n, k = weight_sizes(qdata)
    return qdata.new_empty(*lead, n, k, dtype=dtype)


@input_grad.register_fake
def _(grad: Tensor, qdata: Tensor, *_args: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight_sizes(qdata)[2])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _save_routing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """input_grad is linear in its gradient, so its own is the product over K."""
    *weight, ids, offs = ctx.saved_tensors
    if ids is not None:
        y = indexed(grad, *weight, ids)
    elif offs is not None:
        y = grouped(grad, *weight, offs)
    else:
        y = (batched if weight_sizes(weight[0])[0] else linear)(grad, *weight)
    return y, None, None, None, None, None


def _backward_plain(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return input_grad(grad, *ctx.saved_tensors), None, None, None, None, None, None


def _backward_indexed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *weight, ids = ctx.saved_tensors
    return input_grad(grad, *weight, ids=ids), None, None, None, None, None, None, None


def _backward_grouped(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *weight, offs = ctx.saved_tensors
    return input_grad(grad, *weight, offs=offs), None, None, None, None, None, None, None


linear.register_autograd(_backward_plain, setup_context=_save_weight)
batched.register_autograd(_backward_plain, setup_context=_save_weight)
indexed.register_autograd(_backward_indexed, setup_context=_save_routing)
grouped.register_autograd(_backward_grouped, setup_context=_save_routing)
input_grad.register_autograd(_backward_gradient, setup_context=_save_gradient)
fake_quantize.register_autograd(lambda ctx, grad: (grad, None, None))
