"""Damaged checkpoints on fixed seeds, and by hand where a lie costs time or memory instead of being noticed."""

import json
import shutil
import time

import fuzz_checkpoint
import pytest
import torch
from checkpoint_files import SMALL, edited
from fuzz_checkpoint import DAMAGE, File
from safetensors import SafetensorError
from safetensors.torch import load_file

import fx_nvfp4
from fx_nvfp4 import CheckpointError, NVFP4Weight

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_damage_is_refused_or_read_as_it_is_written():
    found = list(fuzz_checkpoint.outcomes(0, 250))
    bugs = [f"seed {o.seed}: {o.damage}: {o.kind}: {o.detail}" for o in found if o.bug]
    assert not bugs, "\n" + "\n".join(bugs)
    assert {o.damage for o in found} == set(DAMAGE)
    assert {o.kind for o in found} == {"refused", "loaded"}
    assert all(o.detail for o in found if o.kind == "refused")


# Seeds that were bugs: what transformers raises of a config's values, by its constructors and not its validation.
@pytest.mark.parametrize("seed", [1694, 2195, 4599, 6286])
def test_configs_that_no_model_can_be_built_of(seed):
    outcome = fuzz_checkpoint.run(seed)
    assert outcome.kind == "refused"
    assert "what transformers refuses" in outcome.detail


def test_the_check_notices_other_numbers():
    """Or it guards nothing."""
    model, stored = fx_nvfp4.load(SMALL, progress=False), load_file(SMALL / "model.safetensors")
    assert not fuzz_checkpoint.differences(model, stored)
    names = [n for n in stored if not n.endswith("input_scale")]
    for name in (*names[::7], *(n for n in names if "experts.1.w3" in n)):
        changed = stored[name].clone()
        changed.view(-1).view(torch.uint8)[0] ^= 1
        assert len(fuzz_checkpoint.differences(model, {**stored, name: changed})) == 1, name


@pytest.mark.parametrize("layers", [1 << 20, 1 << 60])
def test_layers_that_no_file_holds_are_not_built(tmp_path, layers):
    """A million of them would take hours before anything is compared."""
    folder = edited(tmp_path, lambda config, tensors: config.update(num_hidden_layers=layers))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"num_hidden_layers: found {layers}, expected \d+ at most"):
        fx_nvfp4.load(folder, progress=False)
    assert time.monotonic() - start < 10


def test_json_of_any_depth_is_refused(tmp_path):
    shutil.copy(SMALL / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match="no JSON"):
        fx_nvfp4.load(tmp_path, progress=False)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_not_read(tmp_path, length):
    shutil.copy(SMALL / "config.json", tmp_path)
    content = (SMALL / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="a whole safetensors file"):
        fx_nvfp4.load(tmp_path, progress=False)


def lies(file):
    """Files of one packed weight whose metadata or header say something else, by name."""
    described = json.loads(file.header["__metadata__"]["w"])

    def with_metadata(**changes):
        return {"__metadata__": {"w": json.dumps({**described, **changes})}}

    yield from (("no dtype", with_metadata(orig_dtype="complex64")), ("no mode", with_metadata(activations="int4")))
    yield from (
        ("rule", with_metadata(dialect=3)),
        ("unknown", with_metadata(extra=1)),
        ("list", with_metadata(type=[])),
    )
    yield from (("dtype list", with_metadata(orig_dtype=[])), ("transposed", with_metadata(transposed="yes")))
    yield from (("view", with_metadata(view_dims=[[0], [5]])), ("scale", with_metadata(activations="static")))
    for part, entry in file.header.items():
        if part != "__metadata__":
            yield f"{part} lost", {part: None}
            yield f"{part} flat", {part: {**entry, "shape": [entry["data_offsets"][1] - entry["data_offsets"][0]]}}


def test_packed_weights_of_files_that_lie(tmp_path):
    """load_file refuses by ValueError, or SafetensorError; what it returns can be computed with."""
    weight = NVFP4Weight.from_dense(torch.randn(32, 64))
    fx_nvfp4.save_file({"w": weight}, tmp_path / "w.safetensors")
    content, loaded = (tmp_path / "w.safetensors").read_bytes(), []
    for name, changes in lies(File(content)):
        file = File(content)
        file.header = {k: v for k, v in {**file.header, **changes}.items() if v is not None}
        (tmp_path / "w.safetensors").write_bytes(file.bytes())
        try:
            again = fx_nvfp4.load_file(tmp_path / "w.safetensors")
        except (ValueError, SafetensorError):
            continue
        loaded.append(name)
        assert not isinstance(again.get("w"), NVFP4Weight)
    assert loaded == ["list"]
