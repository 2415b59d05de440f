"""save: what real producers wrote comes back byte for byte, what we quantise reads like theirs, to their code too."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import CHECKPOINTS, SMALL, Tensors, read
from quantized_models import Experts, token_ids, transformers_model
from safetensors.torch import load_file
from torch import nn

import fx_nvfp4
from fx_nvfp4 import CheckpointError, NVFP4Config, NVFP4Weight, calibrate, quantize_, save
from fx_nvfp4.checkpoints.pieces import reciprocal
from fx_nvfp4.checkpoints.reader import Reader
from fx_nvfp4.format import scale_pair

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("Qwen3Moe", "Mixtral", "Llama4", "GptOss")
PRODUCERS = ("modelopt", "compressed-tensors")
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
REAL = {name: folder for name, folder in CHECKPOINTS.items() if name.startswith(("modelopt", "ct_"))}


def producer_of(name: str) -> str:
    return "modelopt" if name.startswith("modelopt") else "compressed-tensors"


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def quantized(model: nn.Module, **changes) -> nn.Module:
    quantize_(model, NVFP4Config(**{"activations": "static", **changes}))
    if changes.get("activations", "static") == "static":
        with torch.no_grad(), calibrate(model):
            model(token_ids())
    return model


def loaded(folder: Path, **options) -> nn.Module:
    return fx_nvfp4.load(folder, progress=False, **options)


# What real producers wrote


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_a_real_checkpoint_comes_back_byte_for_byte(name, prepack, tmp_path):
    save(loaded(REAL[name], prepack=prepack), tmp_path, producer_of(name))
    config, tensors = read(REAL[name])
    our_config, ours = read(tmp_path)
    # Scales of a quantised KV cache are not loaded, which load logs.
    tensors = {n: t for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))}
    assert ours.keys() == tensors.keys()
    for n, t in tensors.items():
        assert (ours[n].dtype, ours[n].shape) == (t.dtype, t.shape), n
        assert torch.equal(raw(ours[n]), raw(t)), n
    theirs, described = config["quantization_config"], our_config["quantization_config"]
    theirs.pop("kv_cache_scheme", None)
    described.pop("kv_cache_scheme", None)
    if not any("*" in pattern for pattern in theirs["ignore"]):
        assert sorted(described.pop("ignore")) == sorted(theirs.pop("ignore"))
        assert described == theirs


def test_modelopts_own_file_is_written_beside(tmp_path):
    save(loaded(SMALL), tmp_path)
    ours, theirs = (json.loads((folder / "hf_quant_config.json").read_text()) for folder in (tmp_path, SMALL))
    assert ours == theirs
    assert (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("name", REAL)
def test_a_model_of_the_same_config_gets_the_same_names_dtypes_and_shapes(name, tmp_path):
    if "llama4" in name:
        pytest.skip("its producer left the vision tower out by a recipe of its own")
    config, tensors = read(REAL[name])
    del config["quantization_config"]
    model_config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16).eval()
    activations = "none" if "w4a16" in name else "static"
    save(quantized(model, activations=activations), tmp_path, producer_of(name))
    described = {n: (t.dtype, tuple(t.shape)) for n, t in read(tmp_path)[1].items()}
    expected = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))}
    assert described == expected


# What we quantise


def check_equal(a: NVFP4Weight, b: NVFP4Weight) -> None:
    for part in ("qdata", "block_scale", "global_scale"):
        assert torch.equal(raw(getattr(a, part)), raw(getattr(b, part))), part
    assert (a.activations, a.transposed, a.dtype) == (b.activations, b.transposed, b.dtype)
    if a.act_scale is None:
        assert b.act_scale is None
        return
    # The two numbers that enter the arithmetic: fp32 multiplier and reciprocal.
    for x, y in zip(scale_pair(a.act_scale, "cpu"), scale_pair(b.act_scale, "cpu"), strict=True):
        assert torch.equal(x.expand(y.shape) if y.dim() else x.reshape(-1)[0], y)


@pytest.mark.parametrize("activations", ["static", "none"])
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bytes_and_logits_are_loaded_again(family, producer, activations, tmp_path):
    model = quantized(transformers_model(family), activations=activations, block_scale="mse")
    save(model, tmp_path, producer)
    again = loaded(tmp_path)
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        if isinstance(parameter.data, NVFP4Weight):
            check_equal(parameter.data, theirs[name].data)
        else:
            assert torch.equal(parameter, theirs[name]), name
    model.set_experts_implementation(again.config._experts_implementation)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_gate_and_up_apart_need_a_form_that_stores_them_apart(tmp_path):
    model = transformers_model("Llama4")
    quantize_(model, NVFP4Config(activations="static"), lambda module, fqn: ".0." in fqn)
    quantized(model, global_scale="projection")
    with pytest.raises(
        CheckpointError,
        match=r"layers\.1\.feed_forward\.experts\.gate_up_proj: found rows with different global scales",
    ):
        save(model, tmp_path / "modelopt", shard_size=20_000)
    assert list((tmp_path / "modelopt").iterdir()) == []
    save(model, tmp_path / "apart", "compressed-tensors")
    experts = "model.layers.1.feed_forward.experts.gate_up_proj"
    check_equal(model.get_parameter(experts).data, loaded(tmp_path / "apart").get_parameter(experts).data)


def test_several_files_hold_the_same_and_none_is_too_large(tmp_path):
    model = quantized(transformers_model("Mixtral"))
    save(model, tmp_path / "one")
    save(model, tmp_path / "several", shard_size=20_000)
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    shards = [load_file(file) for file in files]
    assert max(sum(t.nbytes for t in shard.values()) for shard in shards) <= 20_000
    whole = read(tmp_path / "one")[1]
    joined: Tensors = {name: t for shard in shards for name, t in shard.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(raw(joined[name]), raw(t)) for name, t in whole.items())
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    Reader(tmp_path / "several")  # cross-checks index and files


def test_saving_over_an_older_checkpoint_leaves_nothing_of_it(tmp_path):
    model = quantized(transformers_model("Mixtral"))
    save(model, tmp_path, shard_size=20_000)
    save(model, tmp_path, "compressed-tensors", shard_size=40_000)
    loaded(tmp_path)
    save(model, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    loaded(tmp_path)


def test_what_cannot_be_described_leaves_the_older_checkpoint(tmp_path):
    """The new weights were written first, beside a config of the old ones."""
    model = quantized(transformers_model("Mixtral"))
    save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.config.strange = {1, 2}  # no JSON has sets
    with pytest.raises(TypeError):
        save(model, tmp_path, "compressed-tensors")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_of_another_producer_and_odd_generation_settings(tmp_path):
    """One that says ModelOpt stayed beside compressed-tensors' weights; settings that transformers calls invalid, which
    published models have, ended the call when all weights were written."""
    model = quantized(transformers_model("Mixtral"))
    save(model, tmp_path)
    model.generation_config.temperature = 0.6  # without do_sample
    save(model, tmp_path, "compressed-tensors")
    assert not (tmp_path / "hf_quant_config.json").exists()
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_tied_heads_are_stored_once(tmp_path):
    model = quantized(transformers_model("Qwen3Moe", tie_word_embeddings=True))
    save(model, tmp_path)
    assert "lm_head.weight" not in read(tmp_path)[1]
    again = loaded(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_scales_that_no_reciprocal_leads_back_to_are_told(tmp_path, caplog):
    # A multiplier of ModelOpt's may have none; the hardware's rule chooses one that has.
    for dialect, told in (("modelopt", True), ("hardware", False), ("compressed-tensors", False)):
        caplog.clear()
        model = transformers_model("Mixtral")
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = 4.125  # no fp32 number's reciprocal is 4.125 / (6 * 448)
        save(quantized(model, dialect=dialect), tmp_path, "compressed-tensors")
        assert ("move by a unit in the last place" in caplog.text) == told


def test_of_several_reciprocals_the_roundest_is_stored():
    rounded = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 9e3 + 1).bfloat16().float()
    scale = (1.0 / rounded.double()).float()
    assert torch.equal(reciprocal(scale), rounded)
    assert not torch.equal(1.0 / scale, rounded)


# Errors


def test_what_the_forms_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"producer must be one of \['compressed-tensors', 'modelopt'\], got 'quark'"):
        save(transformers_model("Mixtral"), tmp_path, "quark")
    with pytest.raises(TypeError, match=r"expected a transformers model, got Experts; .*save_file"):
        save(Experts(), tmp_path)
    with pytest.raises(ValueError, match="no packed weight"):
        save(transformers_model("Mixtral"), tmp_path)
    dynamic = quantized(transformers_model("Mixtral"), activations="dynamic")
    with pytest.raises(ValueError, match=r"has dynamic activations; these forms have static scales only"):
        save(dynamic, tmp_path)
    waiting = transformers_model("Mixtral")
    quantize_(waiting, NVFP4Config(activations="static"))
    with pytest.raises(ValueError, match=r"has uncalibrated activations; run data"):
        save(waiting, tmp_path)
    mixed = transformers_model("Mixtral")
    quantize_(mixed, NVFP4Config(), lambda module, fqn: fqn.endswith("q_proj"))
    with pytest.raises(ValueError, match=r"q_proj\.weight is weight-only and .* is not"):
        save(quantized(mixed), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("producer", PRODUCERS)
def test_experts_of_unknown_names_are_refused(producer, tmp_path):
    # Granite's checkpoints hold input_linear.weight [E, 2 I, H], which no producer's loader expects to be packed.
    model = quantized(transformers_model("GraniteMoe"))
    with pytest.raises(CheckpointError, match=r"linear\.weight: found packed experts of a name that loaders"):
        save(model, tmp_path, producer)


def test_names_that_prepare_changed_are_refused(tmp_path):
    model = quantized(transformers_model("Mixtral"))
    fx_nvfp4.prepare(model)
    save(model, tmp_path / "nothing was fused")
    model.nvfp4_preparation.fused.append("a list")
    with pytest.raises(ValueError, match=r"save, then prepare"):
        save(model, tmp_path)


# The producers' own code


def modules_of(folder: Path, codes: str) -> dict[str, Tensors]:
    """Tensors of each packed module by their last name."""
    tensors = read(folder)[1]
    names = [n.rpartition(".")[0] for n, t in tensors.items() if n.endswith(f".{codes}") and t.dtype == torch.uint8]
    return {name: {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{name}.")} for name in names}


def dense_and_ours(model: nn.Module, dense: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer's weight before, and dequantised after quantisation."""
    return dense.get_submodule(name).weight, model.get_submodule(name).weight.dequantize(torch.float32)


