"""Checkpoints that cannot be loaded say why: which file or tensor, what was found, what was expected.

Covered: folders, config files, quantisation schemes, shards and their index, damaged files, missing and extra
tensors, shapes, dtypes, block scales, global scales, input scales, torchao metadata.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_files import (
    CHECKPOINTS,
    EMBEDDING,
    EXPERT,
    FP8,
    INT4,
    MXFP4,
    NVFP4,
    SMALL,
    Q,
    change,
    compressed,
    drop,
    edited,
    expert_5,
    fp8_layer,
    group,
    mixed_experts,
    no_expert_2,
    packed_embedding,
    poke,
    put,
    quark,
    read,
    scheme,
    sharded,
    torchao_with_input_scales,
    write,
)
from safetensors.torch import load_file, save_file

from fx_nvfp4 import checkpoint
from fx_nvfp4.checkpoint import CheckpointError, load

pytest.importorskip("transformers")

WEIGHT_ONLY = 'load(..., activations="none")'


def refuse(folder: Path, *fragments: str, reading: bool = False) -> None:
    """load refuses the folder with these words in the message, and (unless reading) before it reads a weight:
    headers and global scales suffice, only block scales are looked at later."""
    untouched = nullcontext() if reading else mock.patch.object(checkpoint, "Assembler", None)
    with untouched, pytest.raises(CheckpointError) as caught:
        load(folder, progress=False)
    message = str(caught.value)
    for fragment in (*fragments, "found", "expected"):
        assert fragment in message, f"{fragment!r} is not in: {message}"


TENSORS = {
    "block scale missing": (drop(f"{Q}.weight_scale"), f"{Q}.weight_scale", "no such tensor", "F8_E4M3"),
    "weight scale missing": (drop(f"{Q}.weight_scale_2"), f"{Q}.weight_scale_2", "no such tensor", "F32"),
    "input scale missing": (drop(f"{EXPERT}.w1.input_scale"), f"{EXPERT}.w1.input_scale", "no such", WEIGHT_ONLY),
    "codes missing": (drop(f"{Q}.weight"), f"{Q}.weight:", "no such tensor", "U8"),
    "norm missing": (drop("model.norm.weight"), "model.norm.weight", "no tensor for it", "parameter [64]"),
    "projection of an expert missing": (no_expert_2, f"{EXPERT}.w3.weight", "no such tensor", "expert 2 of 4"),
    "expert too many": (expert_5, f"{EXPERT}.w1.weight".replace("2.w", "5.w"), "expert 5", "experts 0 to 3"),
    "unknown tensor": (put(f"{Q}.pre_quant_scale", torch.ones(64)), f"{Q}.pre_quant_scale", "belongs nowhere"),
    "codes of another width": (change(f"{Q}.weight", lambda t: t[:, :16]), f"{Q}.weight", "U8 [64, 16]", "[64, 32]"),
    "codes of an expert transposed": (
        change(f"{EXPERT}.w2.weight", torch.t),
        f"{EXPERT}.w2.weight",
        "U8 [24, 64]",
        "[64, 24]",
    ),
    "block scales per 32": (change(f"{Q}.weight_scale", lambda t: t[:, :2]), f"{Q}.weight_scale", "[64, 2]", "[64, 4]"),
    "weight scale per row": (
        put(f"{Q}.weight_scale_2", torch.ones(64)),
        f"{Q}.weight_scale_2",
        "F32 [64]",
        "1 element",
    ),
    "codes not uint8": (change(f"{Q}.weight", lambda t: t.view(torch.int8)), f"{Q}.weight", "I8 [64, 32]", "U8"),
    "bfloat16 block scales": (
        change(f"{Q}.weight_scale", lambda t: t.bfloat16()),
        f"{Q}.weight_scale",
        "BF16 [64, 4]",
        "F8_E4M3",
    ),
    "e5m2 block scales": (
        change(f"{Q}.weight_scale", lambda t: t.view(torch.uint8).view(torch.float8_e5m2)),
        f"{Q}.weight_scale",
        "F8_E5M2",
        "F8_E4M3",
    ),
    "codes without any scale": (
        change("lm_head.weight", lambda t: t[:, :32].to(torch.uint8)),
        "lm_head.weight_scale",
        "no such tensor",
    ),
    "fp8 layer": (
        change("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "lm_head.weight",
        "F8_E4M3",
        "mixed FP8/NVFP4 checkpoints are not served",
    ),
    "fp8 layer with a scale": (fp8_layer, f"{Q}.weight", "F8_E4M3", "mixed FP8/NVFP4 checkpoints are not served"),
    "norm of another model": (put("model.norm.weight", torch.ones(65)), "model.norm.weight", "[65]", "[64]"),
    "zero weight scale": (put(f"{Q}.weight_scale_2", torch.zeros(())), f"{Q}.weight_scale_2", "0.0", "positive"),
    "negative weight scale": (put(f"{Q}.weight_scale_2", torch.tensor(-2.0)), f"{Q}.weight_scale_2", "-2.0"),
    "infinite weight scale": (put(f"{Q}.weight_scale_2", torch.tensor(torch.inf)), f"{Q}.weight_scale_2", "inf"),
    "nan input scale": (put(f"{Q}.input_scale", torch.tensor(torch.nan)), f"{Q}.input_scale", "nan", "positive"),
    "zero input scale": (put(f"{EXPERT}.w2.input_scale", torch.zeros(())), f"{EXPERT}.w2.input_scale", "0.0"),
    "gate and up inputs differ": (
        put(f"{EXPERT}.w3.input_scale", torch.tensor(0.25)),
        f"{EXPERT}.w3.input_scale",
        "0.25",
        f"{EXPERT}.w1.input_scale",
        "calibrate",
        WEIGHT_ONLY,
    ),
    "packed embedding": (packed_embedding, EMBEDDING, "Embedding", "linear layers and experts"),
    "experts packed in part": (mixed_experts, f"{EXPERT}.w2.weight", "not packed", "quantise all experts"),
    "two names for one weight": (
        lambda config, tensors: tensors.update({"norm.weight": tensors["model.norm.weight"]}),
        "model.norm.weight",
        "one tensor",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensor(case, tmp_path):
    edit, *fragments = TENSORS[case]
    refuse(edited(tmp_path, edit), *fragments)


def never_calibrated(config, tensors):
    """What ModelOpt exports of experts that saw no token."""
    names = [n for n in sorted(tensors) if ".experts." in n and n.endswith("input_scale")]
    for name, value in zip(names[:6], (0.0, -1.0, torch.nan, torch.inf, 0.0, torch.nan), strict=True):
        tensors[name] = torch.tensor(value)
    del tensors[f"{EXPERT}.w1.input_scale"]


def test_all_unusable_input_scales_come_in_one_error(tmp_path):
    first = "model.layers.0.block_sparse_moe.experts.0"
    named = (f"{first}.w1.input_scale (a multiplier of 0.0)", f"{first}.w2.input_scale (a multiplier of -1.0)")
    refuse(edited(tmp_path, never_calibrated), "found 7 unusable", *named, "nan", "inf", ", ...", WEIGHT_ONLY)


@pytest.mark.parametrize(("byte", "found"), [(0x7F, "nan"), (0xFF, "nan"), (0xB8, "-1.0")])
@pytest.mark.parametrize("name", [f"{Q}.weight_scale", f"{EXPERT}.w3.weight_scale"])
def test_bad_block_scale(name, byte, found, tmp_path):
    refuse(edited(tmp_path, poke(name, byte)), name, f"{found} at [3, 1] (1 such)", "not negative", reading=True)


def test_value_too_large_for_float16(tmp_path):
    """It would become inf, and every logit NaN."""
    weight = torch.full((64,), 2.0)
    weight[3] = -70000.0
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: found -70000\.0 \(1 such\).*65504.*bfloat16"):
        load(edited(tmp_path, put("model.norm.weight", weight)), dtype=torch.float16, progress=False)
    assert load(tmp_path, dtype=torch.float32, progress=False).model.norm.weight[3] == -70000.0


TWO_SCHEMES = {
    "attention": {"weights": NVFP4, "input_activations": None},
    "experts": {"weights": NVFP4, "input_activations": NVFP4},
}
DYNAMIC = {"group_0": {"weights": NVFP4, "input_activations": {**NVFP4, "dynamic": True}}}

CONFIGS = {
    "not quantised": (
        lambda config, tensors: config.pop("quantization_config"), "config.json", "no quantization_config",
        "load it with transformers"),
    "unknown method": (scheme(quant_method="awq"), "quant_method", "'awq'", "modelopt"),
    "no method": (scheme(quant_method=None), "quant_method", "None", "compressed-tensors"),
    "modelopt fp8": (scheme(quant_algo="FP8"), "quant_algo", "'FP8'", "NVFP4"),
    "modelopt mixture": (scheme(quant_algo="MIXED_PRECISION"), "quant_algo", "'MIXED_PRECISION'", "NVFP4"),
    "modelopt int4 group": (group(weights=INT4), "config_groups.group_0.weights", "4-bit int, groups of 128", "16"),
    "modelopt w4a8": (group(input_activations=FP8), "group_0.input_activations", "8-bit float", "NVFP4"),
    "modelopt w4a16 with input scales": (group(input_activations=None), "input_scale", "an input scale", WEIGHT_ONLY),
    "ct fp8": (compressed(format="float-quantized"), "group_0.format", "'float-quantized'", "nvfp4-pack-quantized"),
    "ct mxfp4": (
        compressed(config_groups={"group_0": {"weights": MXFP4}}), "group_0.weights", "groups of 32", "groups of 16"),
    "ct mixture": (compressed(config_groups=TWO_SCHEMES), "config_groups", "'attention': 'none'", "one scheme"),
    "ct fully dynamic": (compressed(config_groups=DYNAMIC), "input_activations.dynamic", "True", "local"),
    "ct rotated": (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config", "rotated"),
    "ct without groups": (compressed(config_groups={}), "config_groups", "none", "NVFP4"),
    "quark mxfp4": (
        quark({"dtype": "fp4", "qscheme": "per_group", "group_size": 32}), "global_quant_config.weight",
        "group_size 32", "group_size 16"),
    "torchao without metadata": (scheme(quant_method="torchao"), "torchao without NVFP4Tensor", "metadata"),
    "unknown model": (lambda config, tensors: config.update(model_type="nonesuch"), "'nonesuch'", "transformers"),
    "class that is no model": (
        lambda config, tensors: config.update(architectures=["MixtralConfig"]), "MixtralConfig", "a model class"),
    "architectures is a number": (lambda config, tensors: config.update(architectures=7), "architectures", "7"),
    "model type is a list": (lambda config, tensors: config.update(model_type=["mixtral"]), "['mixtral']"),
    "modelopt groups in a list": (scheme(config_groups=[{}]), "config_groups", "a JSON list"),
    "modelopt null group": (scheme(config_groups={"group_0": None}), "config_groups.group_0.weights", "None"),
    "ct groups in a list": (compressed(config_groups=[{}]), "config_groups", "a JSON list"),
    "ct group in a list": (compressed(config_groups={"group_0": [1]}), "config_groups.group_0", "a JSON list"),
    "ct null group": (compressed(config_groups={"group_0": None}), "config_groups.group_0.weights", "None"),
    "quark text": (quark("fp4"), "global_quant_config.weight", "a JSON str"),
    "nested fp8": (
        lambda config, tensors: config.update(
            quantization_config=None, text_config={"quantization_config": {"quant_method": "fp8"}}),
        "text_config.quantization_config.quant_method", "'fp8'"),
    "unknown class": (lambda config, tensors: config.update(architectures=["Nonesuch"]), "Nonesuch", "transformers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(case, tmp_path):
    edit, *fragments = CONFIGS[case]
    refuse(edited(tmp_path, edit), *fragments)


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"max_new_tokens": -1}', '{"cache_implementation": "nonesuch"}'])
def test_bad_generation_config(text, tmp_path):
    edited(tmp_path, lambda config, tensors: None)
    (tmp_path / "generation_config.json").write_text(text)
    refuse(tmp_path, "generation_config.json")


def test_no_advice_names_what_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load(edited(tmp_path, CONFIGS["not quantised"][0]))
    assert "quantize_" not in str(caught.value)


def test_no_folder_and_no_download(tmp_path):
    refuse(Path("some/model-on-the-hub"), "some/model-on-the-hub", "nothing", "downloads nothing")
    refuse(SMALL / "model.safetensors", "model.safetensors", "a file", "a folder")


@pytest.mark.parametrize(
    ("text", "found"), [(None, "no readable file"), ("{not json", "no JSON"), ("[1]", "a JSON list")]
)
def test_config_is_no_json(text, found, tmp_path):
    shutil.copy(SMALL / "model.safetensors", tmp_path)
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, "config.json", found)


def test_no_safetensors(tmp_path):
    shutil.copy(SMALL / "config.json", tmp_path)
    refuse(tmp_path, "neither", "model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refuse(tmp_path, "only pickles (pytorch_model.bin)", "convert it to safetensors")


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:200], lambda b: b"garbage" * 99, lambda b: b""])
def test_damaged_file(damage, tmp_path):
    shutil.copy(SMALL / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damage((SMALL / "model.safetensors").read_bytes()))
    refuse(tmp_path, "model.safetensors", "an error", "a whole safetensors file")


SHARD = "model-00002-of-00003.safetensors"


def reindex(folder, edit):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_missing_shard(tmp_path):
    (sharded(tmp_path) / SHARD).unlink()
    refuse(tmp_path, SHARD, "no such file", "index.json lists")


def test_shard_outside_the_folder(tmp_path):
    reindex(sharded(tmp_path), lambda weight_map: weight_map.update({EMBEDDING: f"../{SHARD}"}))
    refuse(tmp_path, SHARD, "no such file")


@pytest.mark.parametrize("shard", [None, 3, ["a", "b"], {}])
def test_index_names_no_shard(shard, tmp_path):
    reindex(sharded(tmp_path), lambda weight_map: weight_map.update({EMBEDDING: shard}))
    refuse(tmp_path, "model.safetensors.index.json", EMBEDDING, repr(shard))


def test_tensor_of_the_index_is_not_in_its_shard(tmp_path):
    reindex(sharded(tmp_path), lambda weight_map: weight_map.update({"model.extra": SHARD}))
    refuse(tmp_path, "model.extra", f"no such tensor in {SHARD}", "index.json says")


def test_tensor_in_two_shards(tmp_path):
    shard = load_file(sharded(tmp_path) / SHARD)
    other = load_file(tmp_path / SHARD.replace("02", "03"))
    name = next(iter(shard))
    save_file(other | {name: shard[name]}, tmp_path / SHARD.replace("02", "03"))
    refuse(tmp_path, name, f"it in {SHARD} and in {SHARD.replace('02', '03')}", "one shard")


def test_tensor_not_in_the_index(tmp_path):
    reindex(sharded(tmp_path), lambda weight_map: weight_map.pop("model.norm.weight"))
    refuse(tmp_path, "model.norm.weight", "not in model.safetensors.index.json")


def test_index_without_map(tmp_path):
    (sharded(tmp_path) / "model.safetensors.index.json").write_text("{}")
    refuse(tmp_path, "model.safetensors.index.json", "no weight_map")


def described(parts=("qdata", "scale"), kind="NVFP4Tensor", **data):
    return json.dumps({"_type": kind, "_data": {"block_size": 16, **data}, "_tensor_data_names": list(parts)})


TORCHAO = {
    "part missing": (described(["qdata", "scale", "per_tensor_scale"]), f"{Q}._weight_per_tensor_scale"),
    "other tensor type": (described(kind="Int4Tensor"), "torchao type Int4Tensor"),
    "other block size": (described(block_size=32), "block_size", "32"),
    "scales not in tiles": (described(is_swizzled_scales=True), "_weight_scale", "[64, 4]", "512 scales in 128 x 4"),
    "unknown part": (described(["qdata", "zero_point"]), "part 'zero_point'"),
}


@pytest.mark.parametrize("case", TORCHAO)
def test_bad_torchao_metadata(case, tmp_path):
    text, *fragments = TORCHAO[case]
    config, tensors = read(SMALL)
    del config["quantization_config"]
    tensors = {f"{Q}._weight_qdata": tensors[f"{Q}.weight"], f"{Q}._weight_scale": tensors[f"{Q}.weight_scale"]}
    write(tmp_path, config, tensors)
    # A checkpoint counts as torchao's when any of its tensors is an NVFP4Tensor.
    metadata = {f"{Q}.weight": text} | ({"z.weight": described()} if "Int4" in text else {})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    refuse(tmp_path, Q, *fragments)


@pytest.mark.skipif("modelopt_llama4_w4a4_3d" not in CHECKPOINTS, reason="needs the fixture checkpoints")
@pytest.mark.parametrize(
    ("leaf", "value", "fragments"),
    [
        ("gate_up_proj_weight_scale_2", torch.ones(3), ("F32 [3]", "1 or 4 element(s)")),
        ("gate_up_proj", torch.zeros(4, 128, 64, dtype=torch.uint8), ("U8 [4, 128, 64]", "[4, 64, 128]")),
        ("down_proj_input_scale", None, ("no such tensor", WEIGHT_ONLY)),
        ("down_proj", None, ("no such tensor", "U8")),
    ],
)
def test_bad_fused_experts(leaf, value, fragments, tmp_path):
    name = f"language_model.model.layers.1.feed_forward.experts.{leaf}"
    edit = drop(name) if value is None else put(name, value)
    refuse(edited(tmp_path, edit, CHECKPOINTS["modelopt_llama4_w4a4_3d"]), name, *fragments)


@pytest.mark.skipif("torchao_qwen3moe" not in CHECKPOINTS, reason="needs the fixture checkpoints")
def test_unusable_torchao_input_scales(tmp_path):
    torchao_with_input_scales(tmp_path, [0.0, torch.inf, None])
    refuse(tmp_path, "found 3 unusable", "(no such tensor)", "_act_per_tensor_scale (a multiplier of inf)", WEIGHT_ONLY)


def test_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


def test_unknown_dialect_dtype_and_activations():
    with pytest.raises(ValueError, match="unknown NVFP4 dialect 'nonesuch'"):
        load(SMALL, dialect="nonesuch")
    with pytest.raises(ValueError, match=r"dtype must be .* got torch.float64"):
        load(SMALL, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"activations must be .* got 'static'"):
        load(SMALL, activations="static")
