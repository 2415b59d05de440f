"""Weights in tiles: ops give the very bits that they give of the canonical layout, and conversions lose nothing.

Edges: sizes that fill no tiles, negative and NaN block scales, memory that others see or that is not contiguous,
weights that share parts, inference mode, state dicts of the other layout, tied weights.
"""

import sys

import moe_parents
import pytest
import torch
from test_tensor import E, K, N, hold, make_weight, same
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Warning, NVFP4Weight
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.layouts import is_tiled, weight_sizes
from fx_nvfp4.prepack import prepack

H = 48
op = torch.ops.fx_nvfp4
IDS = torch.tensor([[3, 0], [1, 1], [-1, 2]])


@pytest.fixture(params=["plain", "c++"])
def body(request, monkeypatch):
    monkeypatch.setenv("FX_NVFP4_CPU", request.param)


def parts(weight, tiled):
    w = weight.tiled() if tiled else weight
    return w.qdata, w.block_scale, w.global_scale


def x(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


STATIC = (torch.rand(E, dtype=torch.float64) * 0.01 + 0.001, "static")
OFFS = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
OPS = {
    "linear": lambda w, one: op.linear(x(3, K), *one, None, "dynamic"),
    "batched": lambda w, one: op.batched(x(E, 3, K), *w, *STATIC),
    "indexed": lambda w, one: op.indexed(x(6, K), *w, IDS.flatten(), *STATIC),
    "grouped": lambda w, one: op.grouped(x(6, K), *w, OFFS, None, "dynamic"),
    "dequantize": lambda w, one: op.dequantize(*w, torch.float16),
    "dequantize one": lambda w, one: op.dequantize(*one, torch.float32),
    "input_grad of linear": lambda w, one: op.input_grad(x(3, N), *one),
    "input_grad of batched": lambda w, one: op.input_grad(x(E, 3, N), *w),
    "input_grad of indexed": lambda w, one: op.input_grad(x(6, N), *w, ids=IDS.flatten()),
    "input_grad of grouped": lambda w, one: op.input_grad(x(6, N), *w, offs=OFFS),
}


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("name", OPS)
def test_ops_give_the_bits_of_the_canonical_layout(name):
    weight, one = make_weight(), make_weight((N, K), seed=1)
    canonical, tiled = (OPS[name](parts(weight, t), parts(one, t)) for t in (False, True))
    assert torch.equal(canonical, tiled)


# up's layout -> shapes of the up weights for a down weight [E, H, 64]
BLOCKS = {"concatenated": [128], "interleaved": [128], "plain": [64], "separate": [64, 64]}


def moe(tiled, layout, function=op.moe, weighted="output"):
    """The op, or its backward, with the weights named by `tiled` ("up", "down") in tiles."""
    ups = [parts(make_weight((E, n, K), seed=i), "up" in tiled) for i, n in enumerate(BLOCKS[layout])]
    down = parts(make_weight((E, H, 64), seed=3), "down" in tiled)
    rows = x(3, K)
    given = (x(3, H), rows) if function is op.moe_backward else (rows,)
    activation = "relu(u)" if layout == "plain" else "silu(g) * u"
    gathered = [list(part) for part in zip(*ups, strict=True)]
    return function(*given, IDS, torch.rand(3, 2, generator=torch.Generator().manual_seed(2)), *gathered, *down,
                    activation, layout, weighted=weighted, down_activations="dynamic")  # fmt: skip


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("tiled", [("up",), ("down",), ("up", "down")], ids=" and ".join)
@pytest.mark.parametrize("layout", BLOCKS)
def test_moe_gives_the_bits_of_the_canonical_layout(layout, tiled):
    assert torch.equal(moe(tiled, layout), moe((), layout))
    for got, want in zip(moe(tiled, layout, op.moe_backward), moe((), layout, op.moe_backward), strict=True):
        assert torch.equal(got, want)


def test_shapes_are_known_without_computing():
    weight = make_weight((E, N, 2 * K)).tiled()
    assert weight_sizes(weight.qdata) == ((E,), N, 2 * K)
    operands = [t.to("meta") for t in (weight.qdata, weight.block_scale, weight.global_scale)]
    meta = torch.empty(6, 2 * K, device="meta")
    assert op.indexed(meta, *operands, torch.empty(6, dtype=torch.long, device="meta")).shape == (6, N)
    assert op.input_grad(torch.empty(E, 2, N, device="meta"), *operands).shape == (E, 2, 2 * K)
    assert op.dequantize(*operands, torch.float16).shape == weight.shape
    torch.library.opcheck(op.unpack_tiles.default, (weight.qdata, weight.block_scale))
    torch.library.opcheck(op.linear.default, (x(2, K), *parts(make_weight((N, K)), True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, s, g: (q[..., :3], s, g), r"linear: packed tiles: expected words int32 .*got int32 \[6, 1, 32, 3\]"),
        (lambda q, s, g: (q, s.view(torch.float8_e4m3fn), g), r"scales uint8 .* and float8_e4m3fn \[6, 1, 32, 2\]"),
        (lambda q, s, g: (q, s[:3], g), r"got int32 \[6, 1, 32, 4\] and uint8 \[3, 1, 32, 2\]"),
        (
            lambda q, s, g: (q[None], s[None], g),
            r"2-D codes, or 4-D words of tiles, got torch.int32 \[1, 6, 1, 32, 4\]",
        ),
        (lambda q, s, g: (q, s, g[:6]), r"global_scale must be float32 \[96\]"),
        (lambda q, s, g: (q.repeat(1, 2, 1, 1), s.repeat(1, 2, 1, 1), g), r"x has K = 64, the packed weight K = 128"),
        (lambda q, s, g: (q.long(), s, g), r"expected uint8, got int64 .*tiles have int32 words"),
    ],
)
def test_parts_that_are_no_tiles_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        op.linear(x(2, K), *change(*parts(make_weight((N, K)), True)))


def test_only_tiles_are_unpacked():
    weight = make_weight((N, K))
    with pytest.raises(ValueError, match=r"unpack_tiles: expected int32 words of tiles, got torch.uint8 \[96, 32\]"):
        op.unpack_tiles(weight.qdata, weight.block_scale)


# Conversions of a weight


@pytest.mark.parametrize("shape", [(N, K), (E, N, K), (2, 2, 16, 192)])
def test_layouts_are_turned_into_each_other(shape):
    weight = make_weight(shape)
    tiled = weight.tiled()
    assert is_tiled(tiled.qdata)
    assert (tiled.shape, tiled.describe(), tiled.dtype) == (weight.shape, "W4A16, tiles", weight.dtype)
    assert "tiles" in repr(tiled)
    assert same(tiled.canonical(), weight)
    assert tiled.tiled() is tiled
    assert weight.canonical() is weight
    assert torch.equal(tiled.dequantize(), weight.dequantize())


def test_of_tiles_views_that_cut_them_are_unpacked_in_a_compiled_graph_too():
    weight, operand = make_weight((N, K), dtype=torch.float32).tiled(), x(3, K, dtype=torch.float32)

    def run(x, w):
        return x @ w[::2].t() + x @ w[:48].t()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="nvfp4_emu", fullgraph=True, options={"codegen": False})
    with collect_reports() as report:
        assert torch.equal(compiled(operand, weight), run(operand, weight.canonical()))
    assert [m.source for m in report.matched] == ["packed tensor", "packed tensor, tiles"]
    (note,) = report.notes
    assert "a weight is taken out of its tiles at each call" in note


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [(N, K), (E, N, K), (2, 2, 16, 192)])
def test_tile_in_place_takes_no_other_memory(shape, inference, monkeypatch):
    monkeypatch.setattr(sys.modules[prepack.__module__], "_AT_ONCE", 2 * 16 * K)  # a few rows at a time
    with torch.inference_mode(inference):
        weight = make_weight(shape)
    expected, places = weight.tiled(), [weight.qdata.data_ptr(), weight.block_scale.data_ptr()]
    assert weight.tile_() is weight
    assert same(weight, expected)
    assert [weight.qdata.data_ptr(), weight.block_scale.data_ptr()] == places
    assert torch.equal(weight.dequantize(), expected.dequantize())
    assert weight.tile_() is weight


