"""NVFP4Weight: what it survives, what its products compute together, what it refuses.

Edges: gate and up rows with different global scales, per-expert activation scales, inference mode, saved views.
"""

import copy
import io

import pytest
import torch
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4

E, N, K = 4, 96, 64


def make_weight(shape=(E, N, K), dtype=torch.bfloat16, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(*shape, generator=g).to(dtype)
    # One global scale a row, spread over more than one binade.
    scale = torch.rand(shape[:-1], generator=g) * 0.003 + 0.001
    return NVFP4Weight.from_dense(dense, global_scale=scale, **kwargs)


LAYOUTS = {"canonical": NVFP4Weight.canonical, "tiles": NVFP4Weight.tiled}


def hold(weight):
    return nn.Parameter(weight, requires_grad=False)


def same(a, b):
    names, _ = a.__tensor_flatten__()
    return type(a) is type(b) and all(
        torch.equal(getattr(a, n).view(torch.uint8), getattr(b, n).view(torch.uint8)) for n in names
    )


def test_global_scales_stay_apart_for_each_row():
    weight = make_weight()
    assert weight.global_scale.unique().numel() == E * N
    expected = nvfp4.dequantize(weight.qdata, weight.block_scale, weight.global_scale.unsqueeze(-1))
    assert torch.equal(weight.dequantize(torch.float32), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_to_changes_the_shown_dtype_and_nothing_packed(layout):
    weight = layout(make_weight())
    moved = weight.to(torch.float32)
    assert moved.dtype == torch.float32
    assert same(moved, weight)
    assert weight.to("meta").qdata.device.type == "meta"


def test_module_to_float32_keeps_weights_packed():
    module = nn.Module()
    module.w = hold(make_weight(activations="static", act_scale=torch.tensor(0.1, dtype=torch.float64)))
    module.to(torch.float16)
    assert isinstance(module.w.data, NVFP4Weight)
    assert module.w.dtype == torch.float16
    assert module.w.act_scale.dtype == torch.float64, "a rounded activation scale would lose its reciprocal"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_state_dict_deepcopy_and_weights_only_save(layout):
    module = nn.Module()
    module.w = hold(layout(make_weight(activations="static", act_scale=torch.rand(E, dtype=torch.float64))))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert same(loaded["w"], module.w.data)
    other = copy.deepcopy(module)
    other.w.qdata.zero_()
    other.load_state_dict(loaded)
    assert same(other.w.data, module.w.data)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_safetensors_round_trip(tmp_path, layout):
    weight = make_weight(activations="dynamic")
    state = {"experts.w": layout(weight), "norm": torch.rand(7)}
    fx_nvfp4.save_file(state, tmp_path / "m.safetensors")
    loaded = fx_nvfp4.load_file(tmp_path / "m.safetensors")
    assert same(loaded["experts.w"], weight)
    assert loaded["experts.w"].activations == "dynamic"
    assert torch.equal(loaded["norm"], state["norm"])


# 128 rows: torchao swizzles only experts of whole tiles.
@pytest.mark.parametrize("shape", [(128, K), (E, 128, K)])
@pytest.mark.parametrize("swizzled", [False, True])
def test_torchao_conversion_keeps_every_value(shape, swizzled):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    dense = torch.randn(shape)
    scale = dense.abs().amax(dim=(-2, -1), keepdim=len(shape) == 3) / nvfp4.TWO_LEVEL_MAX
    theirs = NVFP4Tensor.to_nvfp4(dense, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    ours = NVFP4Weight.from_torchao(theirs)
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32))
    back = ours.to_torchao()
    assert torch.equal(back.dequantize(torch.float32), theirs.dequantize(torch.float32))
    assert torch.equal(back.qdata, ours.qdata)


@pytest.mark.parametrize("scale", [0.0, -0.01, float("nan"), float("inf")])
def test_activation_scales_that_are_none_are_refused(scale):
    """Zero gave zeros, and a negative one another number in each dialect."""
    with pytest.raises(ValueError, match="act_scale must be finite and above zero, got"):
        NVFP4Weight.from_dense(torch.randn(16, 16), "static", torch.tensor(scale, dtype=torch.float64))


def test_torchao_cannot_hold_scales_that_differ_by_row():
    with pytest.raises(ValueError, match="different global scales"):
        make_weight().to_torchao()


class Everything(nn.Module):
    """Every product that the class serves."""

    def __init__(self, **kwargs):
        super().__init__()
        self.w = hold(make_weight(**kwargs))
        kwargs.pop("act_scale", None)
        if kwargs.get("activations") == "static":
            kwargs["act_scale"] = torch.tensor(0.002, dtype=torch.float64)
        self.linear = nn.Linear(K, N).bfloat16()
        self.linear.weight = hold(make_weight((N, K), seed=1, **kwargs))

    def forward(self, x, ids, offs):
        w, up = self.w, self.w.chunk(2, dim=1)[1]
        return (
            torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1),
            torch.bmm(x.unsqueeze(1), w[ids].transpose(1, 2)).squeeze(1),
            torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=offs),
            self.linear(x),
            self.linear(x.unsqueeze(0)),
            x @ w[2].t(),
            (w[1] @ x.t()).t(),
            torch.bmm(x.expand(E, *x.shape), up.mT),
        )


