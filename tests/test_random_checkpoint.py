"""Random checkpoints: the layout is the real producers' own, and what is written loads and runs.

Cases: both layouts against small real checkpoints of the same sizes; one file and shards; equal seeds; bad sizes.
"""

import json

import numpy as np
import pytest
import torch
from checkpoint_files import CHECKPOINTS
from safetensors import safe_open

import fx_nvfp4
from fx_nvfp4 import cli
from fx_nvfp4.checkpoints.reader import Reader
from fx_nvfp4.random_checkpoint import LAYOUTS, Sizes, write_checkpoint
from fx_nvfp4.random_checkpoint.tensors import RandomTensor, global_scale

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Sizes(layers=2, experts=8, top=2, hidden=128, intermediate=64, heads=4, kv_heads=2, head_dim=32, vocabulary=384)
REAL = {"modelopt": "modelopt_qwen3moe_w4a4_kvfp8", "compressed-tensors": "ct_qwen3moe_w4a4"}


def layout(folder):
    return {name: (t.dtype, t.shape) for name, t in Reader(folder).tensors.items()}


def keys(config):
    """Names of all entries, nested ones too."""
    nested = {f"{k}.{inner}" for k, v in config.items() if isinstance(v, dict) for inner in keys(v)}
    return set(config) | nested


@pytest.mark.parametrize("like", LAYOUTS)
def test_names_dtypes_and_shapes_are_the_producers(like, tmp_path):
    if REAL[like] not in CHECKPOINTS:
        pytest.skip("needs the producer's checkpoint")
    real = CHECKPOINTS[REAL[like]]
    write_checkpoint(tmp_path, like, SMALL, progress=False)
    assert layout(tmp_path) == layout(real)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, real))
    # Newer transformers write num_experts as num_local_experts, and nest rope_theta.
    assert keys(ours) - keys(theirs) <= {"num_experts", "rope_theta"}
    assert ours["quantization_config"]["ignore"] == theirs["quantization_config"]["ignore"]
    if like == "modelopt":
        ours, theirs = (json.loads((folder / "hf_quant_config.json").read_text()) for folder in (tmp_path, real))
        assert ours == theirs


@pytest.mark.parametrize("like", LAYOUTS)
def test_it_loads_and_computes_finite_logits_of_a_usual_size(like, tmp_path):
    pytest.importorskip("transformers")
    write_checkpoint(tmp_path, like, SMALL, progress=False)
    model = fx_nvfp4.load(tmp_path, progress=False)
    logits = model(torch.arange(12).view(1, 12)).logits
    assert 0.1 < logits.float().std() < 10
    up = model.model.layers[1].mlp.experts.gate_up_proj
    assert len(up.global_scale.unique()) == 2 * SMALL.experts
    assert len(up.act_scale.unique()) == SMALL.experts
    assert 0.4 < up.dequantize(torch.float32).std() * SMALL.hidden**0.5 < 1.1


def test_shards_and_index_hold_what_one_file_does(tmp_path):
    total = write_checkpoint(tmp_path / "one", "modelopt", SMALL, progress=False)
    write_checkpoint(tmp_path / "many", "modelopt", SMALL, shard_size=100_000, progress=False)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == total
    assert len(shards) == 5
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert layout(tmp_path / "many") == layout(tmp_path / "one")
    sizes = [(tmp_path / "many" / shard).stat().st_size for shard in shards]
    assert max(sizes) < 100_000 + 30_000  # with the header


def test_equal_seeds_give_equal_bytes(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / folder, "modelopt", SMALL, seed=seed, progress=False)
    a, b, c = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert a == b
    assert a != c


def test_large_tensors_are_made_in_pieces(monkeypatch):
    monkeypatch.setattr("fx_nvfp4.random_checkpoint.tensors._PIECE", 1000)
    generator = np.random.default_rng(0)
    for dtype in ("U8", "F8_E4M3", "BF16"):
        tensor = RandomTensor("t", dtype, (50, 70), 1.0)
        pieces = list(tensor.pieces(generator))
        assert len(pieces) == 4
        assert sum(map(len, pieces)) == tensor.size
    assert global_scale(1.0) > 0


def test_the_command_writes_one(capsys, tmp_path):
    sizes = ["--layers", "1", "--experts", "2", "--top", "1", "--hidden", "64", "--vocabulary", "64"]
    sizes += ["--intermediate", "32", "--heads", "2", "--kv-heads", "1", "--head-dim", "32"]
    folder = tmp_path / "new"
    assert cli.main(["make-checkpoint", str(folder), "--like", "compressed-tensors", *sizes]) == 0
    assert "billion packed weights" in capsys.readouterr().out
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.1.down_proj.weight_packed" in file.keys()  # noqa: SIM118
    # A second time it would overwrite.
    assert cli.main(["make-checkpoint", str(folder), *sizes]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 100}, "hidden must be a multiple of 16"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"top": 9, "experts": 8}, "top must be at most experts"),
    ],
)
def test_impossible_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**sizes)