def test_tile_in_place_within_inference_mode_leaves_ordinary_tensors():
    weight = make_weight()
    expected = weight.tiled()
    with torch.inference_mode():
        weight.tile_()
    assert same(weight, expected)
    assert not weight.qdata.is_inference()


def test_weights_that_share_parts_are_tiled_together():
    weight = make_weight()
    other, dense = weight.replace(transposed=True), weight.dequantize()
    weight.tile_()
    assert torch.equal(other.dequantize(), dense.mT)


def negative(weight):
    weight.block_scale.view(torch.uint8)[1, 3, 2] = 0xB0
    return weight


def of_several_processes(weight):
    weight.share_memory_()
    return weight


def kept(weight):
    weight.keep = weight.detach()  # as a state dict does
    return weight


REFUSED = {
    "negative scale": (lambda: negative(make_weight()), r"experts\.w has a negative block scale"),
    "rows": (lambda: make_weight((E, 24, K)), r"experts\.w is \[24, 64\]"),
    "columns": (lambda: make_weight((E, N, 48)), r"experts\.w is \[96, 48\]"),
    "shared": (lambda: kept(make_weight()), r"codes of experts\.w share their memory with 1 other"),
    "shared with processes": (lambda: of_several_processes(make_weight()), r"codes of experts\.w .* other processes"),
    "part of another": (lambda: make_weight((E, N, 2 * K))[..., :K], r"expected contiguous and aligned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tiled_stays_as_it_is(name):
    make, message = REFUSED[name]
    weight = make()
    before = weight.clone()
    with pytest.raises(ValueError, match=message):
        weight.tile_("experts.w")
    assert same(weight, before)


def test_a_scale_that_is_nan_stays_so():
    weight = make_weight((N, K))
    weight.block_scale.view(torch.uint8)[5, 1] = 0x7F
    before = weight.dequantize()
    assert before.isnan().any()
    torch.testing.assert_close(weight.tile_().dequantize(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("to_tiles", [False, True])
def test_state_dicts_of_the_other_layout_are_loaded(to_tiles):
    def model(seed, tiled):
        held = nn.Module()
        held.w = hold(make_weight(seed=seed).tiled() if tiled else make_weight(seed=seed))
        return held

    source, to = model(0, not to_tiles), model(1, to_tiles)
    place = to.w.qdata.data_ptr()
    to.load_state_dict(source.state_dict())
    assert is_tiled(to.w.qdata) == to_tiles
    assert to.w.qdata.data_ptr() == place
    assert same(to.w.canonical(), source.w.canonical())
    to.load_state_dict(source.state_dict(), assign=True)
    assert is_tiled(to.w.qdata) != to_tiles


def test_a_source_that_cannot_be_tiled_is_refused_before_anything_is_copied():
    to, source = make_weight().tiled(), negative(make_weight(seed=1))
    before = to.clone()
    with pytest.raises(ValueError, match="negative block scale"):
        to.copy_(source)
    assert same(to, before)


def test_torchao_gets_the_canonical_layout():
    weight = NVFP4Weight.from_dense(torch.randn(128, K))
    assert torch.equal(weight.tiled().to_torchao().dequantize(torch.float32), weight.dequantize(torch.float32))


# Models


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(K, N)
        self.linear.weight = hold(make_weight((N, K), dtype=torch.float32))
        self.tied = self.linear
        self.odd = hold(make_weight((24, K), dtype=torch.float32))
        self.register_buffer("buffer", make_weight((N, K), seed=1, dtype=torch.float32))
        self.norm = nn.Parameter(torch.ones(K))

    def forward(self, x):
        return self.linear(x * self.norm).sum() + (x @ self.buffer.t()).sum() + (x @ self.odd.t()).sum()


def test_a_model_is_prepacked_and_told_what_stayed():
    model, rows = Model(), x(3, K, dtype=torch.float32)
    before = model(rows)
    done = fx_nvfp4.prepack(model)
    assert done.converted == ["linear.weight", "buffer"]
    assert list(done.left) == ["odd"]
    assert "2 packed weights put into tiles, 1 left as they are\nodd: prepack: odd is [24, 64]" in str(done)
    assert torch.equal(model(rows), before)
    again = fx_nvfp4.prepack(model)
    assert (again.converted, list(again.left)) == ([], ["odd"])


@pytest.fixture
def experts(monkeypatch):
    """A module around a list of experts whose weights fill tiles."""
    for name in ("HIDDEN", "INTERMEDIATE"):
        monkeypatch.setattr(moe_parents, name, 64)
    return moe_parents.ExpertHit(torch.float32, moe_parents.FusedGateMLP).eval()


@pytest.mark.parametrize("width", [64, 48])
def test_experts_of_one_module_keep_one_layout(width):
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.gate_up_proj = hold(make_weight((E, 2 * width, K)))
    model.layer.down_proj = hold(make_weight((E, K, width), seed=1))
    model.layer.proj = hold(make_weight((N, K), seed=2))
    done = fx_nvfp4.prepack(model)
    experts = ["layer.gate_up_proj", "layer.down_proj"]
    assert done.converted == [*(experts if width == 64 else []), "layer.proj"]
    assert list(done.left) == ([] if width == 64 else experts)
    assert all("layer.down_proj is [64, 48]" in reason for reason in done.left.values())


def test_prepacked_experts_are_fused_as_they_are(experts):
    rows = moe_parents.hidden_states(2, 9)
    expected = experts(rows)
    assert not fx_nvfp4.prepack(experts).left
    fx_nvfp4.prepare(experts)
    assert is_tiled(experts.experts.down_proj.qdata)
    torch.testing.assert_close(experts(rows), expected, rtol=1e-5, atol=1e-5)


def test_experts_that_were_fused_are_prepacked(experts):
    rows = moe_parents.hidden_states(2, 9)
    fx_nvfp4.prepare(experts)
    expected = experts(rows)
    assert fx_nvfp4.prepack(experts).converted == ["experts.gate_up_proj", "experts.down_proj"]
    torch.testing.assert_close(experts(rows), expected, rtol=0, atol=0)


def test_experts_of_which_some_are_tiled_stay_a_list(experts):
    fx_nvfp4.prepack(experts.experts[1])
    with pytest.warns(NVFP4Warning, match="expert 1"):
        fx_nvfp4.prepare(experts)
    assert len(experts.experts) == moe_parents.EXPERTS


def test_calibration_finds_the_same_scales(experts):
    def scales():
        with fx_nvfp4.calibrate(experts) as found:
            experts(moe_parents.hidden_states(2, 9))
        return found.amax

    for expert in experts.experts:
        for linear in (expert.w13, expert.w2):
            linear.weight = hold(linear.weight.data.replace(activations="uncalibrated"))
    canonical = scales()
    assert not fx_nvfp4.prepack(experts).left
    assert scales() == canonical


def test_prepack_is_the_inverse_of_canonical_parts():
    weight = make_weight()
    assert all(map(torch.equal, prepack(weight.qdata, weight.block_scale), parts(weight, True)[:2]))
