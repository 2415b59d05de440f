"""Options on the arithmetic, and quantisers that are single ops: what they change, that it is said, what is refused.

Guards: another engine's shared scales only where asked for, NaN hidden by rounding, results rounded to another dtype.
"""

import pytest
import torch
from spellings import by_blocks, lookup
from test_activations import BF16, FP16, FP32, Quantised, run, x_of
from torch import nn

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.format import fake_quantize, quantize
from fx_nvfp4.fused import FusedExperts

pytestmark = pytest.mark.usefixtures("one_thread")
E, INNER, K = 4, 32, 64


def unquantised(x, _):
    return x


# Quantisers of other projects, registered here under their qualified names


@pytest.fixture(scope="module", autouse=True)
def opaque_ops():
    """Stand-ins for ops of packages that are not installed: names and schemas are theirs, bodies are ours."""
    schema = "(Tensor input, int block_size, Tensor amax, int num_bits, int exponent_bits, int scale_num_bits, "
    schema += "int scale_exponent_bits) -> Tensor"
    scoped = torch.library._scoped_library
    with (
        scoped("tensorrt", "FRAGMENT") as modelopt,
        scoped("unknown_engine", "FRAGMENT") as unknown,
        scoped("_C", "FRAGMENT") as vllm,
    ):
        packs = "(Tensor input, Tensor input_global_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)"
        for library, name in ((vllm, "scaled_fp4_quant"), (unknown, "pack_fp4")):
            library.define(name + packs)
            library.impl(name, _pack, "CompositeExplicitAutograd")
            library.impl(name, _shapes_of_pack, "Meta")
        modelopt.define("dynamic_block_quantize_op" + schema)
        modelopt.impl("dynamic_block_quantize_op", _modelopt, "CompositeExplicitAutograd")
        modelopt.impl("dynamic_block_quantize_op", lambda x, *_: torch.empty_like(x), "Meta")
        unknown.define("nvfp4_quantize(Tensor x) -> Tensor")
        unknown.impl("nvfp4_quantize", lambda x: x.clone(), "CompositeExplicitAutograd")
        yield


def _modelopt(x, block_size, amax, *_):
    return fake_quantize(x, (amax.float() / 2688.0).double(), "modelopt-kernel")


def _pack(x, g, _):
    codes, scale = quantize(x, 1 / g.double())
    return codes, scale


