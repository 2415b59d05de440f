"""The examples run as they stand, and say what the README shows."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, cache, *arguments, launcher=()):
    """cache: Inductor's, for an example in a process of its own; None: the example runs in this one, with ours.

    A process spends ten seconds on imports before it comes to the example.
    """
    if cache is None:
        torch._dynamo.reset()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return printed.getvalue()
    # Small products gain nothing from more threads, and wait for each other where cores are busy.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, *launcher, EXAMPLES / name, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_model_is_emulated_and_agrees_with_its_eager_self():
    output = run("own_model.py", None)
    assert "nvfp4_emu: 2 NVFP4 products in 1 graph, 1 MoE block lifted, 0 refused" in output
    difference, size = (float(word) for word in output.rpartition("eager model: ")[2].split(" of "))
    assert difference < size / 32


@pytest.mark.slow  # the README's first command, which CI runs anyway
def test_generate_matches_the_producer_and_lists_every_packed_weight(tmp_path):
    pytest.importorskip("transformers")
    output = run("generate.py", tmp_path)
    assert "12 packed weights" in output
    assert "12 NVFP4 products in 1 graph, 2 MoE blocks lifted, 0 refused" in output
    assert "logits match" in output
    assert "generated tokens" in output


def test_quantize_model_compiles_to_eager_and_loads_what_it_saved():
    pytest.importorskip("transformers")
    output = run("quantize_model.py", None)
    amax, mse = (re.search(rf"by {rule}: squared error of weights (.*), of", output)[1] for rule in ("amax", "mse"))
    assert float(mse) < 0.85 * float(amax)
    assert "quantize_: 12 weights packed, 4 left alone" in output
    assert "calibrate: 12 weights, 0 weights of experts without a token" in output
    assert float(re.search(r"largest difference to eager (\S+)", output)[1]) < 1e-4
    assert output.count("loaded: logits are the same") == 2


@pytest.mark.slow
def test_tune_kernel_runs_the_kernels_of_the_dump_as_they_are_and_changed(tmp_path):
    output = run("tune_kernel.py", tmp_path, "--folder", tmp_path / "dump")
    assert re.search(r"fx_nvfp4_kernels: README.txt kernels run.py$", output, re.MULTILINE)
    chosen, *changed = re.findall(r"^(?:as the library chooses|CONFIG = .*): (.*)$", output, re.MULTILINE)
    assert changed
    assert all(re.match(r"\d+ tokens relative error \S+ ", line) for line in (chosen, *changed))
    assert "half the factor of the sum: no good: AssertionError: relative error" in output
    dump = next((tmp_path / "dump").rglob("fx_nvfp4_kernels"))
    assert "\nCONFIG = None\n" in (dump / "run.py").read_text()
    assert "tl.constexpr(128.0)" in (dump / "kernels" / "tiled.py").read_text()


def test_every_example_is_run():
    """Or nobody notices that one no longer does."""
    text = Path(__file__).read_text()
    assert [e.name for e in EXAMPLES.glob("*.py") if f'run("{e.name}"' not in text] == []


@pytest.mark.slow
def test_lora_learns_and_has_the_gradients_of_the_dequantised_model(tmp_path):
    output = run("lora.py", tmp_path)
    before, after = re.search(r"loss (\S+) before, (\S+) after", output).groups()
    assert float(after) < 0.3 * float(before)
    assert float(re.search(r"dequantised model (\S+) of", output)[1]) < 1e-4


@pytest.mark.gpu
def test_a_step_of_lora_takes_less_than_the_dequantised_weights(tmp_path):
    sizes = ["--experts", "32", "--hidden", "1024", "--inner", "768", "--tokens", "256"]
    output = run("lora.py", tmp_path, "--device", "cuda", "--dtype", "bfloat16", *sizes)
    dense, step = re.search(r"packed, ([\d,.]+) MB dequantised\n.*: ([\d,.]+) MB at most", output).groups()
    assert float(step.replace(",", "")) < float(dense.replace(",", ""))


@pytest.mark.slow
def test_expert_parallel_computes_what_one_process_does(tmp_path):
    pytest.importorskip("transformers")
    output = run("expert_parallel.py", tmp_path, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    assert [f"rank {rank}: 2 experts a layer" in output for rank in (0, 1)] == [True, True]
    assert float(re.search(r"difference to one process: (\S+)", output)[1]) < 1e-4


@pytest.mark.slow
def test_compare_formats_orders_them_and_tells_rules_apart(tmp_path):
    lines = run("compare_formats.py", tmp_path).splitlines()[1:]
    rows = {
        name: [float(n.rstrip("%")) for n in line.split()] for name, line in ((s[:34].strip(), s[34:]) for s in lines)
    }
    bf16, weights, both = (rows[name][0] for name in ("bf16", "W4A16", "W4A4 static, hardware"))
    assert bf16 < 0.01 < weights < both < 0.4
    # vLLM's reference gives the hardware's numbers; the exporters differ in small blocks.
    assert rows["W4A4 static, vllm"][1:] == [0, 100]
    assert all(rows[f"W4A4 static, {name}"][2] < 60 for name in ("compressed-tensors", "modelopt", "torchao"))


@pytest.mark.slow
def test_accuracy_trains_measures_and_finds_its_checkpoint_again(tmp_path):
    pytest.importorskip("transformers")
    file, plot = tmp_path / "results.json", tmp_path / "results.png"
    arguments = ("--checkpoint", tmp_path / "model", "--device", "cpu", "--threads", "1", "--json", file)
    output = run("accuracy.py", tmp_path, *arguments, "--plot", plot)
    first = json.loads(file.read_text())
    assert "step    29 of 30" in output
    assert plot.stat().st_size > 10_000
    bf16, weights, both = first
    assert bf16["perplexity"] < 64  # 256 before it learned anything
    # The figures of so small a model order by chance, the errors do not.
    for mild, strong in zip(weights["layers_alone"], both["layers_alone"], strict=True):
        assert 0.01 < mild < strong < 0.5
    errors = [e for layer in both["experts"] for e in layer if e is not None]
    assert len(errors) > 8
    assert all(0.01 < e < 0.5 for e in errors)

    output = run("accuracy.py", tmp_path, *arguments)
    assert "step" not in output
    for again, before in zip(json.loads(file.read_text()), first, strict=True):
        assert again["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4)
        assert again["layers_alone"] == pytest.approx(before["layers_alone"], rel=2e-2)
