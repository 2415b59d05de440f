"""Fake quantisation that models spell in front of packed weights: found by its bits, rounded once, else reported.

Rules, dtypes, roundings; scales static, dynamic, per row, per expert, absent; near misses; opaque ops; options.
"""

import pytest
import quantisers as q
import torch
from fx_nvfp4.passes.activation_proof import Rule
from fx_nvfp4.passes.activations import NearMiss, Quantisers, Spelled
from spelled_models import SpelledMoE, tokens
from spellings import trace
from torch import nn

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.format import fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
N, K = 32, 64


def recognise(fn, *args, **kwargs):
    traced = trace(fn, *args, **kwargs)
    return Quantisers(traced.constants).recognise(traced.operand), traced


def rule(fn, *args, **kwargs) -> Rule:
    found, _ = recognise(fn, *args, **kwargs)
    assert isinstance(found, Spelled), found
    return found.rule


def x_of(dtype=FP32, rows=6, seed=0):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scale_of(name, s=0.02):
    return torch.tensor(1 / s if q.RULES[name][1] else s)


class Targets:
    def __call__(self, graph):
        self.graph = graph
        self.ops = [str(n.target) for n in graph.nodes if n.op == "call_function"]
        self.ours = [o.removeprefix("fx_nvfp4.").removesuffix(".default") for o in self.ops if "fx_nvfp4" in o]


def run(model, *inputs, **options):
    """(result, report, ops that ran) of a model whose rewritten graph runs op by op."""
    torch._dynamo.reset()
    targets = Targets()
    options = {"codegen": False, "joint_custom_post_pass": targets, **options}
    with torch.no_grad(), collect_reports() as report:
        y = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options=options)(*inputs)
    return y, report, targets


class Quantised(nn.Module):
    """linear(quantise(x), packed weight)."""

    def __init__(self, quantise, activations="none", dtype=FP32, scale=0.02, k=K):
        super().__init__()
        w = torch.randn(N, k, generator=torch.Generator().manual_seed(5)).to(dtype)
        act = torch.tensor(0.5, dtype=torch.float64) if activations == "static" else None
        self.weight = nn.Parameter(NVFP4Weight.from_dense(w, activations, act), requires_grad=False)
        self.quantise = quantise
        self.register_buffer("scale", torch.as_tensor(scale))

    def forward(self, x):
        return nn.functional.linear(self.quantise(x, self.scale), self.weight)


# Recognition, on the graph and on numbers