def _shapes_of_pack(x, g, _):
    rows, k = x.shape
    return x.new_empty(rows, k // 2, dtype=torch.uint8), x.new_empty(rows, k // 16, dtype=torch.float8_e4m3fn)


def by_packer(op):
    def quantise(x, g):
        codes, scale = op(x, g, False)
        return by_blocks(lookup(codes), scale.float() / g).to(x.dtype)

    return quantise


@pytest.mark.parametrize("known", [True, False])
def test_activations_that_arrive_as_codes_are_not_rounded_again(known):
    name = "_C::scaled_fp4_quant" if known else "unknown_engine::pack_fp4"
    op = torch.ops._C.scaled_fp4_quant if known else torch.ops.unknown_engine.pack_fp4
    y, report, _ = run(Quantised(by_packer(op), "static", scale=50.0), x_of())
    assert report.matched[0].activations == "W4A16"
    said = report.matched[0].notes[0] if known else report.refused[0].reason
    assert f"activations are packed by {name}" in said
    assert len(report.refused) == (not known)
    torch.testing.assert_close(y, Quantised(by_packer(op), scale=50.0)(x_of()), rtol=1e-5, atol=1e-4)


def by_modelopt(x, amax, block_size=16, exponent_bits=4):
    return torch.ops.tensorrt.dynamic_block_quantize_op(x, block_size, amax, 4, 2, 8, exponent_bits)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_modelopts_op_is_known_by_its_name(dtype):
    model, x = Quantised(by_modelopt, "static", dtype, scale=3.1), x_of(dtype)
    y, report, targets = run(model, x)
    (match,) = report.matched
    assert targets.ours == ["linear"]
    assert not any("tensorrt" in op for op in targets.ops)
    assert (match.activations, match.activations_from) == ("W4A4 static, modelopt-kernel rule", "spelled")
    plain = Quantised(by_modelopt, "none", dtype, scale=3.1)
    torch.testing.assert_close(y, plain(x), rtol=2**-6, atol=2**-6 * y.abs().max().item())


@pytest.mark.parametrize("changed", [{"block_size": 32}, {"exponent_bits": 8}])
def test_modelopts_op_with_another_format_is_refused(changed):
    model, x = Quantised(lambda x, s: by_modelopt(x, s, **changed), "static", scale=3.1), x_of()
    _, report, targets = run(model, x)
    assert "to another format than NVFP4" in report.refused[0].reason
    assert report.matched[0].activations == "W4A16"
    assert any("tensorrt" in op for op in targets.ops)


def test_an_unknown_opaque_quantiser_is_named_and_not_followed_by_another():
    _, report, _ = run(Quantised(lambda x, s: torch.ops.unknown_engine.nvfp4_quantize(x), "static"), x_of())
    assert "opaque op unknown_engine::nvfp4_quantize, which is not known" in report.refused[0].reason
    assert report.matched[0].activations == "W4A16"


def test_our_own_op_called_by_the_model_is_not_followed_by_another():
    def ours(x, s):
        return torch.ops.fx_nvfp4.fake_quantize(x, s.double())

    model, x = Quantised(ours, "static"), x_of()
    y, report, targets = run(model, x)
    assert targets.ours == ["fake_quantize", "linear"]
    assert report.matched[0].activations_from == "spelled"
    torch.testing.assert_close(y, Quantised(ours)(x))


# Scales that differ by 8x


class Routed(nn.Module):
    """Experts whose gate and up scales differ by 8x, and whose input scales differ by 8x from one to the next."""

    def __init__(self, layout, act_size=1.0):
        super().__init__()
        g = torch.Generator().manual_seed(9)
        act = torch.tensor([0.001, 0.008, 0.001, 0.008], dtype=torch.float64) * act_size

        def dense(rows, k, spread):
            return torch.randn(E, rows, k, generator=g) * spread, torch.full((E, rows), 0.002) * spread

        def packed(w, scale):
            return NVFP4Weight.from_dense(w, "static", act, global_scale=scale)

        gate, up = dense(INNER, K, 1.0), dense(INNER, K, 8.0)
        both = {
            "separate": [packed(*gate), packed(*up)],
            "concatenated": [packed(*(torch.cat(pair, 1) for pair in zip(gate, up, strict=True)))],
            "interleaved": [packed(*(torch.stack(pair, 2).flatten(1, 2) for pair in zip(gate, up, strict=True)))],
        }
        names = ("gate_proj", "up_proj") if layout == "separate" else ("gate_up_proj",)
        weights = {**dict(zip(names, both[layout], strict=True)), "down_proj": packed(*dense(K, INNER, 1.0))}
        self.experts = FusedExperts(weights, {}, "silu(g) * u", layout)
        self.gate, self.up, self.down = packed(*gate), packed(*up), weights["down_proj"]

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)

    def reference(self, x, ids, weights, shared=False):
        """Token by token and expert by expert in float64, with the checkpoint's scales or with the shared ones."""
        out = torch.zeros(len(x), K, dtype=torch.float64)
        for t, row in enumerate(ids.tolist()):
            for a, e in enumerate(row):
                gate, up = (self._product(x[t], w, e, shared) for w in (self.gate, self.up))
                if shared:
                    up = up * (self.gate.global_scale[e] / self.up.global_scale[e]).double()
                h = (nn.functional.silu(gate.float()) * up.float()).float()
                out[t] += weights[t, a].double() * self._product(h, self.down, e, shared)
        return out.float()

    @staticmethod
    def _product(x, w, e, shared):
        scale = w.act_scale.amax() if shared else w.act_scale[e]
        return w.dequantize()[e].double() @ fake_quantize(x, scale).double()


@pytest.mark.parametrize("layout", ["separate", "concatenated", "interleaved"])
def test_scales_that_differ_by_8x_are_exact_and_the_maximum_is_visibly_not(layout):
    model, tokens = Routed(layout), 12
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(tokens, K, generator=g), torch.randint(0, E, (tokens, 2), generator=g), torch.rand(tokens, 2)
    exact, shared = model.reference(*inputs), model.reference(*inputs, shared=True)
    y, report, _ = run(model, *inputs)
    assert _distance(y, exact) < 1e-2  # a rounding boundary may be crossed here and there
    assert _distance(y, shared) > 0.5
    assert not report.notes
    y, report, _ = run(model, *inputs, shared_scales="vllm")
    assert _distance(y, shared) < 1e-2
    assert _distance(y, exact) > 0.5
    assert "as vLLM, not as the checkpoint" in report.notes[0]


