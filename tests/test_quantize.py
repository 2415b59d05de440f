"""quantize_: the bytes are the oracle's, the right weights are packed, scales are shared as asked, errors say why."""

import copy

import pytest
import torch
import torchao.quantization
from checkpoint_files import Allocations
from quantized_models import EXPERTS, HIDDEN, INNER, Experts, ListOfExperts, token_ids, tokens, transformers_model
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Config, NVFP4Weight, quantize_
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.dialects import DIALECTS, get_dialect
from fx_nvfp4.quantization import blocks, pack
from fx_nvfp4.report import NVFP4Warning

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = ("amax", "mse")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def packed(model):
    return {name: p.data for name, p in model.named_parameters() if isinstance(p.data, NVFP4Weight)}


def same(a: NVFP4Weight, b: NVFP4Weight) -> bool:
    names = a.__tensor_flatten__()[0]
    parts = [(getattr(a, n), getattr(b, n)) for n in names]
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in parts)


# The bytes


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_the_oracles_for_every_expert_and_layout(dialect, dtype, monkeypatch):
    monkeypatch.setattr(pack, "_CHUNK", 5 * HIDDEN)  # a few rows at a time, and a rest
    for transposed in (False, True):
        model = Experts(transposed, dtype)
        dense = {"w13": model.w13.data, "w2": model.w2.data}
        quantize_(model, NVFP4Config(dialect=dialect))
        for name, weight in dense.items():
            rows = weight.mT if transposed else weight
            scale = get_dialect(dialect).global_scale(rows.abs().amax((1, 2)))
            qdata, block_scale = nvfp4.quantize(rows, scale[:, None, None], dialect)
            w = getattr(model, name).data
            assert torch.equal(w.qdata, qdata)
            assert torch.equal(w.block_scale.view(torch.uint8), block_scale.view(torch.uint8))
            assert torch.equal(w.global_scale, scale.float()[:, None].expand(w.global_scale.shape))
            assert (w.shape, w.transposed, w.dtype, w.dialect) == (weight.shape, transposed, dtype, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_global_scale_uses_the_whole_range(dialect):
    amax = torch.rand(4096) * 3 + 1e-4
    scale = get_dialect(dialect).global_scale(amax)
    assert scale.dtype == torch.float64
    assert torch.allclose(scale * nvfp4.TWO_LEVEL_MAX, amax.double(), rtol=2e-7)
    for nothing in (0.0, 1e-42):
        assert get_dialect(dialect).global_scale(torch.tensor(nothing)).isfinite()
    assert get_dialect(dialect).global_scale(torch.tensor(0.0)) == 1


def test_the_hardware_scale_is_its_reciprocals_reciprocal():
    # ModelOpt stores the number, compressed-tensors its fp32 reciprocal: a checkpoint in either form reads the same.
    scale = get_dialect("hardware").global_scale(torch.rand(1 << 16) * 5).float()
    assert torch.equal(1.0 / (1.0 / scale), scale)
    plain = (torch.rand(1 << 16) * 5) / nvfp4.TWO_LEVEL_MAX
    assert not torch.equal(1.0 / (1.0 / plain), plain)


def errors(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Squared error of each block, in float64."""
    values = nvfp4.code_times_scale(codes, scale).double() * s
    return (values - w.double()).square().unflatten(-1, (-1, 16)).sum(-1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mse_is_in_no_block_worse_than_amax_and_better_on_average(dialect):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(256, 128, generator=generator)
    w[:64] *= torch.logspace(-9, 0, 64).unsqueeze(-1)  # blocks whose scale is subnormal, or zero
    w[64:96, :16] = 0
    s = get_dialect(dialect).global_scale(w.abs().amax()).reshape(1, 1)
    error = {rule: errors(w, *blocks.quantize(w, s, dialect, rule), s) for rule in RULES}
    assert bool((error["mse"] <= error["amax"] * (1 + 1e-5) + 1e-30).all())
    assert float(error["mse"][96:].mean()) < 0.85 * float(error["amax"][96:].mean())


def test_mse_finds_the_best_of_all_scales_for_nearly_every_block():
    # Against all 126 positive scales: the few that are tried are enough.
    w = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    s = nvfp4.amax_scale(w).double().reshape(1, 1)
    found = errors(w, *blocks.quantize(w, s, "hardware", "mse"), s)
    rule, (mult, inverse) = get_dialect("hardware"), nvfp4.scale_pair(s, w.device)
    every = torch.arange(1, 127, dtype=torch.uint8)[:, None, None, None].expand(-1, 128, 4, 1)
    tried = [blocks._try(w.unflatten(-1, (-1, 16)), e, mult[..., None], inverse[..., None], rule)[1] for e in every]
    best = torch.stack(tried).squeeze(-1).amin(0)
    assert float((found <= best * (1 + 1e-5)).float().mean()) > 0.99


@pytest.mark.parametrize("rule", RULES)
def test_no_copy_of_a_weight_is_made(rule, monkeypatch):
    monkeypatch.setattr(pack, "_CHUNK", 4 * HIDDEN)
    model = transformers_model("Qwen3Moe", num_hidden_layers=1)
    with Allocations() as made:
        quantize_(model, NVFP4Config(block_scale=rule))
    assert made.largest < EXPERTS * INNER * HIDDEN / 8


# Which global scale


def test_gate_and_up_share_a_scale_or_have_their_own():
    scales = {}
    for rule in ("fused", "projection", "parameter"):
        model = transformers_model("Mixtral")
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj[:, :INNER] *= 8
        experts.gate_up_proj[:, 0, 0] = torch.arange(8.0, 8.0 + EXPERTS)  # the largest, another in each
        quantize_(model, NVFP4Config(global_scale=rule))
        scale = model.model.layers[0].mlp.experts.gate_up_proj.global_scale
        gate, up = scale[:, :INNER], scale[:, INNER:]
        assert torch.equal(gate, gate[:, :1].expand_as(gate))
        assert torch.equal(up, up[:, :1].expand_as(up))
        scales[rule] = gate[:, 0], up[:, 0]
    assert torch.equal(*scales["fused"])
    assert scales["fused"][0].unique().numel() == EXPERTS
    assert bool((scales["projection"][0] > 4 * scales["projection"][1]).all())
    assert torch.stack(scales["parameter"]).unique().numel() == 1


def test_interleaved_gate_and_up_are_told_apart():
    model = transformers_model("GptOss")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj[..., 0::2] *= 8
    quantize_(model, NVFP4Config(global_scale="projection"))
    scale = model.model.layers[0].mlp.experts.gate_up_proj.global_scale
    assert bool((scale[:, 0::2] > 4 * scale[:, 1::2]).all())


def test_layers_that_engines_fuse_share_a_scale():
    for rule, several in (("fused", 1), ("projection", 3)):
        model = transformers_model("Qwen3Moe")
        attention = model.model.layers[0].self_attn
        for largest, name in enumerate("qkv", start=8):
            getattr(attention, f"{name}_proj").weight[0, 0] = largest
        quantize_(model, NVFP4Config(global_scale=rule))
        found = {float(getattr(attention, f"{n}_proj").weight.global_scale[0]) for n in "qkv"}
        assert len(found) == several
        listed = ListOfExperts()
        quantize_(listed, NVFP4Config(global_scale=rule))
        pairs = [(e.gate_proj.weight.global_scale[0], e.up_proj.weight.global_scale[0]) for e in listed.experts]
        assert all((a == b) == (rule == "fused") for a, b in pairs)


# Which weights


def test_heads_embeddings_and_routers_are_left_and_the_record_says_so():
    model = transformers_model("Qwen3Moe")
    quantize_(model, NVFP4Config())
    record = model.nvfp4_quantization
    assert set(record.packed) == set(packed(model))
    assert len(record.packed) == 2 * (4 + 2)
    assert record.left_alone == {
        "model.embed_tokens.weight": "an embedding",
        "model.layers.0.mlp.gate.weight": "a router",
        "model.layers.1.mlp.gate.weight": "a router",
        "lm_head.weight": "an output head",
    }
    assert "12 weights packed, 4 left alone" in str(record)


def test_a_head_that_is_tied_to_the_embedding_stays_whatever_the_filter_says():
    model = transformers_model("Qwen3Moe", tie_word_embeddings=True)
    quantize_(model, NVFP4Config(), lambda module, fqn: isinstance(module, nn.Linear))
    assert model.nvfp4_quantization.left_alone["lm_head.weight"] == "tied to an embedding"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.nvfp4_quantization.left_alone["model.layers.0.mlp.experts.down_proj"] == "filter_fn"


def test_linear_layers_that_are_tied_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model["b"].weight = model["a"].weight
    quantize_(model)
    assert model["a"].weight is model["b"].weight
    assert isinstance(model["a"].weight.data, NVFP4Weight)


def test_experts_that_are_tied_stay_tied():
    """They were packed one by one, in twice the memory."""
    model = nn.ModuleList([Experts(), Experts()])
    model[1].w13, model[1].w2 = model[0].w13, model[0].w2
    quantize_(model)
    assert all(getattr(model[0], name) is getattr(model[1], name) for name in ("w13", "w2"))
    assert isinstance(model[0].w13.data, NVFP4Weight)
    assert model[0].shared.weight is not model[1].shared.weight


def test_weights_that_are_computed_are_refused_before_any_is_packed():
    """It ended in a KeyError that named nothing, half of the model packed."""
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "normed": nn.Linear(32, 32)})
    nn.utils.parametrizations.weight_norm(model["normed"])
    with pytest.raises(ValueError, match=r"normed\.weight: computed from other parameters .*parametrization"):
        quantize_(model)
    assert not packed(model)


def test_encoder_layers_of_pytorch_run_in_inference():
    """Their fast path hands packed weights to an op that reads dense ones."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    quantize_(model)
    assert len(packed(model)) == 4
    x = torch.randn(2, 5, 64)
    masked = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, masked):
        want = model(x, src_key_padding_mask=mask)  # with gradients that path is not taken
        with torch.no_grad():
            got = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got, want.detach())