@pytest.mark.in_part(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", q.RULES)
def test_every_rule_is_told_from_the_others_and_its_bits_are_the_graphs(name, dtype):
    spelling, _ = q.RULES[name]
    x, s = x_of(dtype), scale_of(name)
    found = rule(spelling, x, s)
    exact = 1 / s.double() if found.op == "divide" else s.double()
    assert torch.equal(fake_quantize(x.to(found.dtype), exact, found.dialect).to(dtype), spelling(x, s))
    same = {"hardware": {"hardware", "vllm"}, "vllm": {"vllm"}}.get(name, {name})
    assert found.dialect in same
    assert found.op == ("divide" if q.RULES[name][1] else "multiply")


@pytest.mark.parametrize("rounding", q.ROUNDERS)
@pytest.mark.parametrize("name", q.RULES)
def test_roundings_are_recognised_however_they_are_spelled(name, rounding):
    spelling, _ = q.RULES[name]
    assert rule(lambda x, s: spelling(x, s, q.ROUNDERS[rounding]), x_of(), scale_of(name))


@pytest.mark.in_part(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", q.RULES)
def test_backend_makes_the_quantiser_part_of_the_product(name, dtype):
    spelling, _ = q.RULES[name]
    model, x = Quantised(spelling, dtype=dtype, scale=scale_of(name)), x_of(dtype)
    y, report, targets = run(model, x)
    (match,) = report.matched
    assert match.activations.startswith("W4A4 static, ")
    assert match.activations_from == "spelled"
    assert not report.refused
    assert targets.ours == ["linear"]
    assert not any("amax" in o or "max" in o or "float8" in o for o in targets.ops)
    torch.testing.assert_close(y, model(x), rtol=2**-6, atol=2**-6 * y.abs().max().item())


@pytest.mark.parametrize("name", q.RULES)
def test_as_written_keeps_the_graphs_bits(name):
    model, x = Quantised(q.RULES[name][0], dtype=BF16, scale=scale_of(name)), x_of(BF16)
    y, report, _ = run(model, x, as_written=True)
    assert torch.equal(y, model(x))
    assert report.matched[0].activations_from == "spelled, as written"
    assert not report.refused


# Where the scale comes from


def test_a_dynamic_scale_of_the_whole_tensor_stays_computed_by_the_graph():
    def dynamic(x, _):
        return q.vllm(x, 2688.0 / x.abs().amax().float())

    model, x = Quantised(dynamic), x_of()
    y, report, targets = run(model, x)
    assert report.matched[0].activations == "W4A4 static, vllm rule"
    assert targets.ours == ["linear"]
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [True, False])
def test_a_scale_for_each_token_becomes_one_op(static):
    def per_row(x, s):
        rows = s if static else (x.abs().amax(-1, keepdim=True) / 2688.0).float()
        return q.torchao(x, rows[:, None])

    x = x_of()
    scale = torch.rand(len(x), 1) * 0.01 + 0.001
    y, report, targets = run(Quantised(per_row, scale=scale), x)
    assert targets.ours == ["fake_quantize", "linear"]
    assert report.matched[0].activations_from == "spelled"
    assert report.matched[0].activations == f"W4A4 {'static' if static else 'dynamic'} per-row, torchao rule"
    torch.testing.assert_close(y, Quantised(per_row, scale=scale)(x), rtol=1e-5, atol=1e-5)


class Batched(Quantised):
    """Experts [E, N, K], each with an activation scale of its own."""

    def __init__(self, experts=3):
        super().__init__(None)
        w = torch.randn(experts, N, K, generator=torch.Generator().manual_seed(6))
        self.weight = nn.Parameter(NVFP4Weight.from_dense(w), requires_grad=False)
        self.scale = torch.tensor([0.004, 0.032, 0.01])

    def forward(self, x):
        return torch.bmm(q.torchao(x, self.scale[:, None, None, None]), self.weight.mT)


class Chosen(Batched):
    def forward(self, x, ids):
        rows = q.torchao(x, self.scale[ids][:, None, None])
        return torch.bmm(self.weight[ids], rows.unsqueeze(-1)).squeeze(-1)


def test_scales_of_experts_stay_apart():
    x = torch.randn(3, 5, K)
    y, report, targets = run(Batched(), x)
    assert targets.ours == ["batched"]
    assert report.matched[0].activations == "W4A4 static per-expert, torchao rule"
    torch.testing.assert_close(y, Batched()(x), rtol=1e-5, atol=1e-4)


def test_scales_chosen_by_the_experts_ids_stay_apart():
    inputs = torch.randn(5, K), torch.tensor([2, 0, 1, 1, 2])
    y, report, targets = run(Chosen(), *inputs)
    assert targets.ours == ["indexed"]
    assert report.matched[0].activations == "W4A4 static per-expert, torchao rule"
    torch.testing.assert_close(y, Chosen()(*inputs), rtol=1e-5, atol=1e-4)


def test_without_a_scale_and_with_one_that_is_a_number():
    assert rule(lambda x: q.torchao(x, torch.ones(())), x_of()).factor == 1.0
    assert rule(lambda x: _by_number(x, 0.25), x_of()).factor == 0.25


def _by_number(x, s):
    b = q.blocks_of(x)
    scale = ((b.abs().amax(-1, keepdim=True) / 6.0) / s).clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).float()
    return (q.round_by_steps((b * ((1.0 / s) / scale)).clamp(-6, 6)) * (scale * s)).reshape(x.shape)


def test_rows_that_move_after_they_are_rounded_are_moved_before():
    def moved(x, g):
        return q.vllm(x, g).view(2, 3, K)[:, [2, 0, 1]]

    model, x = Quantised(moved, scale=50.0), x_of()
    y, _, targets = run(model, x)
    assert targets.ours == ["linear"]
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)


def test_two_products_of_the_same_rounded_rows_are_both_served():
    class Two(Quantised):
        def forward(self, x):
            h = self.quantise(x, self.scale)
            return nn.functional.linear(h, self.weight), h @ self.weight.T

    y, report, targets = run(Two(q.vllm, scale=50.0), x_of())
    assert targets.ours[-1] == "linear"
    assert {m.activations_from for m in report.matched} == {"spelled"}
    torch.testing.assert_close(y[0], y[1])


def _by_rows(x, s):
    return q.modelopt(x, (x.abs().amax(-1, keepdim=True).float() / 2688.0)[:, None])


