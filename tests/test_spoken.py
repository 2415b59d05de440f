"""Reports name what the model names: a graph input in a reason once read arg1_1."""

import torch
from fx_nvfp4.passes.spoken import spoken
from torch import fx, nn

import fx_nvfp4
from fx_nvfp4.report import Block, Match, Refusal, Report


class Int4(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.zeros(32, 32, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(32, 2))

    def forward(self, x):
        q = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).float() - 8
        return x @ (q.unflatten(-1, (-1, 32)) * self.scale.unsqueeze(-1)).flatten(-2).T


def test_a_reason_names_the_buffer():
    (refusal,) = fx_nvfp4.explain(Int4(), torch.randn(3, 64)).refused
    assert refusal.reason.endswith("(scale)")


def test_every_text_of_a_report_and_nothing_else():
    graph = fx.Graph()
    names = {graph.placeholder(name): f"model.{name[-1]}" for name in ("arg1_1", "primals_2")}
    match = Match(
        "w", "arg1_1", "linear", 0, 16, 16, "3 x 16", "float32", "W4A16", source="spelled", notes=("arg1_1 is sorted",)
    )
    report = Report(
        [match],
        [Refusal("arg1_1", "arg1_1", "arg1_1 and primals_2", "not arg1_12 nor targ1_1, nor arg3_1")],
        [Block("b", False, reason="reads primals_2.", advice="primals_2?")],
        ["a note on arg1_1"],
        graphs=1,
    )
    got = spoken(report, names)
    assert got.matched[0].notes == ("model.1 is sorted",)
    assert got.matched[0].weight == "arg1_1"
    assert got.refused == [Refusal("arg1_1", "arg1_1", "model.1 and model.2", "not arg1_12 nor targ1_1, nor arg3_1")]
    assert got.blocks == [Block("b", False, reason="reads model.2.", advice="model.2?")]
    assert got.notes == ["a note on model.1"]
    assert got.graphs == 1
