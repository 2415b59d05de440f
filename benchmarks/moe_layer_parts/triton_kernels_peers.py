"""The layer by matmul_ogs of OpenAI's triton_kernels (3.5's names, as vLLM ships it), on MXFP4 weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Layer
from .experts import dense_weight

Prepare = Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]


def layer_call(layer: Layer) -> Callable[..., Tensor]:
    """Takes what prepare() gives: routing and both products."""
    products = _products(layer)

    def call(x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        return products(x, *_route(layer, scores, ids))

    return call


def routed_call(layer: Layer) -> Callable[..., Tensor]:
    """Takes what prepare_routed() gives: both products."""
    return _products(layer)


def prepare(layer: Layer) -> Prepare:
    """(x, scores, ids): routing weights at their places among all experts, as a router has them."""

    def scores(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = torch.zeros(len(x), layer.shape.experts, device=x.device)
        return x, full.scatter_(1, ids, weights.float()), ids.short()

    return scores


def prepare_routed(layer: Layer) -> Prepare:
    """(x, the layer's routing data)."""
    scores = prepare(layer)

    def routed(*given: Tensor) -> tuple[Any, ...]:
        x, full, ids = scores(*given)
        return x, *_route(layer, full, ids)

    return routed


def _products(layer: Layer) -> Callable[..., Tensor]:
    """x, routing data, gather and scatter indices -> result; the rows of gate and up lie in turn."""
    if layer.device.type != "cuda":
        raise RuntimeError("runs on GPUs only")
    _import()
    ogs = importlib.import_module("triton_kernels.matmul_ogs")
    gate_up = dense_weight(layer.gate_up).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    first, first_config = _quantise(gate_up, ogs)
    del gate_up
    second, second_config = _quantise(dense_weight(layer.down), ogs)
    specs = ogs.FnSpecs("silu_mul", importlib.import_module(f"{__package__}.silu_mul").silu_mul, ())
    activation = ogs.FusedActivation(specs, (), 2)

    def products(x: Tensor, routing: Any, gather: Any, scatter: Any) -> Tensor:
        h = ogs.matmul_ogs(x, first, None, routing, gather, precision_config=first_config, fused_activation=activation)
        return ogs.matmul_ogs(
            h, second, None, routing, scatter_indx=scatter, precision_config=second_config, gammas=routing.gate_scal
        )

    return products


def _quantise(dense: Tensor, ogs: Any) -> tuple[Any, Any]:
    """(weight, precision config) of weights [E, N, K] in MXFP4, laid out for the device."""
    tensor, details = (
        importlib.import_module(f"triton_kernels.{name}") for name in ("tensor", "tensor_details.layout")
    )
    downcast = importlib.import_module("triton_kernels.numerics_details.mxfp").downcast_to_mxfp
    codes, scales = downcast(dense.transpose(1, 2), torch.uint8, axis=1)
    # The layout's tiles are four scales long.
    scales = F.pad(scales.transpose(1, 2), (0, -scales.shape[1] % 4)).transpose(1, 2)
    value_layout, value_options = details.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = details.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    w = tensor.convert_layout(tensor.wrap_torch_tensor(codes, tensor.FP4), value_layout, **value_options)
    scale = tensor.convert_layout(tensor.wrap_torch_tensor(scales), scale_layout, **scale_options)
    return w, ogs.PrecisionConfig(weight_scale=scale)


def _route(layer: Layer, scores: Tensor, ids: Tensor) -> tuple[Any, Any, Any]:
    shape = layer.shape
    topk = importlib.import_module("triton_kernels.topk").topk
    routing = importlib.import_module("triton_kernels.routing").routing_from_bitmatrix
    values, ids, bits = topk(scores, shape.top, apply_softmax=False, y_indx=ids)
    return routing(bits, values, ids, shape.experts, shape.top)


def _import() -> None:
    """triton_kernels, or the copy that vLLM brings."""
    try:
        importlib.import_module("triton_kernels")
    except ImportError:
        sys.modules["triton_kernels"] = importlib.import_module("vllm.third_party.triton_kernels")
