"""The model: a small Qwen3-MoE of transformers over bytes, stored and loaded as any of its checkpoints."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .presets import Preset


def build(preset: Preset) -> Any:
    """With random weights, in float32."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        num_experts=preset.experts,
        num_experts_per_tok=preset.top,
        norm_topk_prob=True,
        moe_intermediate_size=preset.inner,
        max_position_embeddings=preset.context,
        experts_implementation="grouped_mm",
        router_aux_loss_coef=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_dense(folder: Path) -> Any:
    """What :func:`store` wrote, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model


def for_evaluation(model: nn.Module, device: torch.device) -> nn.Module:
    """With weights in bfloat16, as published checkpoints are; what is computed from the config, as rotations, stays."""
    model.to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two configs are of models with weights of the same shapes."""
    sizes = ("num_hidden_layers", "num_experts", "hidden_size", "moe_intermediate_size", "num_attention_heads")
    return all(getattr(a, name) == getattr(b, name) for name in sizes)
