"""Models that hold torchao's NVFP4Tensor: served in compiled graphs and, where torchao raises, in eager mode too.

The truth is torchao's own: its dequantised weights and its quantiser for activations, multiplied in fp32.

Edges: swizzled scales with padded rows, none or one global scale or one an expert, transposed storage, static and
dynamic activations of each expert's rows, any number of tokens, gradients, what torchao does by itself stays torchao's.
"""

import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.prototype.mx_formats.inference_workflow import (
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.quantization import quantize_

import fx_nvfp4
from fx_nvfp4 import torchao_dispatch
from fx_nvfp4.backend import nvfp4_emu
from fx_nvfp4.format import TWO_LEVEL_MAX
from fx_nvfp4.torchao_interop import from_torchao_parts

E, N, K, T, A = 4, 128, 64, 6, 2
IDS = torch.tensor([[3, 0], [1, 1], [0, 2], [1, 3], [1, 0], [3, 1]])
OFFS = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
GROUP = torch.tensor([0, 2, 2, 2, 3, 3])
ACT_SCALE = torch.tensor(0.0017)
MODES = ["none", "dynamic", "static"]


def make(shape=(E, N, K), mode="none", swizzled=True, scale="own", dtype=torch.float32, seed=0):
    """A quantised weight; scale "none", "one" for all, or each expert's "own"."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    dims = tuple(range(1, dense.dim())) if scale == "own" and dense.dim() == 3 else tuple(range(dense.dim()))
    amax = dense.float().abs().amax(dims, keepdim=scale == "own" and dense.dim() == 3)
    kwargs = QuantizeTensorToNVFP4Kwargs(is_swizzled_scales=True, use_dynamic_per_tensor_scale=mode == "dynamic")
    weight = NVFP4Tensor.to_nvfp4(
        dense,
        per_tensor_scale=None if scale == "none" else amax / TWO_LEVEL_MAX,
        act_per_tensor_scale=ACT_SCALE if mode == "static" else None,
        is_swizzled_scales=swizzled,
        act_quant_kwargs=None if mode == "none" else kwargs,
    )
    return nn.Parameter(weight, requires_grad=False)


def enter(x, mode):
    """Rows of x as torchao's own quantiser gives them to the product."""
    if mode == "none":
        return x.float()
    scale = x.abs().max().float() / TWO_LEVEL_MAX if mode == "dynamic" else ACT_SCALE
    return NVFP4Tensor.to_nvfp4(x.contiguous(), per_tensor_scale=scale).dequantize(torch.float32)


def reference(x, dense, mode, token, expert):
    """[S, N]: row s is x[token[s]] times dense[expert[s]]; what one expert multiplies is quantised together."""
    y = torch.zeros(len(token), dense.shape[-2])
    for e in expert.unique():
        rows = expert == e
        y[rows] = enter(x[token[rows]], mode) @ dense[e].T
    return y


TOKENS = torch.arange(T)
CHOSEN = (TOKENS.repeat_interleave(A), IDS.flatten())
ALL = (TOKENS.repeat(E), torch.arange(E).repeat_interleave(T))
SECOND = (TOKENS, torch.ones(T, dtype=torch.long))

# name -> (product of x [T, K] and experts [E, N, K], (tokens, experts) of its rows, rows -> its result)
PRODUCTS = {
    "grouped": (lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFS), (TOKENS, GROUP), lambda y: y),
    "_grouped_mm": (lambda x, w: torch._grouped_mm(x, w.mT, OFFS), (TOKENS, GROUP), lambda y: y),
    "bmm of chosen": (
        lambda x, w: torch.bmm(w[IDS.flatten()], x.repeat_interleave(A, 0).unsqueeze(-1)).squeeze(-1),
        CHOSEN,
        lambda y: y,
    ),
    "chosen": (lambda x, w: torch.einsum("tk,tank->tan", x, w[IDS]), CHOSEN, lambda y: y.view(T, A, N)),
    "index_select": (
        lambda x, w: x[:, None] @ w.index_select(0, IDS[:, 0]).mT,
        (TOKENS, IDS[:, 0]),
        lambda y: y[:, None],
    ),
    "in parallel": (lambda x, w: torch.einsum("tk,enk->ten", x, w), ALL, lambda y: y.view(E, T, N).transpose(0, 1)),
    "bmm": (lambda x, w: torch.bmm(x.expand(E, T, K), w.transpose(1, 2)), ALL, lambda y: y.view(E, T, N)),
    "x @ w.mT": (lambda x, w: x @ w.mT, ALL, lambda y: y.view(E, T, N)),
    "expanded": (lambda x, w: x.expand(1, E, T, K) @ w.expand(1, E, N, K).mT, ALL, lambda y: y.view(1, E, T, N)),
    "loop": (lambda x, w: torch.stack([F.linear(x, e) for e in w.unbind()]), ALL, lambda y: y.view(E, T, N)),
    "select": (lambda x, w: F.linear(x, w[1], torch.arange(N).float()), SECOND, lambda y: y + torch.arange(N)),
    "select by tensor": (lambda x, w: F.linear(x, w[torch.tensor(1)]), SECOND, lambda y: y),
    "split": (lambda x, w: F.linear(x, w.split(N // 2, dim=1)[1][1]), SECOND, lambda y: y[:, N // 2 :]),
    "interleaved": (lambda x, w: x @ w[1].t()[:, 1::2], SECOND, lambda y: y[:, 1::2]),
    "stacked": (lambda x, w: x @ torch.stack([w[1], w[1]]).mT, SECOND, lambda y: torch.stack([y, y])),
    "joined": (lambda x, w: x @ torch.cat([w[2:], w[:2]]).mT, ALL, lambda y: y.view(E, T, N).roll(2, 0)),
}


def compiled(function, **options):
    torch._dynamo.reset()
    options = {"codegen": False, "strict": True, **options}
    return torch.compile(function, backend="nvfp4_emu", fullgraph=True, options=options)


@pytest.mark.in_part(6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_experts_in_eager_mode_and_compiled(name, mode):
    product, rows, shape = PRODUCTS[name]
    weight, x = make(mode=mode), torch.randn(T, K)
    want = shape(reference(x, weight.dequantize(), mode, *rows))
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            torch.testing.assert_close(product(x, weight), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(product)(x, weight), want, rtol=1e-4, atol=1e-4)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("scale", ["none", "one", "own"])
def test_every_layout_of_scales(mode, swizzled, scale):
    weight, x = make(mode=mode, swizzled=swizzled, scale=scale), torch.randn(T, K)
    for name in ("chosen", "grouped"):
        product, rows, shape = PRODUCTS[name]
        want = shape(reference(x, weight.dequantize(), mode, *rows))
        torch.testing.assert_close(compiled(product)(x, weight), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_experts_stored_transposed(mode):
    rows, weight, x = (
        make(mode=mode),
        nn.Parameter(make(mode=mode).data.transpose(1, 2), requires_grad=False),
        torch.randn(T, K),
    )
    want = reference(x, rows.dequantize(), mode, *CHOSEN).view(T, A, N)
    product = lambda x, w: torch.einsum("tk,takn->tan", x, w[IDS])  # noqa: E731
    torch.testing.assert_close(compiled(product)(x, weight), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(x, weight), want, rtol=1e-4, atol=1e-4)


def test_tiles_of_each_expert_padded_by_itself():
    """As grouped products on Blackwell read them; torchao itself makes them only where nothing is padded."""
    linear = make((E, 96, K), swizzled=False)
    tiles = torch.stack([fx_nvfp4.format.swizzle(s).view(128, 4) for s in linear.scale.view(E, 96, K // 16)])
    padded = NVFP4Tensor(linear.qdata, tiles, 16, torch.float32, linear.per_tensor_scale, None, True)
    ours = fx_nvfp4.NVFP4Weight.from_torchao(padded)
    assert torch.equal(ours.dequantize(), linear.dequantize())


@pytest.mark.in_part(6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("scale", ["none", "one"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_with_rows_that_fill_no_tile(mode, swizzled, scale, bias):
    module = nn.Linear(K, 96, bias=bias)
    module.weight = make((96, K), mode, swizzled, scale)
    x = torch.randn(2, 3, K)
    want = F.linear(enter(x.view(6, K), mode), module.weight.dequantize(), module.bias).view(2, 3, 96)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(module)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_pass_through(mode):
    weight, x = make(mode=mode), torch.randn(T, K, requires_grad=True)
    dense = weight.dequantize()
    y = torch.einsum("tk,tank->tan", x, dense[IDS]).sum()  # rounding of activations counts as the identity
    (want,) = torch.autograd.grad(y + F.linear(x, dense[1]).sum(), x)
    run = lambda x, w: torch.einsum("tk,tank->tan", x, w[IDS]).sum() + F.linear(x, w[1]).sum()  # noqa: E731
    for function in (run, compiled(run)):
        (got,) = torch.autograd.grad(function(x, weight), x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_tokens_is_one_graph(mode):
    weight = make(mode=mode)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(partial(nvfp4_emu, options={"codegen": False}))

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def run(x, w, ids):
        return torch.einsum("tk,tank->tan", x, w[ids]), F.linear(x, w[2])

    for tokens in (5, 9, 12):
        x, ids = torch.randn(tokens, K), torch.randint(E, (tokens, A))
        rows = torch.arange(tokens).repeat_interleave(A), ids.flatten()
        chosen, one = run(x, weight, ids)
        want = reference(x, weight.dequantize(), mode, *rows).view(tokens, A, N)
        torch.testing.assert_close(chosen, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one, enter(x, mode) @ weight[2].dequantize().T, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_quantize_weight_only_and_compile_is_all_a_user_does():
    model = nn.Sequential(nn.Linear(K, 128), nn.ReLU(), nn.Linear(128, 96)).bfloat16()
    quantize_(model, NVFP4WeightOnlyConfig())
    x = torch.randn(3, K).bfloat16()
    torch._dynamo.reset()
    got = torch.compile(model, backend="nvfp4_emu", fullgraph=True)(x)
    hidden = F.linear(x.float(), model[0].weight.dequantize(torch.float32), model[0].bias.float()).relu()
    want = F.linear(hidden, model[2].weight.dequantize(torch.float32), model[2].bias.float())
    torch.testing.assert_close(got.float(), want, rtol=2**-6, atol=0.05)


@torch.no_grad()
def test_caches_have_a_key_of_torchaos_tensors(tmp_path, monkeypatch):
    """torch warns of tensor subclasses that give none."""
    said = []
    monkeypatch.setattr("torch._functorch._aot_autograd.autograd_cache.warn_once", said.append, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = nn.Linear(K, N, bias=False)
    layer.weight = make((N, K))
    torch._dynamo.reset()
    torch.compile(layer, backend="nvfp4_emu", fullgraph=True)(torch.ones(3, K))
    assert said == []


def test_keys_of_caches_tell_layouts_activations_and_gradients_apart():
    weights = [make(), make((N, K)), make(swizzled=False), make(scale="none"), make(dtype=torch.bfloat16)]
    weights += [make(mode="static"), make(mode="dynamic"), nn.Parameter(make().detach())]
    assert len({w._stable_hash_for_caching() for w in weights}) == len(weights)
    assert make(seed=1)._stable_hash_for_caching() == make(seed=2)._stable_hash_for_caching()


def test_quantize_with_calibrated_activations():
    model, x = nn.Sequential(nn.Linear(K, 128), nn.ReLU(), nn.Linear(128, 96)), torch.randn(5, K)
    quantize_(model, NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step="prepare"))
    model(x)
    quantize_(model, NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False, step="convert"))
    y = x
    for layer in (model[0], model[2]):
        scale = layer.weight.act_per_tensor_scale
        y = NVFP4Tensor.to_nvfp4(y.detach(), per_tensor_scale=scale).dequantize(torch.float32)
        y = F.linear(y, layer.weight.dequantize(), layer.bias)
        y = y.relu() if layer is model[0] else y
    for run in (model, compiled(model)):
        torch.testing.assert_close(run(x), y, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        report = fx_nvfp4.explain(model, x)
    assert [(m.where, m.activations) for m in report.matched] == [
        ("0", "W4A4 static, torchao rule"),
        ("2", "W4A4 static, torchao rule"),
    ]


@pytest.mark.parametrize("swizzled", [False, True])
def test_report_names_each_product_and_scales_in_tiles(swizzled):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = make(mode="dynamic", swizzled=swizzled)

        def forward(self, x, ids):
            return torch.einsum("tk,tank->tan", x, self.up[ids])

    report = fx_nvfp4.explain(nn.Sequential(Experts())[0], torch.randn(T, K), IDS)
    (match,) = report.matched
    assert (match.op, match.weight, match.activations) == ("indexed", "up", "W4A4 dynamic, torchao rule")
    assert not report.refused
    assert any("128 x 4 tiles" in note and "prepare" in note for note in report.notes) == swizzled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_of_transformers(experts, dtype):
    """In fp32 transformers' own grouped product stands in for torch's."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = experts
    block = Qwen3MoeSparseMoeBlock(config).to(dtype)
    block.gate.weight.data.normal_()
    for name, n, k in (("gate_up_proj", 128, 128), ("down_proj", 128, 64)):
        setattr(block.experts, name, make((4, n, k), swizzled=name == "down_proj", dtype=dtype))
    dense, x = copy.deepcopy(block), torch.randn(1, 7, 128).to(dtype)
    for name in ("gate_up_proj", "down_proj"):
        setattr(dense.experts, name, nn.Parameter(getattr(block.experts, name).dequantize()))
    want = dense(x)
    atol = 1e-3 * want.abs().max().item() if dtype == torch.float32 else 0.03 * want.abs().max().item()
    with torch.no_grad():
        for run in (block, compiled(block)):
            torch.testing.assert_close(run(x), want, rtol=0, atol=atol)


# What torchao does by itself


def test_weight_only_products_in_eager_mode_stay_torchaos():
    weight, x = make((N, K), dtype=torch.bfloat16), torch.randn(T, K).bfloat16()
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))
    assert torch.equal(x @ weight.t(), x @ weight.dequantize().t())


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[1],
        lambda w: w[2][:128],
        lambda w: w[2][:, 64:],
        lambda w: w[0].t(),
        lambda w: w.transpose(1, 2),
        lambda w: w.detach(),
        lambda w: w.to(torch.bfloat16),
        lambda w: w.clone(),
    ],
)
def test_views_that_torchao_serves_stay_torchaos(view):
    assert type(view(make((E, 256, 128)).data)) is NVFP4Tensor


@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_with_fp4_units_torchaos_own_products_run_but_in_the_backend(mode, monkeypatch):
    weight, x, calls = make((N, K), mode), torch.randn(T, K), []
    table = NVFP4Tensor._ATEN_OP_TABLE[NVFP4Tensor]
    monkeypatch.setattr(torchao_dispatch, "_has_fp4_units", lambda device: True)
    monkeypatch.setitem(table, torch.ops.aten.mm.default, lambda *args: calls.append(1) or x.new_zeros(T, N))
    assert torch.mm(x, weight.t()).sum() == 0
    assert calls == [1]
    want = enter(x, mode) @ weight.dequantize().T
    product = lambda x, w: torch.mm(x, w.t())  # noqa: E731
    torch.testing.assert_close(compiled(product)(x, weight), want, rtol=1e-4, atol=1e-4)
    assert calls == [1]


def test_models_are_copied_moved_and_saved_as_before(tmp_path):
    model = nn.Sequential(nn.Linear(K, N))
    model[0].weight = make((N, K), "static")
    x = torch.randn(T, K)
    want = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), want)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=False), assign=True)
    assert type(other[0].weight.data) is NVFP4Tensor
    assert torch.equal(other(x), want)
    assert other.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert other.to("meta")[0].weight.qdata.device.type == "meta"


def test_imported_anew_the_hook_takes_its_own_place():
    weight, x = make((N, K)), torch.randn(T, K)
    wanted = F.linear(x, weight)
    importlib.reload(torchao_dispatch)
    assert torch.equal(F.linear(x, weight), wanted)


def test_scales_of_experts_may_have_one_dim():
    """With as many rows as experts they lay along the rows, in silence."""
    dense = torch.randn(16, 16, 32) * torch.arange(1, 17).view(16, 1, 1)
    w = fx_nvfp4.NVFP4Weight.from_dense(dense)
    parts = w.qdata, w.block_scale, False
    rest = None, False, False, torch.float32
    scales = [w.global_scale[:, 0].clone().view(shape) for shape in ((16,), (16, 1, 1))]
    one, three = (from_torchao_parts(*parts, scale, *rest) for scale in scales)
    assert torch.equal(one.dequantize(), three.dequantize())
    assert torch.equal(three.dequantize(), w.dequantize())
