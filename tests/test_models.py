"""Whole models compiled: every real checkpoint in one graph, equal to its producer and to eager.

Implementations: transformers' grouped_mm (which load chooses) and batched_mm; fp32 and bf16.
"""

import pytest
import torch
from checkpoint_files import CHECKPOINTS, SMALL
from safetensors.torch import load_file

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.backend import collect_reports

pytest.importorskip("transformers")

# One activation of this model lies within fp32 rounding of a code boundary: see test_checkpoint.py.
BOUNDARY = "ct_mixtral_w4a4_mismatched_gate_up"
PACKED_OPS = {torch.ops.fx_nvfp4.linear, torch.ops.fx_nvfp4.grouped, torch.ops.fx_nvfp4.indexed}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def reference(name, device):
    ref = load_file(CHECKPOINTS[name] / "reference.safetensors", device=device)
    return ref["input_ids"], ref["logits_w4a16_f32" if "w4a16" in name else "logits_w4a4_f32"]


def packed_parameters(model):
    return {n for n, p in model.named_parameters() if isinstance(p.data, NVFP4Weight)}


def compiled_logits(model, input_ids, **options):
    """No torch.no_grad: the loaded model asks for no gradient, so the user need not either."""
    with collect_reports() as report:
        logits = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options=options)(input_ids).logits
    return logits, report


def away_from_boundary(name, error):
    return torch.cat([error[0], error[1, :7], error[2]]) if name == BOUNDARY else error


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_compiled_logits_are_the_producers_and_eagers(device, name):
    input_ids, expected = reference(name, device)
    model = fx_nvfp4.load(CHECKPOINTS[name], device, torch.float32, dialect="producer", progress=False)
    eager = model(input_ids).logits
    logits, report = compiled_logits(model, input_ids)
    assert away_from_boundary(name, (logits - expected).abs()).max() < 1e-4
    assert away_from_boundary(name, (logits - eager).abs()).max() < 1e-4
    assert {m.weight for m in report.matched} == packed_parameters(model)
    assert (report.graphs, report.refused) == (1, [])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_agrees_by_mean(device, name):
    # Single activations fall to the other side of a boundary when arithmetic changes in its last bit.
    input_ids, expected = reference(name, device)
    model = fx_nvfp4.load(CHECKPOINTS[name], device, progress=False)
    assert model.dtype == torch.bfloat16
    logits, _ = compiled_logits(model, input_ids, codegen=False)
    other = model(input_ids).logits
    assert (logits.float() - expected).abs().mean() < 0.4
    assert (logits.float() - other.float()).abs().mean() < 0.4


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if "mismatched" in n])
def test_vllms_shared_scales_are_its_own_logits_and_only_on_request(device, name):
    ref = load_file(CHECKPOINTS[name] / "reference.safetensors", device=device)
    model = fx_nvfp4.load(CHECKPOINTS[name], device, torch.float32, dialect="producer", progress=False)
    logits, report = compiled_logits(model, ref["input_ids"], shared_scales="vllm")
    shortcut, exact = (ref[f"logits_w4a4{kind}_f32"] for kind in ("_vllm_shortcut", ""))
    assert away_from_boundary(name, (logits - shortcut).abs()).max() < 1e-4
    assert (logits - exact).abs().max() > 1
    assert all("as vLLM" in note for note in report.notes)


@pytest.mark.in_part(4)
@pytest.mark.parametrize("lift", [True, False])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_both_expert_implementations_become_ops(device, implementation, lift):
    input_ids, expected = reference(SMALL.name, device)
    model = fx_nvfp4.load(SMALL, device, torch.float32, dialect="producer", progress=False)
    model.set_experts_implementation(implementation)
    logits, report = compiled_logits(model, input_ids, lift=lift)
    assert (logits - expected).abs().max() < 1e-4
    experts = {m.op for m in report.matched if m.experts}
    assert experts == {"moe" if lift else "grouped" if implementation == "grouped_mm" else "indexed"}
    assert all(block.lifted for block in report.blocks)
    assert bool(report.blocks) == lift
    assert {m.activations for m in report.matched if m.experts} == {"W4A4 static per-expert, modelopt rule"}


def test_the_eager_expert_loop_is_named_with_what_to_do():
    input_ids, _ = reference(SMALL.name, "cpu")
    model = fx_nvfp4.load(SMALL, progress=False)
    model.model.layers = model.model.layers[:1]
    model.set_experts_implementation("eager")
    report = fx_nvfp4.explain(model, input_ids[:1, :2])  # each expert that has a token is compiled by itself
    assert any('set_experts_implementation("grouped_mm")' in note for note in report.notes)


@pytest.mark.slow
def test_generation_with_a_compiled_model_equals_eager(device):
    input_ids, _ = reference(SMALL.name, device)
    model = fx_nvfp4.load(SMALL, device, torch.float32, progress=False)
    prompt = {"input_ids": input_ids[:1, :8], "attention_mask": torch.ones_like(input_ids[:1, :8])}
    eager = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    model.forward = torch.compile(model.forward, backend="nvfp4_emu", dynamic=True)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), eager)
