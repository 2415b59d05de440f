"""Real checkpoints by real producers load packed, and compute what their producers compute."""

import logging
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    CHECKPOINTS,
    SMALL,
    Allocations,
    as_compressed_tensors,
    edited,
    never_calibrated,
    read,
    sharded,
    torchao_with_input_scales,
)
from safetensors.torch import load_file

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4
from fx_nvfp4 import reference as bodies
from fx_nvfp4.checkpoint import load
from fx_nvfp4.checkpoints.scheme import read_scheme, without_quantization
from fx_nvfp4.layouts import is_tiled
from fx_nvfp4.prepack import supports

transformers = pytest.importorskip("transformers")

MISMATCHED = [name for name in CHECKPOINTS if "mismatched" in name]
# Here one input of layer 0's o_proj (sequence 1, token 7) lies at 5.000000 between two codes, and falls to the
# other side when the global scale multiplies the sum instead of each weight.
BOUNDARY = "ct_mixtral_w4a4_mismatched_gate_up"
TIGHT = 1e-4


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def target(name):
    """(input ids, the producer's float32 logits, all references)."""
    ref = load_file(CHECKPOINTS[name] / "reference.safetensors")
    return ref["input_ids"], ref["logits_w4a16_f32" if "w4a16" in name else "logits_w4a4_f32"], ref


def float32(name, dialect="producer"):
    return load(CHECKPOINTS[name], dtype=torch.float32, dialect=dialect, progress=False)


def dequantise_first(x, qdata, block_scale, global_scale, act):
    """A product in the producers' arithmetic: both operands dequantised in x's dtype, then multiplied."""
    x = x if act.mode == "none" else nvfp4.fake_quantize(x, act.scale, act.dialect)
    return x @ nvfp4.dequantize(qdata, bodies.as_e4m3(block_scale), global_scale.unsqueeze(-1), x.dtype).T


@pytest.fixture
def producers_arithmetic(monkeypatch):
    monkeypatch.setenv("FX_NVFP4_CPU", "plain")
    monkeypatch.setattr(bodies, "matmul", dequantise_first)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_the_producers(name):
    """Guards the sense of global scales (divisor or multiplier), gate/up order, interleaving, transposition."""
    input_ids, expected, _ = target(name)
    error = (logits(float32(name), input_ids) - expected).abs()
    if name == BOUNDARY:
        error = torch.cat([error[0], error[1, :7], error[2]])
    assert error.max() < TIGHT


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hardware_dialect_agrees_by_mean(name):
    """In float32 and normal scales the rules differ at exact ties only."""
    input_ids, expected, _ = target(name)
    assert (logits(float32(name, "hardware"), input_ids) - expected).abs().mean() < 0.05


@pytest.mark.skipif(BOUNDARY not in CHECKPOINTS, reason="needs the fixture checkpoints")
def test_only_the_order_of_multiplications_differs_at_a_boundary(producers_arithmetic):
    """The one activation that BOUNDARY names is no error of loading: the producer's arithmetic meets its logits."""
    input_ids, expected, _ = target(BOUNDARY)
    assert (logits(float32(BOUNDARY), input_ids) - expected).abs().max() < TIGHT


@pytest.mark.parametrize("name", MISMATCHED)
def test_shortcut_for_different_scales_is_not_taken(name):
    """Gate's scale for up, or the experts' largest input scale for all, would give these logits."""
    input_ids, expected, ref = target(name)
    result = logits(float32(name), input_ids)
    assert (result - ref["logits_w4a4_vllm_shortcut_f32"]).abs().mean() > 0.1
    assert (result - expected).abs().mean() < 0.05


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_moe_block_is_the_producers(name):
    _, _, ref = target(name)
    if "moe.f32.top_k_index" not in ref:
        pytest.skip("this family saves no float32 routing")
    experts = float32(name).model.layers[1].mlp.experts
    if name == "torchao_qwen3moe":
        # Its producer saved the block of the run without activation quantisation.
        for leaf in ("gate_up_proj", "down_proj"):
            plain = getattr(experts, leaf).replace(activations="none")
            setattr(experts, leaf, torch.nn.Parameter(plain, requires_grad=False))
    out = experts(*(ref[f"moe.f32.{key}"] for key in ("hidden_states", "top_k_index", "top_k_weights")))
    assert (out - ref["moe.f32.out"]).abs().max() < TIGHT