def expected(module, x, ids, offs):
    """The same in fp32 on dense weights."""
    w, lin = module.w.dequantize(torch.float32), module.linear.weight.dequantize(torch.float32)
    x, bias = x.float(), module.linear.bias.float()
    chosen = torch.einsum("snk,sk->sn", w[ids], x)
    group = torch.searchsorted(offs.long(), torch.arange(len(x)), right=True)
    grouped = torch.einsum("snk,sk->sn", w[group], x)
    lin = x @ lin.T + bias
    return chosen, chosen, grouped, lin, lin[None], x @ w[2].T, x @ w[1].T, x @ w[:, N // 2 :].mT


@pytest.mark.in_part(3)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_equal_dense_ones_eager_and_compiled_in_one_graph(context, layout):
    module = Everything()
    module.w, module.linear.weight = hold(layout(module.w)), hold(layout(module.linear.weight))
    x, ids = torch.randn(5, K).bfloat16(), torch.tensor([0, 1, 3, 3, 2])
    offs = torch.tensor([1, 1, 3, 5], dtype=torch.int32)
    with context():
        eager = module(x, ids, offs)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="nvfp4_emu", fullgraph=True)(x, ids, offs)
    for got, compiled_got, want in zip(eager, compiled, expected(module, x, ids, offs), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0.02)
        torch.testing.assert_close(compiled_got, got, rtol=2**-7, atol=0.01)


def test_weight_only_weights_never_round_activations():
    weight = make_weight(dtype=torch.float32)
    x = torch.randn(3, K)
    torch.testing.assert_close(x @ weight[0].t(), x @ weight.dequantize()[0].T, rtol=1e-5, atol=1e-5)