@pytest.mark.in_part(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spelling", "ops", "said"),
    [
        (q.vllm, ["linear"], "W4A4 static, vllm rule"),
        (_by_rows, ["fake_quantize", "linear"], "W4A4 dynamic per-row, modelopt rule"),
    ],
)
def test_token_counts_may_be_symbols(spelling, ops, said, dtype):
    """All sizes of x are symbols then, its columns among them until the product is known."""
    model, targets = Quantised(spelling, "static", dtype, scale=50.0), Targets()
    torch._dynamo.reset()
    options = {"codegen": False, "joint_custom_post_pass": targets}
    compiled = torch.compile(model, backend="nvfp4_emu", dynamic=True, options=options)
    plain = Quantised(spelling, "none", dtype, scale=50.0)
    with collect_reports() as report, torch.no_grad():
        for rows in (5, 9, 2):
            y, want = compiled(x_of(dtype, rows)), plain(x_of(dtype, rows))
            torch.testing.assert_close(y, want, rtol=2**-6, atol=2**-6 * want.abs().max().item())
    assert targets.ours == ops
    assert report.graphs == 1
    assert [m.activations for m in report.matched] == [said]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_rows_that_are_not_finite_keep_to_themselves(dtype):
    """Under a scale for each row, which is zero, infinite or NaN for these."""
    x = x_of(dtype, rows=8)
    x[1], x[3, 5], x[4, 5] = 0, float("nan"), float("inf")
    y, report, _ = run(Quantised(_by_rows, dtype=dtype), x)
    want = Quantised(_by_rows, dtype=dtype)(x)
    good = torch.tensor([0, 2, 5, 6, 7])
    assert not report.refused
    torch.testing.assert_close(y[good], want[good], rtol=2**-6, atol=2**-6 * want[good].abs().max().item())
    assert not y[[3, 4]].isfinite().all(1).any() or any("NaN and infinities" in n for n in report.matched[0].notes)


# Near misses


def _mxfp4(x, s):
    b = q.blocks_of(x, 32)
    scale = torch.exp2(torch.floor(torch.log2(b.abs().amax(-1, keepdim=True).clamp(min=1e-30))) - 2)
    return (q.round_by_steps(b / scale) * scale).reshape(x.shape)


def _block_of_32(x, s):
    b = q.blocks_of(x, 32)
    scale = q.e4m3(b.abs().amax(-1, keepdim=True) * (1.0 / 6.0) / s)
    return (q.round_by_steps(b / (scale * s)) * (scale * s)).reshape(x.shape)


def _ties_away(x):
    m = x.abs().clamp(max=6.0)
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    return torch.sign(x) * torch.floor(m / step + 0.5) * step


def _noisy(x):
    return q.round_by_steps(x + (torch.rand_like(x) - 0.5) * 0.1)


def _int8(x, s):
    scale = x.abs().amax(-1, keepdim=True) / 127.0
    return torch.round(x / scale).clamp(-128, 127) * scale


def _fp8(x, s):
    scale = x.abs().amax(-1, keepdim=True) / 448.0
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _e8m0(x, s):
    b = q.blocks_of(x)
    scale = torch.exp2(torch.ceil(torch.log2(b.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 6.0)))
    return (q.round_by_steps(b / scale) * scale).reshape(x.shape)


def _with_largest(x, s, largest):
    b = q.blocks_of(x)
    scale = q.e4m3((1.0 / s) * (largest(b.abs()) * (1.0 / 6.0)))
    inverse = torch.where(scale == 0, 0.0, 1.0 / (scale * s))
    return (q.round_by_where(b * inverse) * (scale * s)).reshape(x.shape)


def _by_halves(b):
    while b.shape[-1] > 1:
        b = torch.maximum(*b.chunk(2, -1))
    return b


def _smaller_saturation(x, s):
    b = q.blocks_of(x)
    scale = ((b.abs().amax(-1, keepdim=True) / 6.0) / s).clamp(2.0**-6, 256.0).to(torch.float8_e4m3fn).float()
    return (q.round_by_steps((b * ((1.0 / s) / scale)).clamp(-6, 6)) * (scale * s)).reshape(x.shape)


def _some_ties_down(x):
    """As FP-Quant's Triton kernel rounds 0.75, 1.75 and 3.5."""
    m = x.abs()
    down = (m == 0.75) | (m == 1.75) | (m == 3.5)
    return q.round_by_where(torch.where(down, 0.99 * x, x))