BF16_BLOCKS = {
    "modelopt_mixtral_w4a4": "model.layers.1.mlp.experts",
    "modelopt_llama4_w4a4_3d": "language_model.model.layers.1.feed_forward.experts",
    "ct_qwen3moe_w4a4": "model.layers.1.mlp.experts",
    "quark_qwen3moe_w4a4": "model.layers.1.mlp.experts",
}


@pytest.mark.parametrize("name", [n for n in BF16_BLOCKS if n in CHECKPOINTS])
def test_producer_dialect_is_the_producers_rule_in_bf16(name, producers_arithmetic):
    """In bf16 the rules differ: with a wrong one some activation takes another code and errors exceed 1."""
    _, _, ref = target(name)
    model = load(CHECKPOINTS[name], dialect="producer", progress=False)
    if "top_k_index" in "".join(ref):
        model.set_experts_implementation("eager")
    keys = [f"moe.bf16.{key}" for key in ("hidden_states", "top_k_index", "top_k_weights")]
    out = model.get_submodule(BF16_BLOCKS[name])(*(ref[key] for key in keys if key in ref))
    assert (out - ref["moe.bf16.out"]).abs().max() < 0.05


@pytest.mark.skipif("torchao_qwen3moe" not in CHECKPOINTS, reason="needs the fixture checkpoints")
def test_torchao_swizzle_is_undone():
    _, _, ref = target("torchao_qwen3moe")
    model = float32("torchao_qwen3moe")
    saved = {key.removeprefix("dequant_f32."): v for key, v in ref.items() if key.startswith("dequant_f32.")}
    assert len(saved) == 2
    for parameter, expected in saved.items():
        assert torch.equal(model.get_parameter(parameter).dequantize()[: len(expected)], expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prepacked_weights_compute_the_same(name, caplog):
    folder, ids = CHECKPOINTS[name], target(name)[0]
    plain = load(folder, progress=False)  # on a CPU, nothing is prepacked unless asked for
    with caplog.at_level(logging.INFO, "fx_nvfp4"):
        model = load(folder, prepack=True, progress=False)
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, NVFP4Weight)}
    tiled = {n for n, p in packed.items() if is_tiled(p.qdata)}
    # Experts of one layer are multiplied by one op, and keep one layout.
    odd = {n for n, p in packed.items() if not supports(*p.sizes[-2:])}
    odd |= {
        n for n, p in packed.items() if p.dim() == 3 and any(o.rpartition(".")[0] == n.rpartition(".")[0] for o in odd)
    }
    assert tiled == packed.keys() - odd
    assert tiled
    assert f"prepack: {len(tiled)} packed weights put into tiles, {len(packed) - len(tiled)} left" in caplog.text
    assert not any(is_tiled(p.qdata) for p in plain.parameters() if isinstance(p, NVFP4Weight))
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_no_dense_copy_is_made_on_the_way():
    with Allocations() as allocations:
        model = load(SMALL, progress=False)
    packed = {n: p for n, p in model.named_parameters() if "proj" in n}
    assert len(packed) == 12
    assert all(isinstance(p, NVFP4Weight) for p in packed.values())
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert experts.numel() > model.lm_head.weight.numel() == allocations.largest
    assert allocations.bytes < 1.25 * (SMALL / "model.safetensors").stat().st_size