def test_gate_and_up_of_stacked_experts_apart_share_a_scale():
    """Each had its own, so that an engine that keeps one was off by what lies between them."""
    model = nn.Module()
    torch.manual_seed(0)
    for name, shape, factor in (("gate_proj", (48, 64), 1), ("up_proj", (48, 64), 5), ("down_proj", (64, 48), 1)):
        model.register_parameter(name, nn.Parameter(factor * torch.randn(EXPERTS, *shape)))
    model.is_transposed = False
    apart = copy.deepcopy(model)
    quantize_(model)
    gate, up = model.gate_proj.data.global_scale, model.up_proj.data.global_scale
    assert torch.equal(gate, up)
    assert gate.unique().numel() == EXPERTS
    quantize_(apart, NVFP4Config(global_scale="projection"))
    assert (apart.up_proj.data.global_scale > 3 * apart.gate_proj.data.global_scale).all()


def test_small_weights_in_float16_keep_their_codes():
    """compressed-tensors' divisor 2688 / amax is infinite in float16, and all codes became zeros."""
    for dialect in DIALECTS:
        layer = nn.Linear(64, 64, bias=False).half()
        layer.weight.data *= 0.005 / layer.weight.abs().max().item()
        dense = layer.weight.detach().float()
        quantize_(layer_in := nn.Sequential(layer), NVFP4Config(dialect=dialect))
        off = layer_in[0].weight.dequantize(torch.float32) - dense
        assert off.norm() < 0.12 * dense.norm(), dialect