def _four_over_six(x, s):
    """The largest code of a block is 4 or 6, whichever loses less."""
    b = q.blocks_of(x).float()
    ways = []
    for largest in (6.0, 4.0):
        scale = q.e4m3((b.abs().amax(-1, keepdim=True) / largest) / s)
        ways.append(q.round_by_where(b / torch.where(scale == 0, 1.0, scale * s)) * (scale * s))
    errors = [(way - b).square().sum(-1, keepdim=True) for way in ways]
    return torch.where(errors[0] <= errors[1], *ways).reshape(x.shape)


NEAR_MISSES = {
    "mxfp4": _mxfp4,
    "block of 32": _block_of_32,
    "ties away from zero": lambda x, s: q.torchao(x, s, _ties_away),
    "some ties down": lambda x, s: q.torchao(x, s, _some_ties_down),
    "four over six": _four_over_six,
    "stochastic": lambda x, s: q.torchao(x, s, _noisy),
    "another grid": lambda x, s: q.torchao(x, s, lambda v: torch.round(v)),
    "e8m0 scales": _e8m0,
    "int8": _int8,
    "fp8": _fp8,
    "scales up to 256": _smaller_saturation,
    "one number that is kept": lambda x, s: torch.where(x == 0.75, 0.75, q.torchao(x, s)),
    "large numbers that are kept": lambda x, s: torch.where(x.abs() > 1.5, x, q.torchao(x, s)),
    "fp8 by a static scale": lambda x, s: q.e4m3(x / s) * s,
    "int8 by a static scale": lambda x, s: torch.round(x / s).clamp(-128, 127) * s,
    "codes by a static scale": lambda x, s: q.round_by_where(x / s) * s,
    "4 or 6 as the largest": lambda x, s: torch.where(x > 0, q.torchao(x, s), q.torchao(x, s * 1.5)),
    "maxima by topk": lambda x, s: _with_largest(x, s, lambda b: b.topk(1, -1)[0]),
    "maxima by sort": lambda x, s: _with_largest(x, s, lambda b: b.sort(-1)[0][..., -1:]),
    "maxima by halves": lambda x, s: _with_largest(x, s, _by_halves),
    "a 16-bit reciprocal": lambda x, s: q.vllm(x, (1.0 / s).half()),
}


@pytest.mark.in_part(3)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_and_are_reported_and_their_rows_are_not_rounded_again(name):
    fn = NEAR_MISSES[name]
    model, x = Quantised(fn, "static"), x_of(rows=32)
    plain = Quantised(fn)
    y, report, targets = run(model, x)
    assert targets.ours == ["linear"]
    assert len(report.refused) == 1, report
    assert "none of the known rules" in report.refused[0].reason
    assert report.matched[0].activations == "W4A16"
    if name != "stochastic":
        torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-4)


@pytest.mark.in_part(3)
@pytest.mark.parametrize(
    "keep",
    [
        lambda x, y: torch.where(torch.arange(x.shape[1]) == 1, x, y),
        lambda x, y: torch.cat((y[:, :1], x[:, 1:2], y[:, 2:]), 1),
        lambda x, y: torch.cat((y[:3], x[3:4], y[4:])),
    ],
    ids=["where", "cat", "row"],
)
@pytest.mark.parametrize("rows", [5, 16384])
def test_a_column_or_row_that_is_kept(keep, rows):
    """Ten elements of each block were never looked at where K is a multiple of 256, and of many rows most."""
    model = Quantised(lambda x, s: keep(x, q.torchao(x, s)), k=256)
    x = torch.randn(rows, 256)
    y, report, targets = run(model, x)
    assert targets.ours == ["linear"]
    assert "none of the known rules" in report.refused[0].reason
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)


def test_blocks_along_rows_are_not_the_products():
    model, x = Quantised(lambda x, s: q.torchao(x.T.contiguous(), s).T), x_of(rows=32)
    y, _, targets = run(model, x)
    assert targets.ours == ["fake_quantize", "linear"]
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, s: torch.softmax(x, -1),
        lambda x, s: nn.functional.normalize(x) * s,
        lambda x, s: x / x.abs().amax(-1, keepdim=True),
        lambda x, s: torch.relu(x) * s,
        lambda x, s: x.clamp(-1, 1) + nn.functional.hardswish(x) + torch.where(x > 2.5, x, s),
    ],
)
def test_what_rounds_nothing_is_no_quantiser(fn):
    found, _ = recognise(fn, x_of(), torch.tensor(0.1))
    assert found is None
    _, report, _ = run(Quantised(fn), x_of())
    assert report.matched[0].activations_from == ""
    assert not report.refused