def test_shards_give_the_same_model(tmp_path):
    input_ids, _, _ = target(SMALL.name)
    model = load(sharded(tmp_path), dtype=torch.float32, dialect="producer", progress=False)
    assert torch.equal(logits(model, input_ids), logits(float32(SMALL.name), input_ids))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_dtype_is_that_of_all_parameters(dtype):
    model = load(SMALL, dtype=dtype, progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    # Rotary tables are computed in float32 whatever the model's dtype, and are no leftovers of the empty model.
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, 1e6 ** (-torch.arange(8) / 8))


def test_gate_up_and_experts_keep_their_own_scales(tmp_path):
    """Different scales must not be merged by maximum, or by taking gate's."""
    expected = torch.arange(1, 9).float().view(4, 2) / 1024

    def spread(config, tensors):
        for e in range(4):
            prefix = f"model.layers.0.block_sparse_moe.experts.{e}"
            tensors[f"{prefix}.w1.weight_scale_2"], tensors[f"{prefix}.w3.weight_scale_2"] = expected[e]
            tensors[f"{prefix}.w2.input_scale"] = expected[e, 0]

    experts = load(edited(tmp_path, spread), progress=False).model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj.global_scale, expected.repeat_interleave(48, dim=1))
    assert torch.equal(experts.down_proj.act_scale, expected[:, 0].double())


def test_compressed_tensors_conventions(tmp_path):
    """Stored divisors become multipliers: fp32 for weights, float64 for activations, whose fp32 reciprocal is the
    stored number bit for bit."""
    converted = load(edited(tmp_path, as_compressed_tensors), progress=False).model.layers[1].mlp.experts
    expected = load(SMALL, progress=False).model.layers[1].mlp.experts
    _, stored = read(tmp_path)
    for leaf in ("gate_up_proj", "down_proj"):
        weight, other = getattr(converted, leaf), getattr(expected, leaf)
        assert torch.equal(weight.qdata, other.qdata)
        torch.testing.assert_close(weight.global_scale, other.global_scale, rtol=1e-7, atol=0)
    for e in range(4):
        divisor = stored[f"model.layers.1.block_sparse_moe.experts.{e}.down_proj.input_global_scale"]
        assert (1 / converted.down_proj.act_scale[e]).float() == divisor


def test_weights_only_checkpoint_leaves_activations_alone(tmp_path):
    def weights_only(config, tensors):
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        for name in [n for n in tensors if n.endswith("input_scale")]:
            del tensors[name]

    input_ids, _, ref = target(SMALL.name)
    model = load(edited(tmp_path, weights_only), dtype=torch.float32, progress=False)
    assert model.model.layers[0].self_attn.q_proj.weight.activations == "none"
    assert (logits(model, input_ids) - ref["logits_w4a16_f32"]).abs().max() < TIGHT


def test_weights_of_a_w4a4_checkpoint_alone(tmp_path):
    """Experts that saw no token in calibration have no usable input scale: the weights still can be used."""
    input_ids, _, ref = target(SMALL.name)
    model = load(edited(tmp_path, never_calibrated), dtype=torch.float32, activations="none", progress=False)
    assert (logits(model, input_ids) - ref["logits_w4a16_f32"]).abs().max() < TIGHT


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_alone_quantise_no_activations(name):
    packed = [
        p for p in load(CHECKPOINTS[name], activations="none", progress=False).parameters() if type(p) is NVFP4Weight
    ]
    assert packed
    assert {(p.activations, p.act_scale) for p in packed} == {("none", None)}


@pytest.mark.skipif("torchao_qwen3moe" not in CHECKPOINTS, reason="needs the fixture checkpoints")
def test_weights_alone_of_a_torchao_checkpoint_without_usable_input_scales(tmp_path):
    torchao_with_input_scales(tmp_path, [torch.nan, None])
    packed = [p for p in load(tmp_path, activations="none", progress=False).parameters() if type(p) is NVFP4Weight]
    assert {p.activations for p in packed} == {"none"}