def test_odd_sizes_are_left_and_named():
    model = nn.ModuleDict({"odd": nn.Linear(24, 32), "even": nn.Linear(32, 24)})
    quantize_(model)
    assert model.nvfp4_quantization.packed == ["even.weight"]
    assert model.nvfp4_quantization.left_alone == {"odd.weight": "the input dim of [32, 24] is not whole blocks of 16"}


class Tables(nn.Module):
    """Tokens and positions of an image encoder, and tables for each of two halves."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = (nn.Parameter(torch.zeros(1, n, 32)) for n in (1, 64))
        self.halves = nn.Module()
        self.halves.a, self.halves.b = (nn.Parameter(torch.zeros(2, n, 32)) for n in (16, 64))


def test_convolutions_and_tables_are_not_experts():
    model = nn.Sequential(nn.Conv1d(16, 16, 16), nn.Bilinear(16, 16, 16), nn.Linear(16, 16), Tables())
    quantize_(model)
    assert model.nvfp4_quantization.packed == ["2.weight"]


def test_attention_of_torchs_own_still_runs():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "linear": nn.Linear(32, 32)}).eval()
    quantize_(model)
    assert model.nvfp4_quantization.packed == ["linear.weight"]
    x = torch.randn(4, 1, 32)
    with torch.no_grad():
        assert model["attention"](x, x, x)[0].isfinite().all()


def test_torchaos_own_function_packs_the_same():
    ours, theirs = Experts(), Experts()
    quantize_(ours)
    with pytest.warns(NVFP4Warning, match="does not look inside the Experts that it packed: shared"):
        torchao.quantization.quantize_(theirs, NVFP4Config(), fx_nvfp4.quantizable)
    assert set(packed(ours)) - set(packed(theirs)) == {"shared.weight"}
    assert all(same(w, packed(ours)[name]) for name, w in packed(theirs).items())
    lists = ListOfExperts()
    torchao.quantization.quantize_(lists, NVFP4Config(activations="dynamic", block_scale="mse"))
    assert len(packed(lists)) == 3 * EXPERTS + 1  # torchao's own filter takes every linear layer, the router too


def test_quantizing_again_changes_nothing_but_what_is_still_dense():
    model = Experts()
    quantize_(model, None, lambda module, fqn: fqn == "shared")
    before = model.shared.weight
    quantize_(model)
    assert model.shared.weight is before
    assert model.nvfp4_quantization.packed == ["w13", "w2"]


def test_device_moves_what_stays_dense_too():
    model = transformers_model("Qwen3Moe")
    quantize_(model, device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# Errors


class Ungated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))


def test_a_layout_that_cannot_be_told_is_refused_until_it_is_said():
    with pytest.raises(ValueError, match=r"Ungated: experts .*4, 48, 64.* and nothing tells: set is_transposed"):
        quantize_(Ungated())
    both = nn.ModuleDict({"linear": nn.Linear(32, 32), "experts": Ungated()})
    with pytest.raises(ValueError, match="experts: experts"):
        quantize_(both)
    assert packed(both) == {}  # nothing is packed where not all can be
    given, marked = Ungated(), Ungated()
    quantize_(given, NVFP4Config(transposed=True))
    marked.is_transposed = False
    quantize_(marked)
    assert given.up.data.qdata.shape == (EXPERTS, HIDDEN, INNER // 2)
    assert marked.up.data.qdata.shape == (EXPERTS, INNER, HIDDEN // 2)


@pytest.mark.parametrize("field", ["activations", "block_scale", "global_scale", "dialect"])
def test_unknown_values_are_refused(field):
    with pytest.raises(ValueError, match=r"sometimes.*|one of"):
        NVFP4Config(**{field: "sometimes"})


def test_what_cannot_be_packed_is_named():
    for value in (torch.nan, torch.inf):
        model = nn.ModuleDict({"a": nn.Linear(32, 32)})
        model["a"].weight.data[3, 5] = value
        with pytest.raises(ValueError, match=r"a\.weight: a weight of (nan|inf)"):
            quantize_(model, NVFP4Config(global_scale="projection"))
    with pytest.raises(ValueError, match=r"a\.weight: no values yet"):
        quantize_(nn.ModuleDict({"a": nn.Linear(32, 32, device="meta")}))
    with pytest.raises(ValueError, match=r"a\.weight: K = 24"):
        quantize_(nn.ModuleDict({"a": nn.Linear(24, 32)}), filter_fn=lambda m, fqn: fqn == "a")
    with pytest.raises(ValueError, match="no weight was chosen to be packed"):
        quantize_(nn.LayerNorm(16))
    odd = nn.ModuleDict({"a": nn.Linear(60, 128), "lm_head": nn.Linear(64, 64)})
    reasons = r"a\.weight: the input dim of \[128, 60\] is not whole blocks of 16; lm_head\.weight: an output head\)"
    with pytest.raises(ValueError, match=reasons):
        quantize_(odd)
    done = nn.ModuleDict({"a": nn.Linear(64, 128)}).requires_grad_(False)
    quantize_(done)
    with pytest.raises(ValueError, match="1 weights are packed already"):
        quantize_(done)
    with pytest.raises(TypeError, match="must be an NVFP4Config, got Int8WeightOnlyConfig"):
        quantize_(nn.Linear(32, 32), torchao.quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="filter_fn chose a Sequential"):
        torchao.quantization.quantize_(nn.Sequential(nn.Linear(32, 32)), NVFP4Config(), lambda m, fqn: True)


# Running them


def check_compiled(model, x, sites):
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False, "strict": True})
    with torch.no_grad(), collect_reports() as report:
        want, got = model(x), run(x)
    want, got = (y if isinstance(y, torch.Tensor) else y.logits for y in (want, got))
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert {m.weight.removesuffix(".qdata") for m in report.matched} == set(packed(model))
    assert len(report.matched) == sites
    return report


def static(model, x):
    quantize_(model, NVFP4Config(activations="static", block_scale="mse"))
    with torch.no_grad(), fx_nvfp4.calibrate(model):
        model(x)
    return model


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_static_transformers_models_compile_to_what_they_are_in_eager(family):
    model = static(transformers_model(family, torch.float32, num_hidden_layers=1), token_ids())
    report = check_compiled(model, token_ids(), 6)
    assert {m.activations.split(",")[0] for m in report.matched} == {"W4A4 static", "W4A4 static per-expert"}
    assert [b.lifted for b in report.blocks] == [True]


@pytest.mark.parametrize("transposed", [False, True])
def test_static_experts_of_ones_own_compile(transposed):
    check_compiled(static(Experts(transposed), tokens()), tokens(), 3)


def test_a_list_of_experts_is_calibrated_fused_and_compiled():
    model = static(ListOfExperts(), tokens())
    with torch.no_grad():
        before = model(tokens())
    fx_nvfp4.prepare(model.eval())
    assert len(model.nvfp4_preparation.fused) == 1
    check_compiled(model, tokens(), 3)
    with torch.no_grad():
        assert torch.allclose(model(tokens()), before, atol=1e-4)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_other_activations_compile(activations):
    model = Experts()
    quantize_(model, NVFP4Config(activations=activations))
    check_compiled(model, tokens(), 3)
