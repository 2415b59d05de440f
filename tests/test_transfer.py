"""Loading takes no memory beyond the model: tensors go in pieces, in parallel, straight to their places.

Cases: plain, strided, transposed and converted places; pieces smaller than a tensor; a failing worker; the peak of a
whole load, measured by the kernel; a file that was cut after it was opened.
"""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from checkpoint_files import SMALL
from safetensors.torch import load_file
from tqdm import tqdm

from fx_nvfp4.checkpoints import transfer
from fx_nvfp4.checkpoints.errors import CheckpointError
from fx_nvfp4.checkpoints.reader import Reader
from fx_nvfp4.checkpoints.transfer import Move, Mover, move_all
from fx_nvfp4.random_checkpoint import Sizes, write_checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def reader():
    return Reader(SMALL)


def places(stored):
    """Views of the stored shape: plain, strided, transposed, in another dtype."""
    rows, cols = stored.shape
    return {
        "plain": torch.empty(rows, cols, dtype=stored.dtype),
        "strided": torch.empty(rows, 2, cols, dtype=stored.dtype)[:, 1],
        "transposed": torch.empty(cols, rows, dtype=stored.dtype).T,
        "converted": torch.empty(rows, cols, dtype=torch.float64),
    }


@pytest.mark.parametrize("piece", [1, 100, 1 << 24])
@pytest.mark.parametrize("name", [NAME, EMBEDDING])
def test_every_place_gets_the_stored_numbers_whatever_the_pieces(reader, monkeypatch, name, piece):
    monkeypatch.setattr(transfer, "PIECE", piece)
    stored = load_file(SMALL / "model.safetensors")[name]
    seen = []
    for kind, place in places(stored).items():
        mover = Mover(reader)
        mover.move(Move(reader.tensors[name], place, lambda part, first: seen.append((first, len(part)))))
        assert torch.equal(place.to(stored.dtype), stored), kind
        row = stored[0].nbytes
        assert mover._buffer.numel() <= (0 if kind == "plain" else max(piece, row)), kind
    assert sum(count for _, count in seen) == 4 * len(stored)
    assert sum(first == 0 for first, _ in seen) == 4


def test_scalars_and_empty_tensors_are_moved(reader):
    name = NAME + "_scale_2"
    place = torch.zeros((), dtype=torch.float64)
    Mover(reader).move(Move(reader.tensors[name], place))
    assert place.float() == load_file(SMALL / "model.safetensors")[name]
    Mover(reader).move(Move(replace(reader.tensors[name], shape=(0, 3), size=0), torch.empty(0, 3)))


def test_one_failing_tensor_stops_all_workers_and_is_the_error(reader):
    def fail(part, first):
        raise CheckpointError("bad numbers")

    jobs = [Move(t, torch.empty(t.shape, dtype=t.torch_dtype)) for t in reader.tensors.values()]
    jobs[3] = replace(jobs[3], check=fail)
    with tqdm(disable=True) as bar, pytest.raises(CheckpointError, match="bad numbers"):
        move_all(reader, jobs, bar)


def test_a_file_that_was_cut_after_it_was_opened_is_named(tmp_path):
    content = (SMALL / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    reader = Reader(tmp_path)
    last = max(reader.tensors.values(), key=lambda t: t.offset)
    (tmp_path / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=last.name):
        reader.read(last)


PEAK = """
    import json, sys
    from pathlib import Path
    import fx_nvfp4

    def status(key):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024

    fx_nvfp4.load(sys.argv[1], progress=False)  # imports what is imported at the first load
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = fx_nvfp4.load(sys.argv[2], progress=False)
    print(json.dumps({"peak": status("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_load_is_the_model_itself(tmp_path):
    # Four shards: mapped files, or a second copy of stacked experts, would count here.
    sizes = Sizes(layers=2, experts=32, top=2, hidden=1024, intermediate=512, heads=8, kv_heads=2, vocabulary=16384)
    total = write_checkpoint(tmp_path, "modelopt", sizes, shard_size=50_000_000, progress=False)
    program = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PEAK), str(SMALL), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["peak"] < 1.2 * total + 16e6
    assert total > 100e6


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"__metadata__": None, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, None),
        ({"a": ["U8", [4], [0, 4]]}, "a dtype, a shape and data_offsets by name"),
    ],
)
def test_headers_that_safetensors_takes_and_nobody_writes(tmp_path, header, message):
    """They ended in a TypeError."""
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    if message is None:
        assert list(Reader(tmp_path).tensors) == ["a"]
    else:
        with pytest.raises(CheckpointError, match=message):
            Reader(tmp_path)