def test_layers_that_are_not_quantised_are_stacked_dense(tmp_path):
    """Producers exclude whole layers; their experts come one by one in bf16 and belong in the same 3-D parameter."""
    layer = "model.layers.1.block_sparse_moe.experts"
    expected = load(SMALL, dtype=torch.float32, progress=False).model.layers[1].mlp.experts

    def unpack(config, tensors):
        for e in range(4):
            for projection in ("w1", "w2", "w3"):
                module = f"{layer}.{e}.{projection}"
                parts = [tensors.pop(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")]
                tensors.pop(f"{module}.input_scale")
                tensors[f"{module}.weight"] = nvfp4.dequantize(*parts)

    model = load(edited(tmp_path, unpack), dtype=torch.float32, progress=False)
    for leaf in ("gate_up_proj", "down_proj"):
        assert torch.equal(model.model.layers[1].mlp.experts.get_parameter(leaf), getattr(expected, leaf).dequantize())
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, NVFP4Weight)


def test_tied_embeddings_share_one_tensor(tmp_path):
    def tie(config, tensors):
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]

    model = load(edited(tmp_path, tie), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, read(SMALL)[1]["model.embed_tokens.weight"])


def test_a_packed_head_stays_apart_from_embeddings_whatever_the_config_says(tmp_path):
    """transformers compares the two, which ended in an error that named neither."""

    def pack(config, tensors):
        config["tie_word_embeddings"] = True
        w = NVFP4Weight.from_dense(tensors["lm_head.weight"].float())
        parts = {"weight": w.qdata, "weight_scale": w.block_scale, "weight_scale_2": w.global_scale[0].clone()}
        tensors.update({f"lm_head.{name}": part for name, part in parts.items()})
        tensors["lm_head.input_scale"] = torch.tensor(0.01)

    model = load(edited(tmp_path, pack), progress=False)
    assert isinstance(model.lm_head.weight.data, NVFP4Weight)
    assert not isinstance(model.model.embed_tokens.weight.data, NVFP4Weight)


def test_older_modelopt_exports_state_the_scheme_in_a_file_of_their_own(tmp_path):
    edited(tmp_path, lambda config, tensors: config.pop("quantization_config"))
    (tmp_path / "hf_quant_config.json").write_bytes((SMALL / "hf_quant_config.json").read_bytes())
    assert load(tmp_path, progress=False).lm_head.weight.dtype == torch.bfloat16


FP8_CONFIGS = [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
]


@pytest.mark.parametrize("stale", FP8_CONFIGS)
def test_modelopts_own_file_overrules_the_config_of_the_fp8_original(stale, tmp_path):
    edited(tmp_path, lambda config, tensors: config.update(quantization_config=stale))
    (tmp_path / "hf_quant_config.json").write_bytes((SMALL / "hf_quant_config.json").read_bytes())
    assert load(tmp_path, progress=False).model.layers[0].self_attn.q_proj.weight.activations == "static"


def test_modelopt_entries_may_be_nested_in_quantization(tmp_path):
    def nest(config, tensors):
        nested = {"quant_algo": "NVFP4", "group_size": 16}
        config["quantization_config"] = {"quant_method": "modelopt", "quantization": nested}

    model = load(edited(tmp_path, nest), progress=False)
    assert model.model.layers[0].self_attn.q_proj.weight.activations == "static"


def test_quantization_config_of_a_nested_config():
    quantization = read(SMALL)[0]["quantization_config"]
    config = {"vision_config": {"hidden_size": 8}, "text_config": {"quantization_config": quantization}}
    assert read_scheme(SMALL, config, {}).activations == "static"
    assert without_quantization(config) == {"vision_config": {"hidden_size": 8}, "text_config": {}}


@pytest.mark.skipif("modelopt_llama4_w4a4_3d" not in CHECKPOINTS, reason="needs the fixture checkpoints")
def test_model_is_built_without_a_nested_quantization_config(tmp_path):
    def nest(config, tensors):
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    model = load(edited(tmp_path, nest, CHECKPOINTS["modelopt_llama4_w4a4_3d"]), progress=False)
    assert not hasattr(model.config.text_config, "quantization_config")
    assert any(isinstance(p, NVFP4Weight) for p in model.parameters())