def _distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_shared_scales_need_a_whole_block():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(NVFP4Weight.from_dense(torch.randn(E, INNER, K)), requires_grad=False)

        def forward(self, x):
            return torch.bmm(x, self.weight.mT)

    _, report, _ = run(Products(), torch.randn(E, 2, K), shared_scales="vllm")
    assert "only a block that is one op tells gate from up" in report.notes[0]


# Rounding of results


def test_out_dtype_float32_drops_the_rounding_before_a_cast():
    class Cast(Quantised):
        def forward(self, x):
            return super().forward(x).float()

    model, x = Cast(unquantised, "static", BF16), x_of(BF16)
    exact = Quantised(unquantised, "static", BF16)
    want = torch.ops.fx_nvfp4.linear(
        x.float(),
        *(exact.weight.qdata, exact.weight.block_scale, exact.weight.global_scale, exact.weight.act_scale),
        "static",
    )
    y, report, _ = run(model, x, out_dtype=FP32)
    assert torch.equal(y, want)
    assert not torch.equal(y, model(x))
    assert not report.notes


def test_out_dtype_that_the_graph_does_not_take_is_left_out_with_a_note():
    model, x = Quantised(unquantised, "static", BF16), x_of(BF16)
    y, report, _ = run(model, x, out_dtype=FP32)
    assert torch.equal(y, model(x))
    assert "not cast to float32" in report.notes[0]


def test_out_dtype_of_16_bits_rounds_once():
    """Inductor's generated code once left the cast out, together with the one that takes it back."""
    model, x = Quantised(unquantised, "static"), x_of()
    for codegen in (False, True):
        y, _, _ = run(model, x, out_dtype=BF16, codegen=codegen)
        assert y.dtype == FP32
        assert torch.equal(y, model(x).bfloat16().float())


def test_gradients_pass_what_rounds():
    x = torch.randn(3, 5, requires_grad=True)
    y = torch.ops.fx_nvfp4.round_to(x, "float16")
    assert torch.equal(y, x.half().float())
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 5))


def test_what_cannot_be_rounded_is_refused():
    for x, dtype in ((torch.ones(2, dtype=BF16), "bfloat16"), (torch.ones(2), "float32")):
        with pytest.raises(ValueError, match="round_to: expected float32"):
            torch.ops.fx_nvfp4.round_to(x, dtype)


class Viewed(Quantised):
    """Tokens in two dims, and a cast behind the view that this takes."""

    def forward(self, x):
        return super().forward(x.view(2, -1, K)).float()


def test_out_dtype_reaches_a_cast_behind_views():
    model, x = Viewed(unquantised, "static", BF16), x_of(BF16)
    y, report, targets = run(model, x, out_dtype=FP32)
    assert targets.ours == ["linear"]
    assert not torch.equal(y, model(x))
    assert torch.equal(y.bfloat16(), model(x).bfloat16())
    assert not report.notes


class CastBlock(Routed):
    """A block in bf16 whose result is cast to fp32 behind a view."""

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights).view(1, *x.shape).float()


def block_inputs(dtype=FP32, tokens=12):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, E, (tokens, 2), generator=g)
    return torch.randn(tokens, K, generator=g).to(dtype), ids, torch.rand(tokens, 2, generator=g)


def test_out_dtype_of_a_block_is_that_of_its_sum():
    model, inputs = CastBlock("concatenated"), block_inputs(BF16)
    narrow, _, _ = run(model, *inputs)
    wide, report, targets = run(model, *inputs, out_dtype=FP32)
    assert targets.ours == ["moe"]
    assert not report.notes
    assert torch.equal(wide.bfloat16().float(), narrow)
    assert not torch.equal(wide, narrow)


@pytest.mark.parametrize("style", ["grouped", "batched"])
def test_out_dtype_and_check_finite_leave_blocks_one_op(style):
    from spelled_models import SpelledMoE, tokens

    class Cast(SpelledMoE):
        def forward(self, x):
            return super().forward(x).float()

    model, x = Cast(style, BF16), tokens(9, BF16)
    narrow, _, _ = run(model, x, activations="nvfp4")
    wide, report, targets = run(model, x, activations="nvfp4", out_dtype=FP32, check_finite=True)
    assert targets.ours == ["check_finite_block", "moe"]
    assert [b.lifted for b in report.blocks] == [True]
    assert torch.equal(wide.bfloat16().float(), narrow)
    assert not torch.equal(wide, narrow)


