"""The report: what explain() lists, what it calls things, and that nothing is skipped silently."""

import pytest
import torch
from spelled_models import SpelledMoE, tokens
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.kernel_choice import with_choice
from fx_nvfp4.report import Block as MoEBlock
from fx_nvfp4.report import Cost, GraphBreak, Match, Refusal, Report, module_path
from fx_nvfp4.report_table import names


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
    assert (up.op, up.weight, down.weight) == ("moe", "up_qdata", "down_qdata")
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
    assert lines[0] == "nvfp4_emu: 1 NVFP4 product in 1 graph, 1 refused"
    assert "8 x 64 x 32" in lines[3]
    assert lines[4:] == ["refused: a.c (mm): block of 32. use blocks of 16", "note: a.b: a hint", "note: a note"]


def match(where, op="grouped", **more):
    return Match(where, f"{where}.w", op, 8, 64, 32, "s0 x 32", "bfloat16", "W4A16", "packed tensor", **more)


def test_equal_sites_of_repeated_layers_share_a_line():
    sites = [(f"model.layers.{i}.mlp.experts", op) for i in range(48) for op in ("grouped", "indexed")]
    report = Report([match(where, op) for where, op in sites], graphs=1)
    _, header, _, *rows = str(report).splitlines()
    assert header.split()[:3] == ["module", "sites", "op"]
    assert [row.split()[:3] for row in rows] == [
        ["model.layers.{0..47}.mlp.experts", "48", "grouped"],
        ["model.layers.{0..47}.mlp.experts", "48", "indexed"],
    ]
    full = report.table(full=True).splitlines()
    assert len(full) == 3 + len(sites)
    assert "model.layers.17.mlp.experts.w" in full[3 + 2 * 17]


def test_refusals_blocks_and_notes_of_repeated_layers_share_a_line_too():
    where = [f"layers.{i}" for i in range(4)]
    report = Report(
        [match(w, notes=("swap at load",)) for w in where],
        [Refusal(w, f"mm_{i}", "why", "do") for i, w in enumerate(where)] + [Refusal("head", "mm_9", "why", "do")],
        [MoEBlock(w, True, 8, 2, "silu(g) * u", "grouped") for w in where[:3]]
        + [MoEBlock(where[3], False, reason="a")],
    )
    lines = str(report).splitlines()
    assert lines[0] == "nvfp4_emu: 4 NVFP4 products in 0 graphs, 3 MoE blocks lifted, 5 refused"
    assert lines[4:] == [
        "refused: layers.{0..3} (mm_0, ... 4 sites): why. do",
        "refused: head (mm_9): why. do",
        "block: layers.{0..2}: top 2 of 8 experts, silu(g) * u, from grouped products",
        "not lifted: layers.3: a",
        "note: layers.{0..3}: swap at load",
    ]


