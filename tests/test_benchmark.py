"""The benchmark of whole models: its ways compute the same, each stage is one graph, and it prints what it measured.

Cases: a config, which gets random weights, and a checkpoint; 2-D and 3-D weights, stored transposed too; configs and
settings that cannot be served.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight, cli
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.benchmark import Settings, opened
from fx_nvfp4.benchmark.timing import time_generation
from fx_nvfp4.benchmark.ways import WAYS, make_dense, spell_dequantisation

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINT = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 384,
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


@pytest.mark.slow
def test_the_command_times_all_ways_of_a_config(config, capsys):
    pytest.importorskip("transformers")
    plot = config.with_name("bench.png")
    command = f"bench --model {config} --tokens 5 --batch 1 2 --new-tokens 3 --repeats 2 --device cpu"
    command += f" --json --plot {plot} --save {plot.with_suffix('.json')}"
    with collect_reports() as report:
        assert cli.main(command.split()) == 0
    study = json.loads(capsys.readouterr().out)
    assert json.loads(plot.with_suffix(".json").read_text()) == study
    assert [(row["way"], row["batch"], row["tokens"]) for row in study["rows"]] == [
        (way, batch, 5) for way in WAYS for batch in (1, 2)
    ]
    for row in study["rows"]:
        assert 0 < row["prefill_least"] <= row["prefill"] < row["first"]
        assert 0 < row["decode_least"] <= row["decode"] < row["first"]
    packed, dense, _, spelled = (row["size"] for row in study["rows"][::2])
    assert packed < 0.7 * dense
    assert spelled == pytest.approx(packed, rel=0.05)
    assert plot.stat().st_size > 10_000
    assert report.graphs == 4  # prefill and decoding, of one prompt and of two
    assert [block.lifted for block in report.blocks] == [True] * 4
    loading = study["loading"]
    assert 0 < loading["size"] == packed <= loading["checkpoint"] * 1.1
    assert loading["seconds"] > 0
    assert loading["host_peak"] is None or loading["host_peak"] >= 0.5 * packed
    assert not report.refused


def test_a_checkpoint_is_timed_as_it_is_and_printed_as_a_table(capsys):
    pytest.importorskip("transformers")
    command = f"bench --model {CHECKPOINT} --ways packed --tokens 4 --new-tokens 2 --repeats 1 --device cpu"
    assert cli.main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "modelopt_mixtral_w4a4, 2 new tokens, activations as the checkpoint says, compiled as a whole, mode default"
    )
    assert lines[3].split()[:5] == ["1", "x", "4", "tokens", "packed"]
    assert any(line.startswith("loading: ") for line in lines)


def test_all_ways_compute_with_the_same_weights():
    pytest.importorskip("transformers")
    prompt = torch.arange(3, 12).view(1, 9)
    logits = []
    for convert in (make_dense, spell_dequantisation):
        model = fx_nvfp4.load(CHECKPOINT, dtype=torch.bfloat16, activations="none", progress=False)
        convert(model)
        assert not any(isinstance(p.data, NVFP4Weight) for p in model.parameters())
        logits.append(model(prompt).logits)
    assert torch.equal(*logits)


def test_weights_stored_transposed_are_spelled_transposed():
    module = nn.Module()
    weight = NVFP4Weight.from_dense(torch.randn(2, 48, 32)).replace(transposed=True)
    module.weight = nn.Parameter(weight, requires_grad=False)
    spell_dequantisation(module)
    assert torch.equal(module.weight, weight.dequantize())


def test_a_config_without_weights_says_what_it_lacks(config, tmp_path):
    config.write_text(json.dumps({**CONFIG, "model_type": "mixtral"}))
    with pytest.raises(ValueError, match="qwen3_moe, and not 'mixtral': give a checkpoint"), opened(tmp_path):
        pass
    config.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "head_dim"}))
    with pytest.raises(ValueError, match="the config has no head_dim"), opened(config):
        pass


def test_some_layers_of_a_config(config):
    config.write_text(json.dumps({**CONFIG, "num_hidden_layers": 5}))
    with opened(config, layers=2) as folder:
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    with (
        pytest.raises(ValueError, match="1 to 5 layers, as the config has, found 6"),
        opened(config, layers=6),
    ):
        pass
    with pytest.raises(ValueError, match="is a checkpoint: give its config"), opened(CHECKPOINT, layers=1):
        pass


@pytest.mark.parametrize(
    "wrong", [{"tokens": ()}, {"tokens": (4, 0)}, {"new_tokens": 0}, {"batch": (1, 0)}, {"repeats": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        Settings(**wrong)


def test_ways_are_checked():
    with pytest.raises(ValueError, match="ways must be of"):
        Settings(ways=("backwards",))


def test_what_cannot_be_timed_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["bench", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_the_cache_fits_keys_and_values_of_different_widths():
    """Multi-head latent attention: a cache made from head_dim alone once did not fit."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    times = time_generation(model, torch.arange(6).view(1, 6), new_tokens=3, repeats=2)
    assert (len(times.prefill), len(times.decode)) == (2, 6)


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path, capsys):
    command = ["bench", "--model", str(CHECKPOINT), "--device", "cpu", "--save", str(tmp_path / "no" / "file.json")]
    assert cli.main(command) == 2
    assert "there is no folder" in capsys.readouterr().err