# Activations that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_check_finite_names_the_site(value):
    model, x = Quantised(unquantised, "static"), x_of()
    run(model, x, check_finite=True)
    x[2, 5] = value
    y, _, _ = run(model, x)
    assert y.isfinite().all(), "the hardware's conversion hides it"
    with pytest.raises(FloatingPointError, match=r"1 activations are not finite, the first is .* at \[2, 5\]"):
        run(model, x, check_finite=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_names_a_blocks_site_and_changes_nothing_else(value):
    model, inputs = Routed("separate"), block_inputs()
    want, _, _ = run(model, *inputs)
    got, _, targets = run(model, *inputs, check_finite=True)
    assert torch.equal(got, want)
    assert targets.ours == ["check_finite_block", "moe"]
    inputs[0][4, 5] = value
    with pytest.raises(FloatingPointError, match=r"1 activations are not finite, the first is .* at \[4, 5\]"):
        run(model, *inputs, check_finite=True)


def test_check_finite_looks_between_the_products_of_a_block():
    """In fp16 finite activations may become infinite ones, which the second product would round to numbers."""
    model, (x, ids, weights) = Routed("concatenated", act_size=100.0), block_inputs(FP16)
    x[7] = 300.0
    ids[0, 1] = -1  # a slot of nobody holds nothing
    y, _, _ = run(model, x, ids, weights)
    assert y.isfinite().all(), "the hardware's conversion hides it"
    with pytest.raises(FloatingPointError, match=r"between its products .* the first is .* at \[7, 0, \d+\]"):
        run(model, x, ids, weights, check_finite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "fp4"}, r"'activations' must be \"checkpoint\" or \"nvfp4\" or \"none\", got 'fp4'"),
        ({"out_dtype": "float32"}, r"'out_dtype' must be None or torch.float32 or torch.bfloat16"),
        ({"shared_scales": "sglang"}, r"'shared_scales' must be None or \"vllm\", got 'sglang'"),
        ({"as_written": 1}, r"'as_written' must be True or False, got 1"),
    ],
)
def test_option_values_are_named(options, message):
    with pytest.raises(Exception, match=message):
        run(Quantised(unquantised), x_of(), **options)


def test_as_written_leaves_a_weight_that_the_graph_rounds_early():
    from spelled_models import SpelledMoE, tokens

    model, x = SpelledMoE("linear", BF16), tokens(5, BF16)
    y, report, targets = run(model, x, as_written=True)
    assert torch.equal(y, model(x))
    assert not targets.ours
    assert not report.refused
    assert "left as written" in report.notes[0]


@pytest.mark.parametrize("carried", [("static", "none"), ("none", "static"), ("none", "none")])
def test_the_option_nvfp4_is_for_both_products_of_a_block(carried):
    """It looked at up alone, and left down's activations as they were where up had a scale."""
    scale = torch.full((E,), 1e-3, dtype=torch.float64)
    shapes = {"gate_up_proj": (E, 2 * INNER, K), "down_proj": (E, K, INNER)}
    weights = {
        name: NVFP4Weight.from_dense(torch.randn(shape), mode, scale if mode == "static" else None)
        for (name, shape), mode in zip(shapes.items(), carried, strict=True)
    }
    experts = FusedExperts(weights, {}, "silu(g) * u", "concatenated")
    given = torch.randn(9, K), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as report:
        torch.compile(experts, backend="nvfp4_emu", options={"codegen": False, "activations": "nvfp4"})(*given)
    modes = [match.activations.split(",")[0].removesuffix(" per-expert") for match in report.matched]
    assert modes == [f"W4A4 {'dynamic' if mode == 'none' else mode}" for mode in carried]


@pytest.mark.parametrize(
    ("mode", "layout", "said"),
    [
        ("static", "concatenated", "one activation scale, the largest, for all experts; gate's weight scale for up"),
        ("dynamic", "concatenated", "as vLLM, not as the checkpoint: gate's weight scale for up"),
        ("none", "plain", "changes nothing"),
    ],
)
def test_a_note_on_shared_scales_names_those_that_were(mode, layout, said):
    scale = torch.full((E,), 1e-3, dtype=torch.float64) if mode == "static" else None
    name, rows = ("up_proj", INNER) if layout == "plain" else ("gate_up_proj", 2 * INNER)
    shapes = {name: (E, rows, K), "down_proj": (E, K, INNER)}
    weights = {name: NVFP4Weight.from_dense(torch.randn(shape), mode, scale) for name, shape in shapes.items()}
    experts = FusedExperts(weights, {}, "relu(u)" if layout == "plain" else "silu(g) * u", layout)
    given = torch.randn(9, K), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as report:
        torch.compile(experts, backend="nvfp4_emu", options={"codegen": False, "shared_scales": "vllm"})(*given)
    assert any(said in note for note in report.notes), report.notes
