"""The report: what explain() lists, what it calls things, and that nothing is skipped silently."""

import pytest
import torch
from spelled_models import SpelledMoE, tokens
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.report import Match, Refusal, Report, module_path


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        scale = torch.rand(4, dtype=torch.float64) * 0.01
        experts = NVFP4Weight.from_dense(torch.randn(4, 32, 48), activations="static", act_scale=scale)
        self.experts = nn.ParameterDict({"w": nn.Parameter(experts, requires_grad=False)})
        self.out = nn.Linear(32, 16, bias=False)
        self.out.weight = nn.Parameter(NVFP4Weight.from_dense(torch.randn(16, 32)), requires_grad=False)
        self.unused = nn.Linear(32, 16)
        self.unused.weight = nn.Parameter(NVFP4Weight.from_dense(torch.randn(16, 32)), requires_grad=False)

    def forward(self, x):
        ids = torch.arange(len(x)) % 4
        return self.out(torch.bmm(self.experts["w"][ids], x.unsqueeze(-1)).squeeze(-1))


def test_packed_parameters_are_named_with_shapes_and_activations():
    with torch.no_grad():
        report = fx_nvfp4.explain(Block(), torch.randn(5, 48))
    experts, out = report.matched
    assert (experts.weight, experts.op, experts.experts, experts.n, experts.k) == ("experts.w", "indexed", 4, 32, 48)
    assert (experts.x, experts.dtype) == ("5 x 48", "float32")
    assert experts.activations == "W4A4 static per-expert, hardware rule"
    assert (out.where, out.weight, out.op, out.experts, out.activations) == ("out", "out.weight", "linear", 0, "W4A16")
    assert experts.source == out.source == "packed tensor"


def test_a_packed_parameter_that_no_graph_uses_is_refused():
    with torch.no_grad():
        report = fx_nvfp4.explain(Block(), torch.randn(5, 48))
    (refusal,) = report.refused
    assert refusal.where == "unused.weight"
    assert "no compiled graph uses this packed weight" in str(refusal)


def test_a_spelled_dequantisation_names_its_formula_and_codes():
    with torch.no_grad():
        report = fx_nvfp4.explain(SpelledMoE("grouped", torch.bfloat16), tokens(5, torch.bfloat16))
    up, down = report.matched
    assert (up.op, up.weight, down.weight) == ("grouped", "up_qdata", "down_qdata")
    assert up.where.startswith("(model) spelled_models.py:")
    assert up.source.startswith("bf16(")


def test_graph_breaks_are_said():
    model = Block()

    def broken(x):
        y = model(x)
        torch._dynamo.graph_break()
        return model.out(y.repeat(1, 2))

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = model

        def forward(self, x):
            return broken(x)

    with torch.no_grad():
        report = fx_nvfp4.explain(Broken(), torch.randn(3, 48))
    assert report.graphs > 1
    assert any("Dynamo split the model" in note for note in report.notes)


def test_the_table_has_a_line_for_each_site():
    match = Match("a.b", "w", "grouped", 8, 64, 32, "s0 x 32", "bfloat16", "W4A16", "packed tensor", ("a hint",))
    text = str(Report([match], [Refusal("a.c", "mm", "block of 32", "use blocks of 16")], notes=["a note"], graphs=1))
    lines = text.splitlines()
    assert lines[0] == "nvfp4_emu: 1 NVFP4 products in 1 graph, 1 refused"
    assert "8 x 64 x 32" in lines[3]
    assert lines[4:] == ["refused: a.c (mm): block of 32. use blocks of 16", "note: a.b: a hint", "note: a note"]


def test_a_report_survives_json():
    match = Match("a.b", "w", "linear", 0, 64, 32, "5 x 32", "float32", "W4A16", "f32(v * s)", ("hint",))
    report = Report([match], [Refusal("a", "mm", "why")], notes=["note"], graphs=2)
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers[0].mlp.experts", "model.layers.0.mlp.experts"),
        ("L['self']._modules['experts']._parameters['w']", "experts.w"),
        ("L['self']", "(model)"),
        ("G['table']", "table"),
    ],
)
def test_module_paths_are_written_as_users_write_them(source, path):
    assert module_path(source) == path