@pytest.mark.parametrize("activations", ["static", "none"])
def test_compressed_tensors_own_code_reads_it_and_writes_the_same(activations, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from compressed_tensors.quantization.utils import generate_gparam

    dense = transformers_model("Qwen3Moe")
    model = quantized(
        transformers_model("Qwen3Moe"),
        activations=activations,
        dialect="compressed-tensors",
        global_scale="projection",
    )
    save(model, tmp_path, "compressed-tensors")
    config = QuantizationConfig.model_validate(read(tmp_path)[0]["quantization_config"])
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    assert set(config.ignore) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    scheme = config.config_groups["group_0"]
    modules = modules_of(tmp_path, "weight_packed")
    assert len(modules) == 2 * (4 + 3 * 4)
    wanted = set(NVFP4PackedCompressor.compression_param_names(scheme)) | (
        {"input_global_scale"} if activations == "static" else set()
    )
    for name, tensors in modules.items():
        assert tensors.keys() == wanted
        read_back = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"]
        if "experts" in name:
            continue
        before, ours = dense_and_ours(model, dense, name)
        assert torch.equal(read_back.float(), ours.bfloat16().float())
        written = {
            "weight": before,
            "weight_scale": tensors["weight_scale"].float(),
            "weight_global_scale": generate_gparam(before.min(), before.max()),
        }
        theirs = NVFP4PackedCompressor.compress(written, scheme)
        assert torch.equal(raw(theirs["weight_global_scale"]), raw(tensors["weight_global_scale"]))
        assert torch.equal(theirs["weight_packed"], tensors["weight_packed"])


def test_transformers_loads_dense_layers_by_compressed_tensors_own_code(tmp_path):
    # Experts it loads without their global scale (transformers 5.24), so a model without experts.
    pytest.importorskip("compressed_tensors")
    config = transformers.Qwen3Config(**SIZES, head_dim=16, intermediate_size=96, num_hidden_layers=2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    save(quantized(model, activations="none"), tmp_path, "compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        want, got = model(token_ids()).logits, theirs(token_ids()).logits
    # Theirs multiplies by weights rounded to bfloat16.
    assert float((got - want).abs().mean()) < 0.02 * float(want.std())


def test_modelopts_own_code_reads_it_and_writes_the_same(tmp_path):
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    dense = transformers_model("Qwen3Moe")
    model = quantized(transformers_model("Qwen3Moe"), dialect="modelopt", global_scale="projection")
    save(model, tmp_path)
    modules = modules_of(tmp_path, "weight")
    assert len(modules) == 2 * (4 + 3 * 4)
    for name, tensors in modules.items():
        assert tensors.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
        if "experts" in name:
            continue
        before, ours = dense_and_ours(model, dense, name)
        scales = {"scale": tensors["weight_scale"], "double_scale": tensors["weight_scale_2"]}
        packed = NVFP4QTensor(before.shape, torch.float32, tensors["weight"])
        assert torch.equal(packed.dequantize(torch.float32, **scales, block_sizes={-1: 16}), ours)
        theirs, scale, double_scale = NVFP4QTensor.quantize(before, 16)
        assert torch.equal(raw(double_scale), raw(tensors["weight_scale_2"]))
        assert torch.equal(raw(scale), raw(tensors["weight_scale"]))
        assert torch.equal(theirs._quantized_data, tensors["weight"])