@pytest.mark.parametrize(
    ("paths", "written"),
    [
        (["a.0.b", "a.1.b"], ["a.{0..1}.b"]),
        (["a.0.b", "a.2.b", "a.4.b"], ["a.{0..4..2}.b"]),  # every second layer, as in Llama 4
        (["a.0.b", "a.1.b", "a.5.b"], ["a.{0,1,5}.b"]),
        (["a.3.b", "a.3.b"], ["a.3.b"]),
        ([f"l.{i}.e.{j}" for i in range(3) for j in range(4)], ["l.{0..2}.e.{0..3}"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.0.e.{0..1}", "l.1.e.0"]),  # no product of sets: nothing invented
        (["a.b", "a.c"], ["a.b", "a.c"]),
        (["(model) file.py:57", "(model) file.py:58"], ["(model) file.py:57", "(model) file.py:58"]),
        ([], []),
    ],
)
def test_paths_that_differ_in_numbers_are_written_as_one(paths, written):
    assert names(paths) == written


def test_a_graph_break_says_what_it_hides():
    hidden = tuple(f"layers.{i}.experts.{w}" for i in range(9) for w in "abcdef")
    report = Report(breaks=[GraphBreak("moe.py", 7, "if x.any():", "Data-dependent branching", ("use where",), hidden)])
    line, hint = str(report).splitlines()[1:]
    assert line.startswith(
        "graph break: moe.py:7 `if x.any():`: Data-dependent branching; it hides layers.{0..8}.experts.a,"
    )
    assert line.endswith("and 2 more")
    assert hint == "  hint: use where"


def test_a_report_survives_json():
    report = Report(
        [match("a.b", notes=("hint",), rows=4, device="cuda", config="BLOCK_M=16", milliseconds=0.5)],
        [Refusal("a", "mm", "why")],
        [MoEBlock("a", True, 8, 2, "silu(g) * u", "grouped", weights=("a.up", "a.down"))],
        notes=["note"],
        graphs=2,
        breaks=[GraphBreak("a.py", 3, "f()", "why", ("hint",), ("a.w",))],
        cost=Cost({"recognise": 0.25, "verify": 0.5}, 7.5),
    )
    assert Report.from_json(report.to_json()) == report


def test_a_report_of_another_schema_is_not_read():
    raw = {**Report().to_dict(), "schema": 99}
    with pytest.raises(ValueError, match="a report of schema 99: this fx_nvfp4 reads schema 1"):
        Report.from_dict(raw)


def test_the_cost_is_that_of_all_graphs_by_stage_and_weight():
    report = Report([match("a"), match("b")], cost=Cost({"recognise": 0.5}, 8.0))
    report.extend(Report([match("a")], cost=Cost({"recognise": 0.25, "lift": 0.25}, 2.0)))
    assert (report.seconds, report.cost.stages, len(report.weights)) == (1.0, {"recognise": 0.75, "lift": 0.25}, 2)
    last = str(report).splitlines()[-1]
    assert last == "pass: 1.00 s (recognise 0.75, lift 0.25), 10.0% of 10.0 s in the backend; 0.500 s a weight"


def test_explaining_measures_every_stage():
    with torch.no_grad():
        report = fx_nvfp4.explain(SpelledMoE("grouped", torch.bfloat16), tokens(5, torch.bfloat16))
    assert {"recognise", "rewrite", "verify"} <= report.cost.stages.keys()
    assert report.cost.stages["recognise"] > 0


@pytest.mark.parametrize(
    ("op", "device", "rows", "text"),
    [
        ("grouped", "cuda", 4, "Triton grouped: BLOCK_M=16 BLOCK_N=64 BLOCK_K=128"),
        ("grouped", "cuda", 500, "Triton grouped: BLOCK_M=64 BLOCK_N=64 BLOCK_K=128"),
        ("indexed", "cuda", 4, "Triton indexed: "),
        ("moe", "cuda", 4, "Triton moe: BLOCK_M=16"),
        ("grouped", "cpu", 4, "C++ for "),
        ("moe", "cpu", 4, "C++ for "),
        ("input_grad", "cpu", 4, "plain PyTorch on cpu"),
    ],
)
def test_a_site_names_its_kernel_and_that_nothing_was_tuned(op, device, rows, text):
    chosen = with_choice(match("a", op, rows=rows, device=device))
    assert chosen.config.startswith(text)
    assert ("heuristic, not tuned" in chosen.config) == (device == "cuda")
    assert chosen.milliseconds is None
    assert with_choice(chosen) == chosen


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers[0].mlp.experts", "model.layers.0.mlp.experts"),
        ("L['self']._modules['experts']._parameters['w']", "experts.w"),
        ("L['self'].layers[1]._orig_mod.experts", "layers.1.experts"),
        ("L['self']", "(model)"),
        ("G['table']", "table"),
    ],
)
def test_module_paths_are_written_as_users_write_them(source, path):
    assert module_path(source) == path
