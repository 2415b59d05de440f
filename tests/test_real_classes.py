"""Model classes of transformers with packed weights: tiny, random, compiled in one graph, equal to eager.

CLASSES says what each class's experts become under each experts implementation; README has the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.report import Report

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, EXPERTS = 2, 4
COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


@dataclass(frozen=True)
class Class:
    """config: what differs from COMMON. how: experts implementation ("" is the class's own) -> op of the experts."""

    name: str
    config: dict[str, Any]
    how: dict[str, str]

    @property
    def config_class(self) -> str:
        return self.name.replace("ForCausalLM", "TextConfig" if self.name.startswith("Llama4") else "Config")


BOTH = {"grouped_mm": "moe", "batched_mm": "moe"}
DEEPSEEK = {
    "moe_intermediate_size": 48,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
CLASSES = [
    Class(
        "Qwen3MoeForCausalLM",
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
        BOTH,
    ),
    Class("MixtralForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}, BOTH),
    Class(
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        BOTH,
    ),
    Class(
        "Llama4ForCausalLM",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "head_dim": 16,
            "interleave_moe_layer_step": 1,
        },
        {"": "moe"},
    ),
    Class("GptOssForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16}, BOTH),
    Class("Glm4MoeForCausalLM", {**DEEPSEEK, "head_dim": 16}, BOTH),
    Class("OlmoeForCausalLM", {"num_experts": EXPERTS, "num_experts_per_tok": 2}, BOTH),
    Class("GraniteMoeForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}, BOTH),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def build(cls: Class, activations: str = "none", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model with its experts and linear layers packed, router, embeddings and head as they are."""
    if not hasattr(transformers, cls.name):
        pytest.skip(f"transformers {transformers.__version__} has no {cls.name}")
    config = getattr(transformers, cls.config_class)(**{**COMMON, **cls.config, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, cls.name)(config).to(dtype).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        for key, value in list(module.named_parameters(recurse=False)):
            if value.dim() == 3 or (type(module) is nn.Linear and "lm_head" not in name and key == "weight"):
                # Biases are random too, so that one which is left out shows.
                setattr(module, key, nn.Parameter(packed(value.data, module, activations), requires_grad=False))
            elif "bias" in key:
                value.data.normal_(std=0.1)
    return model


def packed(dense: Tensor, module: nn.Module, activations: str) -> NVFP4Weight:
    """A linear weight [N, K], or experts' [E, N, K] or, where their class stores it so, [E, K, N]."""
    scale = torch.tensor(0.02, dtype=torch.float64) if activations == "static" else None
    dense = torch.randn(dense.shape, generator=torch.Generator().manual_seed(dense.numel())) * dense.shape[-1] ** -0.5
    transposed = dense.dim() == 3 and (getattr(module, "is_transposed", False) or "Llama4" in type(module).__name__)
    rows = dense.mT.contiguous() if transposed else dense
    w = NVFP4Weight.from_dense(rows, activations=activations, act_scale=scale)
    return w.replace(transposed=True) if transposed else w


W4A4 = ("static", "dynamic")
CASES = [(cls, how, "none") for cls in CLASSES for how in cls.how]
CASES += [(cls, next(iter(cls.how)), W4A4[i % 2]) for i, cls in enumerate(CLASSES)]


def name_of(value: object) -> str:
    return value.name.removesuffix("ForCausalLM") if isinstance(value, Class) else str(value)


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(batch))


def check(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> Report:
    """The report of a model that gives eager's logits for each of the inputs, from one graph."""
    options = {"codegen": False, "strict": True}
    run = torch.compile(model, backend="nvfp4_emu", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad(), collect_reports() as report, torch.fx.experimental._config.patch(use_duck_shape=False):
        for ids in inputs:
            want, got = model(input_ids=ids).logits, run(input_ids=ids).logits
            assert float(want.std()) > 1e-3
            assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert (report.graphs, report.refused) == (1, [])
    return report


@pytest.mark.in_part(12)
@pytest.mark.parametrize(("cls", "how", "activations"), CASES, ids=name_of)
def test_experts_become_the_op_and_logits_are_eagers(cls, how, activations):
    model = build(cls, activations)
    if how:
        model.set_experts_implementation(how)
    report = check(model, tokens())
    experts = [m for m in report.matched if m.experts]
    # Llama 4's experts see all tokens, which a scale that is taken over their rows depends on.
    op = "batched" if (how, activations) == ("", "dynamic") else cls.how[how]
    assert {m.op for m in experts} == {op}
    assert {m.activations.split(",")[0] for m in experts} == {
        "W4A16" if activations == "none" else f"W4A4 {activations}"
    }
    assert [b.lifted for b in report.blocks] == [op == "moe"] * LAYERS
    # Every packed parameter runs as an op: experts, and all linear layers but the head.
    names = {n for n, p in model.named_parameters() if isinstance(p.data, NVFP4Weight)}
    assert {m.weight for m in report.matched} == names


@pytest.mark.in_part(3)
@pytest.mark.parametrize("cls", CLASSES[2:5], ids=name_of)
def test_prepacked_weights_give_the_same_logits_and_ops(cls):
    # DeepSeek-V3's low-rank projections do not fill tiles, and stay as they are.
    model = build(cls, "static", intermediate_size=128, moe_intermediate_size=64)
    if "" not in cls.how:
        model.set_experts_implementation(next(iter(cls.how)))
    with torch.no_grad():
        canonical = model(input_ids=tokens()).logits
        left = fx_nvfp4.prepack(model).left
        assert torch.equal(model(input_ids=tokens()).logits, canonical)
    report = check(model, tokens())
    assert all(("tiles" in m.source) != (m.weight in left) for m in report.matched)
    assert all("tiles" in m.source for m in report.matched if m.experts)
    assert [b.lifted for b in report.blocks] == [True] * LAYERS


@pytest.mark.in_part(8)
@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_one_graph_for_any_number_of_tokens(cls):
    model = build(cls, num_hidden_layers=1)
    if "" not in cls.how:
        model.set_experts_implementation("grouped_mm")
    check(model, tokens(2, 7), tokens(3, 5), dynamic=True)
