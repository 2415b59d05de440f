"""prepare(): modules that look like a mixture of experts and differ in one thing that numbers of one run do not show.

Each is either left alone with its reason, or fused and equal for inputs that show the difference.
"""

import types
import warnings

import moe_parents as parents
import pytest
import torch
from moe_parents import EXPERTS, HIDDEN, GatedMLP, hidden_states
from torch import nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4 import NVFP4Warning, NVFP4Weight


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def prepare(model):
    """The record of prepare()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NVFP4Warning)
        return fx_nvfp4.prepare(model).nvfp4_preparation


def reason(model):
    record = prepare(model)
    assert not record.fused
    return str(record.left_alone[0])


def run(module, x, **kwargs):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        return module(x, **kwargs)


def error(actual, expected):
    return float(((actual - expected).norm() / expected.norm()).detach())


class Loop(parents.Parent):
    """The loop in its plainest form, with a hook for each step that a subclass may change."""

    def tokens(self, rows):
        return rows

    def select(self, rows):
        return rows

    def weigh(self, y):
        return y

    def taken(self, weights):
        return weights > -1

    def logits(self, rows):
        return self.gate(rows)

    def combine(self, rows, weights, ids, out):
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & self.taken(weights))
            out.index_add_(0, token, self.weigh(expert(self.select(rows[token]))) * weights[token, slot, None])
        return out

    def forward(self, x):
        rows = x.reshape(-1, HIDDEN)
        weights, ids = self.logits(rows).softmax(dim=-1).topk(self.top_k)
        return self.combine(self.tokens(rows), weights, ids, torch.zeros_like(rows)).view_as(x)


class ClampedRows(Loop):
    def select(self, rows):
        return rows.clamp(-10, 10)


class ClampedResults(Loop):
    def weigh(self, y):
        return y.clamp(-10, 10)


class SmallWeightsSkipped(Loop):
    def taken(self, weights):
        return weights > 0.02


class Capacity(Loop):
    """At least 40 tokens an expert: small inputs lose none."""

    def combine(self, rows, weights, ids, out):
        for e, expert in enumerate(self.experts):
            token, slot = (i[: max(40, len(rows) // 4)] for i in torch.where(ids == e))
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out


class KeptInAList(Loop):
    def __init__(self):
        super().__init__()
        self.seen = []

    def logits(self, rows):
        self.seen.append(self.gate(rows))
        return self.seen[-1]


class NewBuffer(Loop):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def logits(self, rows):
        self.calls = self.calls + 1
        return self.gate(rows)


class SecondUse(Loop):
    def combine(self, rows, weights, ids, out):
        y = self.experts[0](rows)
        return super().combine(rows, weights, ids, out) + y.norm() * rows


class DecidesByResults(Loop):
    def weigh(self, y):
        return y if not y.isnan().any() else torch.zeros_like(y)


class OutOfStep(Loop):
    """Ids name the neighbour of the expert that is called."""

    def combine(self, rows, weights, ids, out):
        return super().combine(rows, weights, (ids + 1) % EXPERTS, out)


@pytest.mark.in_part(2)
@pytest.mark.parametrize(
    ("parent", "text"),
    [
        (ClampedRows, "no tokens of its input"),
        (ClampedResults, "aten.clamp.default changes what its experts give"),
        (SmallWeightsSkipped, "differs from the original"),
        (Capacity, "differs from the original"),
        (KeptInAList, "keeps tensors in self.seen"),
        (NewBuffer, "keeps tensors in self.calls"),
        (SecondUse, "experts"),
        (DecidesByResults, "decisions by what its experts give"),
    ],
)
def test_what_one_run_does_not_show_is_left_alone(parent, text):
    module = parent().eval()
    x = hidden_states(1, 50) * 8
    expected = run(module, x)
    assert text in reason(module)
    assert torch.equal(run(module, x), expected)


def test_trials_leave_nothing_behind():
    kept, counted = KeptInAList().eval(), NewBuffer().eval()
    buffer = counted.calls
    reason(kept), reason(counted)
    assert kept.seen == []
    assert counted.calls is buffer
    assert not any(m.training for m in kept.modules())


def test_clamped_hidden_states_and_other_orders_are_kept():
    class Clamped(Loop):
        def tokens(self, rows):
            return rows.clamp(-10, 10)

    for parent in (Clamped, OutOfStep):
        module = parent().eval()
        x = hidden_states(2, 9) * 50
        expected = run(module, x)
        assert prepare(module).fused
        assert error(run(module, x), expected) < 1e-5


def test_hooks_of_the_module_run_once():
    module = Loop().eval()
    module.register_forward_hook(lambda _module, _args, out: out * 2)
    module.register_forward_pre_hook(lambda _module, args: (args[0] * 3,))
    x = hidden_states(2, 9)
    expected = run(module, x)
    assert prepare(module).fused
    assert error(run(module, x), expected) < 1e-5


def test_a_forward_on_the_instance():
    module = Loop().eval()
    module.forward = types.MethodType(Loop.forward, module)
    assert "has a forward of its own" in reason(module)
    module = Loop().eval()
    for expert in module.experts:
        expert.forward = types.MethodType(GatedMLP.forward, expert)
    assert "expert 0 has a forward of its own" in reason(module)
    assert all("forward" in vars(expert) for expert in module.experts)


def test_arguments_keep_their_names_and_defaults():
    class WithMask(Loop):
        def forward(self, hidden_states, mask=None):
            out = super().forward(hidden_states)
            return out if mask is None else out * mask

    module = WithMask().eval()
    x = hidden_states(2, 9)
    expected = run(module, x)
    assert prepare(module).fused
    assert error(module(hidden_states=x, mask=None), expected) < 1e-5
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert error(compiled(hidden_states=x), expected) < 1e-5
    with pytest.raises(TypeError, match="for hidden_states alone, got 2 arguments, mask"):
        module(x, torch.ones(()))


def test_training_that_differs():
    class Dropped(GatedMLP):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    module = Loop(expert=Dropped).eval()
    assert prepare(module).fused
    with pytest.raises(RuntimeError, match="Call prepare"):
        module.train()(hidden_states(1, 3))


def test_equal_layers_that_differ_in_training():
    class Jitter(Loop):
        noise = 0.0

        def logits(self, rows):
            logits = self.gate(rows)
            return logits * (1 + self.noise * torch.rand_like(logits)) if self.training and self.noise else logits

    model = nn.Sequential(Jitter(), Jitter()).eval()
    model[1].noise = 1.0
    x = hidden_states(2, 9)
    expected = run(model.train(), x)
    assert len(prepare(model.eval()).fused) == 2
    assert error(run(model.train(), x), expected) < 1e-5


def static(linear, dialect="hardware"):
    scale = torch.tensor(0.02, dtype=torch.float64)
    weight = NVFP4Weight.from_dense(linear.weight.dequantize(), "static", scale, dialect=dialect)
    linear.weight = nn.Parameter(weight, requires_grad=False)


def test_products_that_quantise_differently():
    for name in ("gate_proj", "up_proj"):
        module = Loop().eval()
        for expert in module.experts:
            static(getattr(expert, name))
        assert "gate and up quantise their input differently" in reason(module)
    module = Loop().eval()
    for expert in module.experts:
        static(expert.down_proj, "torchao")
    x = hidden_states(2, 9)
    expected = run(module, x)
    assert prepare(module).fused
    assert error(run(module, x), expected) < 1e-5


def test_shared_biases_and_one_other_lookup_table():
    module = Loop(expert=parents.PlainMLP).eval()
    module.experts[3].fc1.bias = module.experts[0].fc1.bias
    assert "expert 0 shares fc1.bias" in reason(module)
    module = Loop(expert=parents.SpelledMLP).eval()
    module.experts[5].table[3] *= 1.01
    assert "expert 5 has another lookup table table" in reason(module)


def test_differences_are_named():
    module = Loop().eval()
    module.experts[6].limit, module.experts[0].limit = 7.0, 8.0
    assert "expert 1 differs from the first: limit is 8.0" in reason(module)


def test_two_lists_of_one_module():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(HIDDEN, 4, bias=False) for _ in range(2))
            self.a, self.b = (nn.ModuleList(GatedMLP(torch.float32) for _ in range(4)) for _ in range(2))

        def forward(self, x):
            for gate, experts in zip(self.gates, (self.a, self.b), strict=True):
                weights, ids = gate(x).softmax(dim=-1).topk(2)
                out = torch.zeros_like(x)
                for e, expert in enumerate(experts):
                    out = out + expert(x) * ((ids == e) * weights).sum(dim=-1, keepdim=True)
                x = x + out
            return x

    module = Two().eval()
    x = hidden_states(2, 9)
    expected = run(module, x)
    assert len(prepare(module).fused) == 2
    assert error(run(module, x), expected) < 1e-5


def test_the_fused_call_is_in_the_report():
    module = Loop().eval()
    assert prepare(module).fused
    report = fx_nvfp4.explain(module, hidden_states(2, 9))
    assert [(m.op, m.experts, m.n, m.k) for m in report.matched] == [
        ("moe", EXPERTS, 48, HIDDEN),
        ("moe", EXPERTS, 48, HIDDEN),
        ("moe", EXPERTS, HIDDEN, 48),
    ]
    for row, name in zip(report.matched, ("gate_proj", "up_proj", "down_proj"), strict=True):
        assert f"experts.{name}" in row.weight
    (block,) = report.blocks
    assert (block.lifted, block.style, block.top_k, block.activation) == (True, "fused", 2, "silu(g) * u")
