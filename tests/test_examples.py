"""The examples run as they stand, and say what the README shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, EXAMPLES / name], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_model_is_emulated_and_agrees_with_its_eager_self(tmp_path):
    output = run("own_model.py", tmp_path)
    assert "nvfp4_emu: 2 NVFP4 products in 1 graph, 1 MoE block lifted, 0 refused" in output
    difference, size = (float(word) for word in output.rpartition("eager model: ")[2].split(" of "))
    assert difference < size / 32


def test_generate_matches_the_producer_and_lists_every_packed_weight(tmp_path):
    pytest.importorskip("transformers")
    output = run("generate.py", tmp_path)
    assert "12 packed weights" in output
    assert "12 NVFP4 products in 1 graph, 2 MoE blocks lifted, 0 refused" in output
    assert "logits match" in output
    assert "generated tokens" in output