def test_a_near_miss_of_one_element_is_none_of_the_rules():
    def wrong(x):
        return torch.where(x == 2.5, 3.0, q.round_by_steps(x))

    found, _ = recognise(lambda x, s: q.torchao(x, s, wrong), x_of(), torch.tensor(0.25))
    assert isinstance(found, NearMiss)


# Never twice, never by accident


def test_never_rounded_twice():
    model, x = Quantised(q.vllm, "static", scale=50.0), x_of()
    y, report, _ = run(model, x)
    (match,) = report.matched
    assert match.activations == "W4A4 static, vllm rule"
    assert "is not applied as well" in match.notes[0]
    torch.testing.assert_close(y, Quantised(q.vllm, scale=50.0)(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", ["checkpoint", "nvfp4", "none"])
@pytest.mark.parametrize("carried", ["none", "static", "dynamic"])
def test_option_decides_where_the_model_spells_nothing(wanted, carried):
    model, x = Quantised(lambda x, s: x, carried), x_of()
    y, report, _ = run(model, x, activations=wanted)
    (match,) = report.matched
    effective = {"none": "none", "checkpoint": carried, "nvfp4": "dynamic" if carried == "none" else carried}[wanted]
    assert match.activations.startswith("W4A16" if effective == "none" else f"W4A4 {effective}")
    decided = "" if carried == effective == "none" else "tensor" if carried == effective else "option"
    assert match.activations_from == decided
    torch.testing.assert_close(y, Quantised(lambda x, s: x, effective)(x))


def test_nvfp4_option_does_not_round_what_the_model_rounds():
    for spelling in (q.vllm, NEAR_MISSES["int8"]):
        model, x = Quantised(spelling, scale=50.0), x_of()
        y, _, _ = run(model, x, activations="nvfp4")
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-4)


AFTERWARDS = {
    "select": lambda y: y[-1],
    "mask": lambda y: y * (torch.arange(len(y)) < 3)[:, None],
    "masked_fill": lambda y: y.masked_fill((torch.arange(len(y)) < 3)[:, None], 0.0),
    "cat": lambda y: torch.cat([y, torch.ones_like(y)]),
    "pad": lambda y: torch.nn.functional.pad(y, (0, 0, 0, 2)),
    "flip": lambda y: y.flip(0),
    "chunk": lambda y: y.chunk(2)[1],
}


class TwoProducts(nn.Module):
    """Rows rounded once for both products, by a scale for each, and rearranged before the second."""

    def __init__(self, carried, change):
        super().__init__()
        scale = torch.tensor(0.01, dtype=torch.float64) if carried == "static" else None
        self.change = change
        for i, name in enumerate("ab"):
            dense = torch.randn(32, K, generator=torch.Generator().manual_seed(i))
            weight = NVFP4Weight.from_dense(dense, carried, scale)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x):
        y = q.hardware(x, (2688 / x.abs().amax(-1, keepdim=True).clamp(min=1e-9)).unsqueeze(-1))
        return nn.functional.linear(y, self.a), nn.functional.linear(self.change(y), self.b)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("change", AFTERWARDS)
def test_rounded_rows_that_are_rearranged_are_not_rounded_again(change):
    """The packed tensor's static scale was applied to them as well, in silence: 3 % off."""
    x = x_of()
    want = TwoProducts("none", AFTERWARDS[change])(x)
    (_, second), report, _ = run(TwoProducts("static", AFTERWARDS[change]), x)
    torch.testing.assert_close(second, want[1], rtol=1e-5, atol=1e-5)
    (refusal,) = report.refused
    assert "chosen, joined or masked" in refusal.reason


class RoundingMoE(SpelledMoE):
    """Rounds the rows before both products, with one scale each."""

    def route(self, x):
        self.first = x
        return super().route(x)

    def act(self, gate_up):
        return q.vllm(super().act(gate_up), torch.tensor(30.0))

    def forward(self, x):
        weights, ids = self.route(x)
        return getattr(self, self.style)(q.vllm(x, torch.tensor(40.0)), weights, ids)


@pytest.mark.parametrize("style", ["grouped", "batched"])
def test_a_block_that_rounds_before_both_products_is_one_op(style):
    model, x = RoundingMoE(style, BF16), tokens(9, BF16)
    y, report, targets = run(model, x)
    assert targets.ours == ["moe"]
    assert {(m.activations, m.activations_from) for m in report.matched} == {("W4A4 static, vllm rule", "spelled")}
    assert (y.float() - model(x).float()).abs().mean() < 0.02 * y.float().abs().mean()
