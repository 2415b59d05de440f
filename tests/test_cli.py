"""``python -m fx_nvfp4``: tables, data, exit status; on real checkpoints, damaged copies and a user's module."""

import json
import math
import subprocess
import sys

import pytest
from checkpoint_files import CHECKPOINTS, SMALL, edited
from safetensors.torch import load_file

import fx_nvfp4
from fx_nvfp4 import cli
from fx_nvfp4.checkpoints.inspect import inspect_checkpoint
from fx_nvfp4.report import Report

MODEL = """
    import torch
    from spelled_models import SpelledMoE, tokens

    def right():
        return SpelledMoE("linear", torch.float32), (tokens(3, torch.float32),)

    def wrong():
        return SpelledMoE("linear", torch.float32, table_entry=(5, 3.03)), {"x": tokens(3, torch.float32)}

    def alone():
        return SpelledMoE("linear", torch.float32)
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    lines = [line.removeprefix("    ") for line in MODEL.splitlines()]
    (tmp_path / "users_model.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    yield "users_model"
    sys.modules.pop("users_model", None)


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_inspect_prints_format_weights_and_scales(capsys):
    status, out, _ = run(capsys, "inspect", SMALL)
    assert status == 0
    first, sizes, *rows = out.splitlines()
    assert first.endswith("MixtralForCausalLM, modelopt, W4A4 static")
    assert sizes.startswith(
        "32 packed weights 0.0556 MB, 3.54 times smaller than in bfloat16; not packed: 9 tensors BF16"
    )
    (experts,) = [r for r in rows if r.startswith("model.layers.{0..1}.block_sparse_moe.experts.{0..3}.w1")]
    assert experts.split()[1:7] == ["8", "48", "x", "64", "W4A4", "static"]
    assert rows[-1] == "gate and up: global scales differ in 0 of 8 pairs"


def test_inspect_gives_every_layer_or_weight_its_line(capsys):
    assert "model.layers.1.block_sparse_moe.experts.{0..3}.w2" in run(capsys, "inspect", SMALL, "--by", "layer")[1]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in run(capsys, "inspect", SMALL, "--by", "weight")[1]


def test_inspect_as_data_has_the_scales_as_multipliers(capsys):
    status, out, _ = run(capsys, "inspect", SMALL, "--json")
    found = json.loads(out)
    stored = load_file(SMALL / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    (weight,) = [w for w in found["packed"] if w["name"] == name]
    assert (status, found["schema"], weight["shape"]) == (0, 1, [48, 64])
    assert weight["global_scale"] == [stored[f"{name}.weight_scale_2"].item()] * 2
    assert weight["input_scale"] == [stored[f"{name}.input_scale"].item()] * 2
    parts = [t for n, t in stored.items() if n.startswith(f"{name}.")]
    assert weight["size"] == sum(t.numel() * t.itemsize for t in parts)


def test_inspect_says_how_far_gate_and_up_are_apart(capsys, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.1"
    gate, up = f"{name}.w1.weight_scale_2", f"{name}.w3.weight_scale_2"
    folder = edited(tmp_path, lambda config, tensors: tensors.update({gate: tensors[up] * 4}))
    assert f"differ in 1 of 8 pairs, at most 4 times ({name})" in run(capsys, "inspect", folder)[1]


def test_inspect_lists_all_that_is_missing_where_load_stops_at_the_first(capsys, tmp_path):
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w2" for e in range(3)]

    def damage(config, tensors):
        del tensors[f"{names[0]}.weight_scale"], tensors[f"{names[1]}.weight"]
        tensors[f"{names[2]}.input_scale"].zero_()

    status, out, _ = run(capsys, "inspect", edited(tmp_path, damage), "--strict")
    assert status == 1
    problems = [line for line in out.splitlines() if line.startswith("problem:")]
    assert len(problems) == 3
    for name, part in zip(names, ("weight_scale", "weight", "input_scale"), strict=True):
        assert any(f"{name}.{part}" in p for p in problems)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inspect_finds_what_load_packs(name):
    # ModelOpt's 3-D experts and torchao's tensors state shapes and modes elsewhere than the rest.
    found = inspect_checkpoint(CHECKPOINTS[name])
    model = fx_nvfp4.load(CHECKPOINTS[name], progress=False)
    packed = [p for p in model.parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight)]
    assert sum(math.prod(w.shape) for w in found.packed) == sum(p.numel() for p in packed)
    assert {w.activations for w in found.packed} == {p.describe().removesuffix(" per-expert") for p in packed}
    assert max(w.global_scale[1] for w in found.packed) == max(p.global_scale.max().item() for p in packed)
    assert not found.problems


@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_a_path_that_is_no_checkpoint_is_an_error_without_a_traceback(capsys, tmp_path, command):
    status, out, err = run(capsys, command, tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err.startswith("fx_nvfp4: ")
    assert "expected a folder with config.json" in err
    (tmp_path / "config.json").write_text("{}")
    assert run(capsys, command, tmp_path)[0] == 2


def test_explain_loads_compiles_and_reports(capsys):
    status, out, _ = run(capsys, "explain", SMALL, "--tokens", 5, "--device", "cpu", "--dtype", "float32", "--strict")
    assert status == 0
    assert out.startswith("nvfp4_emu: 12 NVFP4 products in 1 graph")
    assert "model.layers.{0..1}.self_attn.q_proj" in out
    assert "5 x 64 float32" in out


def test_explain_takes_a_users_model_and_strict_is_the_exit_status(capsys, users_module):
    status, out, _ = run(capsys, "explain", "--module", f"{users_module}:right", "--json", "--strict")
    assert (status, len(Report.from_json(out).matched)) == (0, 2)
    status, out, _ = run(capsys, "explain", "--module", f"{users_module}:wrong", "--strict")
    assert status == 1
    assert "refused: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a checkpoint, or --module"),
        (("--module", "users_model"), "expected package.module:function"),
        (("--module", "nowhere:f"), "No module named 'nowhere'"),
        (("--module", "users_model:nothing"), "users_model has no function 'nothing'"),
        (("--module", "users_model:alone"), "must return (model, inputs)"),
        ((SMALL, "--tokens", "0"), "--tokens must be at least 1"),
        ((SMALL, "--device", "nonsense"), "--device nonsense: "),
        (("--module", "users_model:right", "--dtype", "float32", "--tokens", "3"), "--tokens, --dtype say how a check"),
    ],
)
def test_what_cannot_be_served_is_named(capsys, users_module, arguments, message):
    status, out, err = run(capsys, "explain", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_the_package_runs_as_a_program(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "fx_nvfp4", "inspect", str(SMALL)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "32 packed weights" in done.stdout


@pytest.mark.parametrize("command", [("faithfulness",), ("bench", "--model", SMALL)])
def test_where_a_plot_cannot_go_is_told_before_anything_is_measured(capsys, tmp_path, command):
    pytest.importorskip("matplotlib")
    for file, message in (("none/x.png", "there is no folder"), ("x.foo", "must end in one of")):
        status, out, err = run(capsys, *command, "--plot", tmp_path / file)
        assert (status, out) == (2, "")
        assert message in err


def test_arguments_that_nothing_reads_are_errors(capsys):
    assert "--layer is of a checkpoint" in run(capsys, "faithfulness", "--layer", 77)[2]
    assert "Unrecognized mode=typo" in run(capsys, "bench", "--model", SMALL, "--mode", "typo")[2]


def test_a_users_module_may_change_the_path_and_import_late(capsys, tmp_path, monkeypatch, users_module):
    """What it put first was taken away in place of the folder."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "late_helper.py").write_text("from users_model import right\n")
    (tmp_path / "early.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path / 'lib')!r})\n"
        "def make():\n    import late_helper\n    return late_helper.right()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert run(capsys, "explain", "--module", "early:make")[0] == 0
    assert str(tmp_path / "lib") in sys.path
    assert str(tmp_path) not in sys.path


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "fx_nvfp4.lm_harness", raising=False)
    assert cli.main(["lm-eval", "--help"]) == 2
    assert """pip install "fx_nvfp4[lm-eval]\"""" in capsys.readouterr().err
