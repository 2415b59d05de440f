"""Names, dtypes, shapes and config of Qwen3-MoE checkpoints as ModelOpt and llm-compressor write them, W4A4.

The default sizes are those of Qwen3-30B-A3B; with them the layouts are those of nvidia/Qwen3-30B-A3B-NVFP4 and of
RedHatAI/Qwen3-30B-A3B-NVFP4. A test compares both with small checkpoints of the real producers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoints.describe import hf_quant_config, quantization_config
from ..checkpoints.formats import COMPRESSED_TENSORS, MODELOPT, Convention
from ..format import BLOCK, TWO_LEVEL_MAX
from .tensors import RandomTensor, global_scale

LAYOUTS = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}
_AMAX = 6.0  # of normalised activations, as a calibration would find it


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Qwen3-MoE model.

    Raises:
        ValueError: a size is not positive, or an input dim no multiple of 16.
    """

    layers: int = 48
    experts: int = 128
    top: int = 8
    hidden: int = 2048
    intermediate: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151936

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % BLOCK:
                raise ValueError(f"{name} must be a multiple of {BLOCK}, the block of NVFP4, got {getattr(self, name)}")
        if self.top > self.experts or self.heads % self.kv_heads or self.heads * self.head_dim % BLOCK:
            raise ValueError(
                "top must be at most experts, heads a multiple of kv_heads, and heads * head_dim a multiple "
                f"of {BLOCK}, got {self}"
            )

    @property
    def weights(self) -> int:
        """How many numbers the packed weights hold."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.experts * self.hidden * self.intermediate)


def tensors(sizes: Sizes, like: str, generator: np.random.Generator) -> Iterator[RandomTensor]:
    """All tensors, in the order in which they go to shards; the generator draws global scales.

    like: a name in :data:`LAYOUTS`. Every expert and projection has a global scale of its own, every expert an
    activation scale, which gate and up share.
    """
    convention = LAYOUTS[like]
    hidden, wide = sizes.hidden, sizes.heads * sizes.head_dim
    yield _dense("model.embed_tokens.weight", sizes.vocabulary, hidden)
    for layer in range(sizes.layers):
        yield from _layer(f"model.layers.{layer}", sizes, wide, convention, generator)
    yield _ones("model.norm.weight", hidden)
    yield _dense("lm_head.weight", sizes.vocabulary, hidden)


def _layer(
    layer: str, sizes: Sizes, wide: int, convention: Convention, generator: np.random.Generator
) -> Iterator[RandomTensor]:
    def packed(name: str, rows: int, cols: int, amax: float) -> Iterator[RandomTensor]:
        yield from _packed(f"{layer}.{name}", rows, cols, amax, convention, generator)

    hidden, narrow = sizes.hidden, sizes.kv_heads * sizes.head_dim
    yield from packed("self_attn.q_proj", wide, hidden, _AMAX)
    for name in "kv":
        yield from packed(f"self_attn.{name}_proj", narrow, hidden, _AMAX)
        if convention is MODELOPT:  # of the FP8 KV cache
            yield RandomTensor(f"{layer}.self_attn.{name}_proj.{name}_scale", "F32", (), 0.01)
    yield from packed("self_attn.o_proj", hidden, wide, _AMAX)
    for name in "qk":
        yield _ones(f"{layer}.self_attn.{name}_norm.weight", sizes.head_dim)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _ones(f"{layer}.{name}.weight", hidden)
    yield _dense(f"{layer}.mlp.gate.weight", sizes.experts, hidden)
    for expert in range(sizes.experts):
        amax = _AMAX * generator.uniform(0.5, 1)
        for name in ("gate_proj", "up_proj"):
            yield from packed(f"mlp.experts.{expert}.{name}", sizes.intermediate, hidden, amax)
        yield from packed(f"mlp.experts.{expert}.down_proj", hidden, sizes.intermediate, amax)


def _packed(
    name: str, rows: int, cols: int, amax: float, convention: Convention, generator: np.random.Generator
) -> Iterator[RandomTensor]:
    """Codes and scales of one weight [rows, cols] that keeps the size of normalised inputs."""
    weight_scale = global_scale(cols**-0.5 * generator.uniform(0.5, 1))
    shape = (1,) if convention.reciprocal else ()
    yield RandomTensor(f"{name}.{convention.codes}", "U8", (rows, cols // 2))
    yield RandomTensor(f"{name}.{convention.block_scale}", "F8_E4M3", (rows, cols // BLOCK))
    for leaf, scale in ((convention.global_scale, weight_scale), (convention.input_scales[0], amax / TWO_LEVEL_MAX)):
        yield RandomTensor(f"{name}.{leaf}", "F32", shape, 1 / scale if convention.reciprocal else scale)


def _dense(name: str, rows: int, cols: int) -> RandomTensor:
    return RandomTensor(name, "BF16", (rows, cols), cols**-0.5)


def _ones(name: str, size: int) -> RandomTensor:
    return RandomTensor(name, "BF16", (size,))


def configs(sizes: Sizes, like: str) -> dict[str, dict[str, Any]]:
    """The JSON files beside the tensors, by file name."""
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(sizes.layers)]
    convention = LAYOUTS[like]
    if convention is COMPRESSED_TENSORS:
        stated = quantization_config(convention, "static", [*gates, "lm_head"])
        return {"config.json": {**_model_config(sizes), "quantization_config": stated}}
    ignored = ["lm_head", "model.embed_tokens", *gates]
    cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    stated = {**quantization_config(convention, "static", ignored), "kv_cache_scheme": cache}
    return {
        "config.json": {**_model_config(sizes), "quantization_config": stated},
        "hf_quant_config.json": hf_quant_config("static", ignored, "FP8"),
    }


def _model_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": sizes.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
    }
