"""The layer in vLLM: its NVFP4 emulation, Marlin on NVFP4 weights, and its fused MoE on bf16 weights (0.33's names).

vLLM patches Inductor when it is imported, which is when its first variant is built: later shapes of the same run
compile with that.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .data import Layer
from .experts import dense_weight

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
QUANTIZATION = "vllm.model_executor.layers.quantization.utils"


def add_wheels(paths: Sequence[str]) -> None:
    """Make packages importable from wheels, unpacked to a temporary folder, or from folders."""
    for path in paths:
        folder = path
        if not Path(path).is_dir():
            folder = tempfile.mkdtemp(prefix="moe_layer_")
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
        sys.path.append(folder)


def prepare(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As vLLM's router hands them over."""
    return x, ids.int(), weights.float()


def dense(layer: Layer) -> Call:
    _need_gpu(layer)
    fused_experts = _get(f"{FUSED_MOE}.fused_moe", "fused_experts")
    gate_up, down = dense_weight(layer.gate_up), dense_weight(layer.down)
    return lambda x, ids, weights: fused_experts(x, gate_up, down, weights, ids)


def marlin(layer: Layer) -> Call:
    _need_gpu(layer)
    pack = _get(f"{QUANTIZATION}.marlin_utils_fp4", "prepare_nvfp4_moe_layer_for_marlin")
    fused = _get(f"{FUSED_MOE}.experts.marlin_moe", "fused_marlin_moe")
    code = _get("vllm.scalar_type", "scalar_types").float4_e2m1f.id
    workspace = _get(f"{QUANTIZATION}.marlin_utils", "marlin_make_workspace_new")(layer.device, 4)
    shape, parts = layer.shape, (*_parts(layer.gate_up), *_parts(layer.down))
    sizes = SimpleNamespace(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size_per_partition=shape.intermediate,
        params_dtype=torch.bfloat16,
    )
    w1, scale1, global1, w2, scale2, global2 = pack(sizes, *parts, is_act_and_mul=True)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused(
            x, w1, w2, None, None, scale1, scale2, weights, ids, code,
            global_scale1=global1, global_scale2=global2, workspace=workspace,
        )  # fmt: skip

    return call


def emulation(layer: Layer) -> Call:
    _need_gpu(layer)
    config = importlib.import_module(f"{FUSED_MOE}.config")
    kind = _get(f"{FUSED_MOE}.experts.nvfp4_emulation_moe", "Nvfp4QuantizationEmulationTritonExperts")
    silu = _get(f"{FUSED_MOE}.activation", "MoEActivation").SILU
    table = _get(f"{QUANTIZATION}.nvfp4_emulation_utils", "kE2M1ToFloat_handle")
    table.val = table.val.to(layer.device)
    w1, scale1, global1 = _parts(layer.gate_up)
    w2, scale2, global2 = _parts(layer.down)
    # vLLM takes the largest scale of all experts, and its reciprocal.
    act1, act2 = (1 / scale.max().float().reshape(1) for scale in layer.act_scales)
    quantisation = config.nvfp4_moe_quant_config(global1, global2, act1, act2, scale1, scale2)
    experts = kind(_moe_config(layer, config, silu), quantisation)

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = len(x), w1.shape[1], x.shape[1], ids.shape[1], len(w1), len(w1)
        shapes = experts.workspace_shapes(*sizes, None, silu)
        first, second, out = (x.new_empty(shape) for shape in shapes)
        experts.apply(out, x, w1, w2, weights, ids, silu, len(w1), None, None, None, first, second, None, False)
        return out

    return call


def _moe_config(layer: Layer, config: Any, activation: Any) -> Any:
    """vLLM's description of a layer on one device."""
    shape = layer.shape
    return config.FusedMoEConfig(
        num_experts=shape.experts,
        experts_per_token=shape.top,
        hidden_dim=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_logical_experts=shape.experts,
        activation=activation,
        device=layer.device,
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )


def _parts(w: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales, and a global scale for each expert, which the rows of one share here."""
    return w.qdata, w.block_scale, w.global_scale[:, 0].contiguous()


def _get(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _need_gpu(layer: Layer) -> None:
    if layer.device.type != "cuda":
        raise RuntimeError("runs on GPUs only")
