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
from checkpoint_files import CHECKPOINTS, SMALL, edited, read, sharded, write
from safetensors.torch import load_file, save_file

from fx_nvfp4 import checkpoint
from fx_nvfp4.checkpoint import CheckpointError, load

pytest.importorskip("transformers")

Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.2"
EMBEDDING = "model.embed_tokens.weight"


def refuse(folder: Path, *fragments: str, reading: bool = False) -> None:
    """load refuses the folder with these words in the message, and (unless reading) before it reads a weight:
    headers and global scales suffice, only block scales are looked at later."""
    untouched = nullcontext() if reading else mock.patch.object(checkpoint, "Assembler", None)
    with untouched, pytest.raises(CheckpointError) as caught:
        load(folder, progress=False)
    message = str(caught.value)
    for fragment in (*fragments, "found", "expected"):
        assert fragment in message, f"{fragment!r} is not in: {message}"


def drop(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def put(name, value):
    return lambda config, tensors: tensors.update({name: value})


def change(name, function):
    return lambda config, tensors: tensors.update({name: function(tensors[name])})


def rename(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def poke(name, byte):
    """One block scale replaced by a byte."""

    def edit(config, tensors):
        tensors[name].view(torch.uint8)[3, 1] = byte

    return edit


def expert_5(config, tensors):
    for name in [n for n in tensors if n.startswith(EXPERT)]:
        tensors[name.replace("experts.2", "experts.5")] = tensors[name]


def no_expert_2(config, tensors):
    for name in [n for n in tensors if n.startswith(f"{EXPERT}.w3")]:
        del tensors[name]


def packed_embedding(config, tensors):
    for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        tensors[f"model.embed_tokens.{leaf}"] = tensors[f"{Q}.{leaf}"]


def mixed_experts(config, tensors):
    for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{EXPERT}.w2.{leaf}"]
    tensors[f"{EXPERT}.w2.weight"] = torch.ones(64, 48).bfloat16()


TENSORS = {
    "block scale missing": (drop(f"{Q}.weight_scale"), f"{Q}.weight_scale", "no such tensor", "F8_E4M3"),
    "weight scale missing": (drop(f"{Q}.weight_scale_2"), f"{Q}.weight_scale_2", "no such tensor", "F32"),
    "input scale missing": (drop(f"{EXPERT}.w1.input_scale"), f"{EXPERT}.w1.input_scale", "no such", "W4A16"),
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
        "bfloat16",
    ),
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


@pytest.mark.parametrize(("byte", "found"), [(0x7F, "nan"), (0xFF, "nan"), (0xB8, "-1.0")])
@pytest.mark.parametrize("name", [f"{Q}.weight_scale", f"{EXPERT}.w3.weight_scale"])
def test_bad_block_scale(name, byte, found, tmp_path):
    refuse(edited(tmp_path, poke(name, byte)), name, f"{found} at [3, 1] (1 such)", "not negative", reading=True)


def scheme(**changes):
    """quantization_config with entries replaced; None removes one."""

    def edit(config, tensors):
        quantization = config["quantization_config"]
        for key, value in changes.items():
            quantization[key] = value
            if value is None:
                del quantization[key]

    return edit


def group(**changes):
    return lambda config, tensors: config["quantization_config"]["config_groups"]["group_0"].update(changes)


INT4 = {"num_bits": 4, "type": "int", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "group_size": None}
MXFP4 = {"num_bits": 4, "type": "float", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": "local"}


def compressed(**changes):
    """A compressed-tensors config, with entries replaced."""

    def edit(config, tensors):
        groups = {"group_0": {"weights": NVFP4, "input_activations": NVFP4}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": groups,
            **changes,
        }

    return edit


def quark(weight):
    def edit(config, tensors):
        config["quantization_config"] = {"quant_method": "quark", "global_quant_config": {"weight": weight}}

    return edit


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
    "modelopt w4a16 with input scales": (group(input_activations=None), "input_scale", "an input scale", "W4A16"),
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
    "unknown class": (lambda config, tensors: config.update(architectures=["Nonesuch"]), "Nonesuch", "transformers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(case, tmp_path):
    edit, *fragments = CONFIGS[case]
    refuse(edited(tmp_path, edit), *fragments)


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
        ("down_proj_input_scale", None, ("no such tensor", "F32")),
        ("down_proj", None, ("no such tensor", "U8")),
    ],
)
def test_bad_fused_experts(leaf, value, fragments, tmp_path):
    name = f"language_model.model.layers.1.feed_forward.experts.{leaf}"
    edit = drop(name) if value is None else put(name, value)
    refuse(edited(tmp_path, edit, CHECKPOINTS["modelopt_llama4_w4a4_3d"]), name, *fragments)


def test_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


def test_unknown_dialect_and_dtype():
    with pytest.raises(ValueError, match="unknown NVFP4 dialect 'nonesuch'"):
        load(SMALL, dialect="nonesuch")
    with pytest.raises(ValueError, match=r"dtype must be .* got torch.float64"):
        load(SMALL, dtype=torch.float64)
