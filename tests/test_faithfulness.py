"""The proof: our fp32 results are as good as any order of an fp32 sum, and the other ways lie at known distances.

Cases: random weights with equal and with distinct scales, and with blocks of many magnitudes; a real checkpoint; the
exact-sum model of Blackwell in the golden vectors.
"""

import json
import sys

import golden
import pytest
import torch
from checkpoint_files import CHECKPOINTS, SMALL, edited

from fx_nvfp4 import cli
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.block import Projection
from fx_nvfp4.faithfulness import checkpoint_cases, measure, random_cases
from fx_nvfp4.faithfulness.arithmetic import dequantized, exact, reordered
from fx_nvfp4.faithfulness.measure import DEQUANTIZED, FLOOR, MERGED, OURS, WEIGHT_ONLY
from fx_nvfp4.reference import Activations

pytestmark = pytest.mark.usefixtures("one_thread")
SITUATIONS = ("equal scales", "distinct scales", "wide blocks")


@pytest.fixture(scope="module")
def random_study(device):
    return measure(random_cases(32, device=device, hidden=512, inner=256, experts=4), device)


@pytest.fixture(scope="module")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def assert_ours_is_at_the_floor(study):
    for case in study.cases:
        ours = study.row(case, OURS)
        assert study.to_floor(ours) < 2, case
        # In a block a last bit can send an activation to the other of two codes, and its row with it.
        assert 0 < ours.fp32_worst < (1e-2 if case.endswith("experts") or "block" in case else 2e-6), case
        assert ours.bf16_equal > 0.998, case


@pytest.mark.parametrize("what", ["linear", "MoE block"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_way_has_its_distance(random_study, what, situation):
    def row(way):
        return random_study.row(f"{what}, {situation}", way)

    # Each operand rounds to 2^-9 at most, and both do; in a block the second activation is rounded to other codes, too.
    assert 1e-3 < row(DEQUANTIZED).fp32 < (4e-3 if what == "linear" else 6e-2)
    assert row(DEQUANTIZED).bf16_equal < 0.6
    assert row(DEQUANTIZED).bf16 > 1.3 * row(OURS).bf16
    # What rounding activations to four bits costs: the format's own error.
    assert 0.05 < row(WEIGHT_ONLY).fp32 < 0.25
    if situation == "distinct scales":
        # up's scale is 8 times gate's; gate's for both loses seven eighths of it.
        assert 0.8 < row(MERGED).fp32 < 0.95
    else:
        with pytest.raises(KeyError):
            row(MERGED)


def test_ours_is_within_twice_an_fp32_sum_in_another_order(random_study):
    assert_ours_is_at_the_floor(random_study)


def test_wide_blocks_need_more_bits_than_fp32_has(random_study):
    # Else every order gives the same sum, and comparing with one proves nothing.
    floors = {s: random_study.row(f"linear, {s}", FLOOR).fp32 for s in SITUATIONS}
    assert floors["wide blocks"] > 2 * floors["equal scales"]


@pytest.mark.parametrize("name", [n for n in CHECKPOINTS if "kvfp8" not in n])
def test_real_checkpoints(name, device):
    study = measure(checkpoint_cases(CHECKPOINTS[name], tokens=16, device=device), device)
    assert_ours_is_at_the_floor(study)
    ways = {row.way for row in study.rows}
    assert (WEIGHT_ONLY in ways) == ("w4a16" not in name)
    assert any(case.endswith("experts") for case in study.cases)


def test_merged_scales_are_measured_where_a_checkpoint_has_different_ones(tmp_path):
    def apart(config, tensors):
        for name in [n for n in tensors if n.endswith("w3.weight_scale_2")]:
            tensors[name] *= 8

    study = measure(checkpoint_cases(edited(tmp_path, apart), tokens=8))
    (experts,) = {row.case for row in study.rows if row.way == MERGED}
    assert study.row(experts, MERGED).fp32 > 0.5
    assert study.to_floor(study.row(experts, OURS)) < 2


def test_an_exact_sum_in_float64_is_that_of_integers():
    generator = torch.Generator().manual_seed(0)
    qdata = torch.randint(256, (2, 5, 32), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0x7F, (2, 5, 4), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    a, w = nvfp4.code_times_scale(qdata, scale).double() * 2**10
    assert torch.equal(a, a.round())
    sums = a.long() @ w.long().T
    p = Projection(qdata[1], scale[1], torch.ones(5), None, Activations("none", None, "hardware"))
    assert torch.equal(exact((a / 2**10).float(), p), sums.double() / 2**20)


def test_blackwells_exact_sum_and_the_emulation_by_dequantising():
    g = golden.load("gemm")
    pairs = [(nvfp4.pack(g[f"gemm.{s}_codes"]), g[f"gemm.{s}_scale"].view(torch.float8_e4m3fn)) for s in "aw"]
    a, rows = nvfp4.code_times_scale(*pairs[0]), g["gemm.w_codes"].shape[0]

    def weight(scale):
        # The activations are codes already, and enter as they are.
        return Projection(
            *pairs[1], scale.float().expand(rows).contiguous(), None, Activations("none", None, "hardware")
        )

    assert torch.equal(exact(a, weight(torch.ones(1))), g["gemm.acc_exact_f64"])
    both = weight(g["gemm.alpha"])
    for y in (torch.ops.fx_nvfp4.linear(a, *both.weight), reordered(1)(a, both)):
        assert torch.equal(y.bfloat16(), g["gemm.out_hw_bf16"])
    emulated = dequantized(a * g["gemm.a_s2"], weight(g["gemm.w_s2"])).bfloat16()
    assert (emulated == g["gemm.out_vllm_emulation_bf16"]).float().mean() > 0.99
    assert (emulated == g["gemm.out_hw_bf16"]).float().mean() < 0.6


def run(capsys, *arguments):
    status = cli.main(["faithfulness", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_prints_a_table_and_data(capsys):
    status, out, _ = run(capsys, SMALL, "--tokens", 8, "--device", "cpu")
    assert status == 0
    assert out.startswith("case ")
    assert "model.layers.1.mlp.experts       ours" in out
    status, out, _ = run(capsys, SMALL, "--tokens", 8, "--device", "cpu", "--layer", 0, "--json")
    found = json.loads(out)
    assert (status, found["schema"], found["device"]) == (0, 1, "cpu")
    assert {row["case"] for row in found["rows"]} >= {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"}


def test_the_command_draws_a_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "errors.svg"
    assert run(capsys, SMALL, "--tokens", 4, "--device", "cpu", "--plot", file)[0] == 0
    assert "</svg>" in file.read_text()


def test_without_matplotlib_the_command_says_so_before_it_measures(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, out, err = run(capsys, "--plot", tmp_path / "errors.png")
    assert (status, out) == (2, "")
    assert "pip install matplotlib" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SMALL, "--layer", 7), "layer 7 holds no packed weight; there are some in layers [0, 1]"),
        (("--tokens", 0), "--tokens must be at least 1"),
        (("nowhere",), "expected a folder with config.json"),
    ],
)
def test_what_cannot_be_measured_is_named(capsys, arguments, message):
    status, out, err = run(capsys, *arguments, "--device", "cpu")
    assert (status, out) == (2, "")
    assert message in err
