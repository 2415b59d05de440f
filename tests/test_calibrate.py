"""calibrate: the scales are those of a plain loop over the rows that each expert gets, however a model spells it."""

import pytest
import torch
from quantized_models import (
    EXPERTS,
    Experts,
    ListOfExperts,
    prefer,
    token_ids,
    tokens,
    transformers_model,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4 import NVFP4Config, NVFP4Weight, calibrate, quantize_
from fx_nvfp4.dialects import DIALECTS, get_dialect
from fx_nvfp4.report import NVFP4Warning

pytestmark = pytest.mark.usefixtures("one_thread")
STATIC = NVFP4Config(activations="static")


def quantized(model: nn.Module, **changes) -> nn.Module:
    quantize_(model, NVFP4Config(**{"activations": "static", **changes}))
    return model


@torch.no_grad()
def calibrated(model: nn.Module, *batches: Tensor):
    with calibrate(model) as calibration:
        for x in batches:
            model(x)
    return calibration


def by_expert(x: Tensor, ids: Tensor, up: NVFP4Weight, interleaved: bool = False) -> tuple[list[float], list[float]]:
    """Largest magnitudes that enter the up and the down weight of each expert, by a loop over its rows."""
    entering, between = [], []
    for e in range(EXPERTS):
        rows = x[(ids == e).any(-1)].float()
        out = rows @ up[e].dequantize(torch.float32).T if not up.transposed else rows @ up[e].dequantize(torch.float32)
        gate, value = (out[:, 0::2], out[:, 1::2]) if interleaved else out.chunk(2, dim=-1)
        entering.append(float(rows.abs().amax()) if rows.numel() else 0.0)
        h = F.silu(gate) * value
        between.append(float(h.abs().amax()) if rows.numel() else 0.0)
    return entering, between


# Every expert's own rows


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_experts_of_transformers_get_the_scale_of_their_rows(family, how):
    model = quantized(transformers_model(family, torch.float32))
    model.set_experts_implementation(how)
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    found = calibrated(model, token_ids())
    (x, ids, _) = seen[0]
    entering, between = by_expert(x, ids, experts.gate_up_proj.data)
    assert found.amax["model.layers.0.mlp.experts.gate_up_proj"].tolist() == entering
    torch.testing.assert_close(found.amax["model.layers.0.mlp.experts.down_proj"], torch.tensor(between))
    assert len(set(entering)) > 2  # a shared maximum would show


def test_dense_experts_of_llama4_count_the_rows_that_are_not_zeroed():
    model = quantized(transformers_model("Llama4", torch.float32))
    seen = []
    experts = model.model.layers[0].feed_forward.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = calibrated(model, token_ids())
    rows = seen[0].view(EXPERTS, -1, seen[0].shape[-1])
    assert found.amax["model.layers.0.feed_forward.experts.gate_up_proj"].tolist() == rows.abs().amax((1, 2)).tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_that_an_einsum_gathers(transposed):
    model = quantized(Experts(transposed))
    found = calibrated(model, x := tokens())
    with torch.no_grad():
        entering, between = by_expert(x, model.route(x)[1], model.w13.data)
    assert found.amax["w13"].tolist() == entering
    torch.testing.assert_close(found.amax["w2"], torch.tensor(between))
    assert found.amax["shared.weight"] == x.abs().max()


def test_lists_of_experts_and_what_is_shared_by_gate_and_up():
    model = quantized(ListOfExperts())
    found = calibrated(model, x := tokens())
    with torch.no_grad():
        ids = model.gate(x).topk(2, dim=-1).indices
    for e in range(EXPERTS):
        expected = x[(ids == e).any(-1)].abs().max()
        assert found.amax[f"experts.{e}.gate_proj.weight"] == expected
        assert found.amax[f"experts.{e}.up_proj.weight"] == expected


def test_several_batches_count_together():
    model, (a, b) = quantized(Experts()), (tokens(8), 3 * tokens(9))
    together = calibrated(model, a, b).amax
    apart = [calibrated(model, x).amax for x in (a, b)]
    for name, amax in together.items():
        assert torch.equal(amax, torch.maximum(apart[0][name], apart[1][name]))


def test_rows_of_nobody_do_not_count():
    # grouped_mm of transformers pads, and expert parallelism sends rows elsewhere: ids outside, rows past the end.
    w = NVFP4Weight.from_dense(torch.randn(EXPERTS, 32, 32), activations="uncalibrated")
    model = nn.ParameterDict({"w": nn.Parameter(w, requires_grad=False)})
    x = torch.ones(8, 32)
    x[6:] = 100
    offs = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    with pytest.warns(NVFP4Warning, match=r"no token reached 1 weights of experts: w\[1\]"), calibrate(model) as found:
        torch._grouped_mm(x.bfloat16(), model["w"].to(torch.bfloat16).mT, offs=offs)
    assert found.amax["w"].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_scales_follow_the_dialects_formula(dialect):
    model = quantized(Experts(), dialect=dialect)
    found = calibrated(model, tokens())
    for name, amax in found.amax.items():
        weight = model.get_parameter(name).data
        assert (weight.activations, weight.dialect) == ("static", dialect)
        assert torch.equal(weight.act_scale, get_dialect(dialect).global_scale(amax))


def test_calibration_sees_activations_as_they_are():
    # Not rounded by scales found so far: the second layer's maximum would change.
    model = quantized(transformers_model("Qwen3Moe", torch.float32))
    first = calibrated(model, token_ids()).amax
    assert all(w.data.activations == "static" for w in model.parameters() if isinstance(w.data, NVFP4Weight))
    again = calibrated(model, token_ids()).amax
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_of_other_modes_are_not_touched():
    model = Experts()
    quantize_(model, NVFP4Config(activations="dynamic"), lambda module, fqn: fqn == "shared")
    quantize_(model, STATIC)
    dynamic = model.shared.weight
    assert set(calibrated(model, tokens()).amax) == {"w13", "w2"}
    assert model.shared.weight is dynamic


def test_in_inference_mode_parameters_are_ordinary_tensors():
    model = Experts()
    with torch.inference_mode():
        quantize_(model, STATIC)
        with calibrate(model):
            model(tokens())
    weights = [p.data for p in model.parameters() if isinstance(p.data, NVFP4Weight)]
    assert len(weights) == 3
    assert not any(getattr(w, part).is_inference() for w in weights for part in w.__tensor_flatten__()[0])


# What nothing reached


def test_experts_without_a_token_take_the_largest_scale_beside_them():
    model = quantized(Experts())
    prefer(model.router, [0, 2])
    with pytest.warns(NVFP4Warning, match=r"no token reached 4 weights of experts: w13\[1\], w13\[3\], w2\[1\] and 1"):
        found = calibrated(model, tokens())
    assert found.borrowed == ["w13[1]", "w13[3]", "w2[1]", "w2[3]"]
    for name in ("w13", "w2"):
        scale = model.get_parameter(name).data.act_scale
        assert scale[1] == scale[3] == max(scale[0], scale[2])
        assert scale[0] != scale[2] or name == "w13"
    assert "largest scale of its layer: w13[1], w13[3], w2[1] and 1 more" in str(found)
    assert model.nvfp4_calibration is found


def test_entries_of_a_list_without_a_token_too():
    model = quantized(ListOfExperts())
    prefer(model.gate, [0, 2])
    with pytest.warns(NVFP4Warning, match="no token reached 6 weights"):
        found = calibrated(model, tokens())
    assert found.borrowed == [f"experts.{e}.{p}_proj.weight" for e in (1, 3) for p in ("gate", "up", "down")]
    scales = [float(e.down_proj.weight.act_scale) for e in model.experts]
    assert scales[1] == scales[3] == max(scales[0], scales[2])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_nothing_reached_stays_uncalibrated_and_says_so():
    model = quantized(Unused())
    with pytest.warns(NVFP4Warning, match=r"nothing reached unused\.weight; products with these weights raise"):
        found = calibrated(model, torch.randn(3, 32))
    assert found.unreached == ["unused.weight"]
    assert model.used.weight.activations == "static"
    with pytest.raises(ValueError, match="static activations without a scale yet; run data"):
        model.unused(torch.randn(3, 32))


def test_what_nothing_reaches_the_second_time_keeps_its_scale():
    """It lost a good scale: layers became uncalibrated, experts took the largest beside them."""
    model = quantized(Experts())
    calibrated(model, tokens())
    before = model.w13.data.act_scale.clone(), model.shared.weight.act_scale.clone()
    prefer(model.router, [0, 2])
    found = calibrated(model, 4 * tokens())
    after = model.w13.data.act_scale
    assert torch.equal(after[[1, 3]], before[0][[1, 3]])
    assert (after[[0, 2]] > 2 * before[0][[0, 2]]).all()
    assert model.shared.weight.act_scale > 2 * before[1]
    assert (found.kept, found.borrowed, found.unreached) == (["w13[1]", "w13[3]", "w2[1]", "w2[3]"], [], [])
    assert "scale of before: w13[1]" in str(found)
    two = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantized(two)
    calibrated(two, torch.randn(3, 32))
    scale = two[1].weight.act_scale
    with torch.no_grad(), calibrate(two) as found:
        two[0](torch.randn(3, 32))
    assert found.kept == ["1.weight"]
    assert two[1].weight.activations == "static"
    assert torch.equal(two[1].weight.act_scale, scale)


# Errors


def test_products_before_calibration_raise_in_eager_and_compiled():
    model = quantized(Experts())
    for run in (model, torch.compile(model, backend="nvfp4_emu", options={"codegen": False})):
        with pytest.raises(ValueError, match="without a scale yet"), torch.no_grad():
            run(tokens())
    torch._dynamo.reset()


def state(model: nn.Module) -> list[tuple[str, str]]:
    return [(w.data.activations, str(w.data.act_scale)) for w in model.parameters() if isinstance(w.data, NVFP4Weight)]


def test_an_error_inside_leaves_the_weights_as_they_were():
    model = quantized(Experts())
    before = state(model)
    with pytest.raises(RuntimeError), calibrate(model):
        model(tokens()[:, :16])
    assert state(model) == before
    with pytest.raises(ValueError, match=r"NaN or infinity entered w13, w2, shared\.weight"):
        calibrated(model, tokens() * torch.inf)
    with pytest.raises(ValueError, match="nothing reached any of 3 packed weights"):
        calibrated(model)
    assert state(model) == before


def test_a_model_without_static_activations_is_refused():
    for activations in ("none", "dynamic"):
        with (
            pytest.raises(ValueError, match="no packed weight with static activations"),
            calibrate(quantized(Experts(), activations=activations)),
        ):
            pass


def test_fused_experts_are_to_be_calibrated_before():
    model = quantized(ListOfExperts().eval())
    calibrated(model, tokens())
    fx_nvfp4.prepare(model)
    with pytest.raises(NotImplementedError, match=r"calibrate the model before prepare\(\)"):
        calibrated(model, tokens())


def test_tied_weights_are_calibrated_together():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    quantized(model)
    found = calibrated(model, 0.01 * torch.randn(4, 32))
    assert model[2].weight is model[0].weight
    assert list(found.amax) == ["0.weight"]
