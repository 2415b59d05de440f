"""Where the real checkpoints lie, how tests write edited copies of one, and what edits they make."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
_MORE = Path(os.environ.get("FX_NVFP4_FIXTURES", REPOSITORY.parent / "shared" / "fixtures")) / "checkpoints"

# The small one in the repository, and every further one that is there.
CHECKPOINTS = {SMALL.name: SMALL} | (
    {p.name: p for p in sorted(_MORE.iterdir()) if p.name != SMALL.name} if _MORE.is_dir() else {}
)

# Names in the small one.
Q = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts.2"
EMBEDDING = "model.embed_tokens.weight"

Tensors = dict[str, torch.Tensor]


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """(config, tensors) of a single-file checkpoint."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Any], Tensors], None], source: Path = SMALL) -> Path:
    """A copy of a checkpoint in folder, changed in place by edit(config, tensors)."""
    config, tensors = read(source)
    edit(config, tensors)
    return write(folder, config, tensors)


def sharded(folder: Path, shards: int = 3, source: Path = SMALL) -> Path:
    """A copy of a checkpoint in several shards with an index; neighbours go to different shards."""
    config, tensors = read(source)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(sorted(tensors.items())[shard::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torchao_with_input_scales(folder: Path, values: list[float | None]) -> None:
    """A copy of torchao's checkpoint whose first weights announce static input scales; None: announced, not there."""
    source = CHECKPOINTS["torchao_qwen3moe"]
    config, tensors = read(source)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    weights = [name for name, text in sorted(metadata.items()) if '"NVFP4Tensor"' in text]
    for name, value in zip(weights, values, strict=False):
        described = json.loads(metadata[name])
        described["_tensor_data_names"] = sorted({*described["_tensor_data_names"], "act_per_tensor_scale"})
        described["_data"]["act_quant_kwargs"] = {"_data": {"use_dynamic_per_tensor_scale": False}}
        metadata[name] = json.dumps(described)
        owner, _, leaf = name.rpartition(".")
        part = f"{owner}._{leaf}_act_per_tensor_scale"
        tensors.pop(part, None)
        if value is not None:
            tensors[part] = torch.tensor(value)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata)


def as_compressed_tensors(config, tensors):
    """The same weights in llm-compressor's names and reciprocal scales."""
    projections = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    group = config["quantization_config"]["config_groups"]["group_0"]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    for name in [n for n in tensors if n.endswith(("weight_scale_2", "input_scale"))]:
        module, _, leaf = name.rpartition(".")
        owner, _, last = module.rpartition(".")
        module = f"{owner}.{projections.get(last, last)}"
        if leaf == "weight_scale_2":
            tensors[f"{module}.weight_global_scale"] = 1 / tensors.pop(name).view(1)
            tensors[f"{module}.weight_packed"] = tensors.pop(f"{owner}.{last}.weight")
            tensors[f"{module}.weight_scale"] = tensors.pop(f"{owner}.{last}.weight_scale")
        else:
            tensors[f"{module}.input_global_scale"] = 1 / tensors.pop(name).view(1)


def never_calibrated(config, tensors):
    experts = "model.layers.0.block_sparse_moe.experts"
    for expert, value in enumerate((0.0, torch.nan, torch.inf)):
        tensors[f"{experts}.{expert}.w1.input_scale"] = torch.tensor(value)
    del tensors[f"{experts}.3.w2.input_scale"]
    tensors[f"{experts}.3.w3.input_scale"] = torch.ones(7)


def drop(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def put(name, value):
    return lambda config, tensors: tensors.update({name: value})


def change(name, function):
    return lambda config, tensors: tensors.update({name: function(tensors[name])})


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


def fp8_layer(config, tensors):
    """As ModelOpt exports one: codes in F8_E4M3, one float32 scale."""
    tensors[f"{Q}.weight"] = torch.ones(64, 64).to(torch.float8_e4m3fn)
    tensors[f"{Q}.weight_scale"] = torch.tensor(0.5)
    del tensors[f"{Q}.weight_scale_2"]


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


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations create (no views, no masks), and the largest floating-point one."""

    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        created = type(out) is torch.Tensor and not any(r.alias_info for r in func._schema.returns)
        if created and out.device.type != "meta" and out.dtype != torch.bool:
            self.bytes += out.numel() * out.itemsize
            if out.is_floating_point() and out.itemsize > 1:
                self.largest = max(self.largest, out.numel())
        return out