def test_device_zero_is_not_the_cpu():
    """A falsy device must not be taken for none; where there is no accelerator, that is said."""
    if torch.accelerator.is_available():
        assert load(SMALL, device=0, progress=False).lm_head.weight.device.index == 0
    else:
        with pytest.raises(ValueError, match=r'load: device 0: .*; "cpu" and, with a GPU, "cuda" are there'):
            load(SMALL, device=0, progress=False)


def test_generation_config_is_taken_over(tmp_path):
    edited(tmp_path, lambda config, tensors: None)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert load(tmp_path, progress=False).generation_config.max_new_tokens == 7


def test_experts_run_as_one_graph_whatever_the_config_says(tmp_path, caplog):
    """transformers' eager loop over the experts hit cannot be traced."""
    edited(tmp_path, lambda config, tensors: config.update(experts_implementation="eager"))
    with caplog.at_level(logging.INFO, "fx_nvfp4.checkpoint"):
        model = load(tmp_path, progress=False)
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    assert "grouped_mm" in caplog.text


def test_layers_past_the_last_are_skipped_with_one_warning(tmp_path, caplog):
    """Layers for multi-token prediction, of a class that does not say that it ignores them."""

    def add_layer(config, tensors):
        for name in [n for n in tensors if "layers.1." in n]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name]
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128).bfloat16()

    edited(tmp_path, add_layer)
    with pytest.raises(fx_nvfp4.CheckpointError, match="belongs nowhere"):
        load(tmp_path, progress=False)  # or a config with too few layers would cost the model its last

    edited(tmp_path, lambda config, tensors: (add_layer(config, tensors), config.update(num_nextn_predict_layers=1)))
    load(tmp_path, progress=False)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "model.layers.2.block_sparse_moe" in record.getMessage()
    assert "past the 2" in record.getMessage()


def test_kv_cache_scales_are_announced_once(tmp_path, caplog):
    def add(config, tensors):
        for layer in range(2):
            for key in "kv":
                tensors[f"model.layers.{layer}.self_attn.{key}_proj.{key}_scale"] = torch.tensor(0.5)

    load(edited(tmp_path, add), progress=False)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "KV cache is not emulated" in record.getMessage()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_patterns_of_extra_layers_do_not_take_real_ones(name, monkeypatch):
    """A class lists the extra layers of all its checkpoints (Glm4Moe: 46 and 92); the larger has a real layer 46."""
    model_class = getattr(transformers, read(CHECKPOINTS[name])[0]["architectures"][0])
    expected = load(CHECKPOINTS[name], progress=False).state_dict()
    monkeypatch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", [r"layers\.1"])
    found = load(CHECKPOINTS[name], progress=False).state_dict()
    assert found.keys() == expected.keys()
    assert any("layers.1." in key and isinstance(value, NVFP4Weight) for key, value in found.items())


def test_extra_layers_that_the_class_names_are_ignored(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transformers.MixtralForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"layers\.1"])

    def add_layer(config, tensors):
        for name in [n for n in tensors if "layers.1." in n]:
            tensors[name.replace("layers.1.", "layers.10.")] = tensors[name]
        tensors["model.layers.10.eh_proj.weight"] = torch.ones(64, 128).bfloat16()

    model = load(edited(tmp_path, add_layer), progress=False)
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, NVFP4Weight)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_progress_bar_can_be_turned_off(capsys):
    load(SMALL, progress=False)
    assert "NVFP4 checkpoint" not in capsys.readouterr().err
    load(str(SMALL))
    assert "NVFP4 checkpoint" in capsys.readouterr().err


def test_path_may_be_relative(monkeypatch):
    monkeypatch.chdir(SMALL.parent)
    assert load(Path(SMALL.name), progress=False).config.model_type == "mixtral"