def test_negative_expert_ids_count_from_the_end():
    weight = make_weight(dtype=torch.float32)
    ids, x = torch.tensor([0, -1, 3, -4]), torch.randn(4, K)
    want = torch.einsum("snk,sk->sn", weight.dequantize()[ids], x)
    torch.testing.assert_close(torch.bmm(weight[ids], x[..., None])[..., 0], want, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_round_the_operands():
    weight, x = make_weight(dtype=torch.float32)[0], torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.fx_nvfp4.linear(x, weight.qdata, weight.block_scale, weight.global_scale)
    torch.testing.assert_close(got, x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)


def test_loading_dense_into_packed_says_what_to_do():
    module = nn.Module()
    module.w = hold(make_weight())
    with pytest.raises(RuntimeError, match=r"cannot copy torch.float32 \[4, 96, 64\] into NVFP4Weight.*assign=True"):
        module.load_state_dict({"w": torch.randn(E, N, K)})


@pytest.mark.parametrize("view", [lambda w: w.mT, lambda w: w[torch.arange(E)]], ids=["other dims", "chosen experts"])
def test_copying_between_views_that_lie_differently_is_refused(view):
    square, other = make_weight((E, N, N)), make_weight((E, N, N))
    before = square.dequantize()
    for to, source in ((square, view(other)), (view(square), other)):
        with pytest.raises(ValueError, match=r"copy_: cannot copy .* use load_state_dict"):
            to.copy_(source)
    assert torch.equal(square.dequantize(), before)
    assert torch.equal(square.mT.copy_(other.mT).mT.dequantize(), other.dequantize())


def test_share_memory_moves_every_part():
    weight = make_weight()
    layer = nn.Linear(K, N)
    layer.weight = hold(weight)
    layer.share_memory()
    names, _ = weight.__tensor_flatten__()
    assert all(getattr(layer.weight, name).is_shared() for name in names)


def test_packed_weights_are_frozen():
    weight = make_weight()
    assert not weight.requires_grad_(False).requires_grad
    for ask in (lambda: weight.requires_grad_(), lambda: nn.Parameter(weight)):
        with pytest.raises(RuntimeError, match=r"packed NVFP4 weights are frozen.*requires_grad=False"):
            ask()


@pytest.mark.parametrize("view", [lambda w: w[torch.tensor([1, 0])], lambda w: w.view(E * N, K)])
def test_a_view_is_not_saved_as_if_it_were_the_weight(view, tmp_path):
    with pytest.raises(ValueError, match=r"is a view .*save the weight that it shows"):
        fx_nvfp4.save_file({"w": view(make_weight())}, tmp_path / "m.safetensors")


def test_tied_and_shared_tensors_are_saved(tmp_path):
    weight = make_weight((N, K))
    fx_nvfp4.save_file({"a": weight, "b": weight}, tmp_path / "m.safetensors")
    loaded = fx_nvfp4.load_file(tmp_path / "m.safetensors")
    assert same(loaded["a"], loaded["b"])


def test_arithmetic_on_a_packed_weight_is_refused_with_advice():
    with pytest.raises(NotImplementedError, match=r"aten\.mul.*\[4, 96, 64\].*dequantize\(\)"):
        make_weight() * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qdata": torch.ones(E, N, K // 2)}, r"codes: expected uint8, got float32"),
        (
            {"qdata": torch.ones(E, N, K // 8, dtype=torch.int32)},
            r"tiles: expected words int32 .* got int32 \[4, 96, 8\]",
        ),
        ({"qdata": torch.ones(E, 6, 1, 32, 4, dtype=torch.int32)}, r"scales uint8 .* and float8_e4m3fn \[4, 96, 4\]"),
        ({"qdata": torch.ones(2, E, N, K // 2, dtype=torch.uint8)}, r"one scale per 16 elements"),
        ({"block_scale": torch.ones(E, N, K // 16)}, r"block scales: expected float8_e4m3fn"),
        ({"global_scale": torch.ones(E)}, r"global_scale must be float32 \[4, 96\].*expand a per-tensor scale"),
        ({"global_scale": torch.ones(E, N, dtype=torch.float64)}, r"global_scale must be float32"),
        ({"orig_dtype": torch.float64}, r"orig_dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"activations": "int8"}, r"activations must be one of .*'int8'"),
        ({"activations": "static"}, r"act_scale must be given for static"),
        ({"act_scale": torch.ones((), dtype=torch.float64)}, r"act_scale must be given for static"),
        ({"activations": "static", "act_scale": torch.ones(())}, r"act_scale must be float64"),
        ({"activations": "static", "act_scale": torch.ones(3, dtype=torch.float64)}, r"shape \[\[\], \[4\]\]"),
        ({"dialect": "mx"}, r"unknown NVFP4 dialect 'mx'"),
        ({"expert_ids": torch.ones(3)}, r"expert_ids must be integers"),
    ],
)
def test_bad_parts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_weight().replace(**change)


def test_equal_compares_bytes_and_what_they_mean():
    weight = make_weight()
    assert torch.equal(weight, weight.clone())
    assert not torch.equal(weight, weight.dequantize())
    assert not torch.equal(weight.dequantize(), weight)
    assert not torch.equal(weight, weight.tiled())
    assert not torch.equal(weight, weight.replace(activations="dynamic"))
    other = weight.clone()
    other.qdata[0, 0, 0] ^= 1
    assert not torch.equal(weight, other)
