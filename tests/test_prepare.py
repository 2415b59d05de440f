"""prepare(): lists of experts become one module, whatever loops over them; numbers stay; what cannot be is named.

Covered: nine ways to loop over experts, four kinds of experts, torchao parameters, transformers models, training,
copies and pickles, memory; and every reason for which a list is left alone.
"""

import copy
import ctypes
import functools
import sys
import warnings
import weakref

import moe_parents as parents
import pytest
import torch
from moe_parents import EXPERTS, HIDDEN, MLPS, PARENTS, GatedMLP, hidden_states
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Warning, NVFP4Weight
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.fused import FusedExperts
from fx_nvfp4.parameters import replace_parameters

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def first(out):
    return out[0] if isinstance(out, tuple) else out


def run(module, x):
    with torch.no_grad():
        return module(x)


def error(actual, expected):
    actual, expected = first(actual).double(), first(expected).double()
    return float((actual - expected).norm() / expected.norm())


def prepared(model):
    """prepare() under the condition that nothing is left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NVFP4Warning)
        return fx_nvfp4.prepare(model)


def left_alone(model):
    with pytest.warns(NVFP4Warning):
        fx_nvfp4.prepare(model)
    (alone,) = model.nvfp4_preparation.left_alone
    assert not model.nvfp4_preparation.fused
    return str(alone)


# In bfloat16: sums in place, of all experts, of concatenated results, and of weighed inputs.
ROUNDED = ("ExpertHit", "StaticMasks", "SortedByNumpy", "WeighedInput")


@functools.cache
def fused_parent(name, dtype):
    """(prepared module, inputs, what it gave for them before)"""
    module = PARENTS[name](dtype).eval()
    inputs = [hidden_states(2, 9, dtype=dtype), hidden_states(1, 1, dtype=dtype), hidden_states(3, 4, dtype=dtype)]
    expected = [run(module, x) for x in inputs]
    assert prepared(module) is module
    return module, inputs, expected


@pytest.mark.in_part(6)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, torch.float32) for n in PARENTS), *((n, torch.bfloat16) for n in ROUNDED)], ids=str
)
def test_every_loop_becomes_one_call(name, dtype):
    module, inputs, expected = fused_parent(name, dtype)
    assert isinstance(module.experts, FusedExperts)
    assert isinstance(module, PARENTS[name])
    for x, before in zip(inputs, expected, strict=True):
        after = run(module, x)
        assert error(after, before) < TOLERANCE[dtype]
        if isinstance(before, tuple):
            assert torch.equal(after[1], before[1])


@pytest.mark.in_part(3)
@pytest.mark.parametrize("name", PARENTS)
def test_it_compiles_to_one_graph_of_one_moe_op(name):
    module, (x, *_), _ = fused_parent(name, torch.float32)
    ops = []

    def keep(gm, inputs):
        ops.extend(str(n.target) for n in gm.graph.nodes if "moe" in str(n.target))
        return gm

    torch.compile(module, backend=keep, fullgraph=True)(x)
    assert len(ops) == 1
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="nvfp4_emu", fullgraph=True, dynamic=True, options={"codegen": False})
    with collect_reports() as report:
        for size in (9, 5):
            assert error(run(compiled, hidden_states(2, size)), run(module, hidden_states(2, size))) < 1e-6
    assert not report.refused


@pytest.mark.in_part(6)
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("expert", MLPS)
def test_every_kind_of_expert(expert, activations):
    if expert == "SpelledMLP" and activations != "none":
        pytest.skip("it spells weights alone")
    module = parents.ExpertHit(torch.float32, MLPS[expert], activations).eval()
    x = hidden_states(2, 9)
    expected = run(module, x)
    prepared(module)
    assert error(run(module, x), expected) < 1e-4
    layouts = {
        "GatedMLP": "separate",
        "FusedGateMLP": "concatenated",
        "PlainMLP": "plain",
        "SpelledMLP": "concatenated",
    }
    assert module.experts.layout == layouts[expert]
    assert (module.experts.down_proj_bias is not None) == (expert == "PlainMLP")
    assert module.experts.down_proj.activations == activations


class Layers(nn.Module):
    def __init__(self, count, cls=parents.SharedExpert, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(cls(dtype) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + first(layer(x))
        return x


class SpelledExpert(nn.Module):
    """Codes, scales and a table in buffers, none of which tells the dtype that the model runs in."""

    def __init__(self):
        super().__init__()
        for name, shape in (("gate", (48, 64)), ("up", (48, 64)), ("down", (64, 48))):
            weight = torch.randn(shape) / 8
            scale = weight.abs().max() / 2688
            codes, block_scale = nvfp4.quantize(weight, scale)
            for part, value in (("codes", codes), ("scales", block_scale), ("scale", scale)):
                self.register_buffer(f"{name}_{part}", value)
        self.register_buffer("table", torch.tensor(nvfp4.E2M1_VALUES))

    def product(self, x, name):
        codes, scales, scale = (getattr(self, f"{name}_{part}") for part in ("codes", "scales", "scale"))
        values = self.table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        return x @ (values * (scales.float() * scale).repeat_interleave(16, -1)).to(x.dtype).T

    def forward(self, x):
        return self.product(torch.nn.functional.silu(self.product(x, "gate")) * self.product(x, "up"), "down")


class RoutedInFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(SpelledExpert() for _ in range(4))

    def forward(self, x):
        weights, ids = self.router(x.float()).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights.to(x.dtype)[token, slot, None])
        return out


def test_experts_that_show_no_dtype_run_in_the_model_s():
    """They were recorded in torch's default dtype: what casts to it was lost, and the next call raised."""
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), RoutedInFloat32()).eval().requires_grad_(False)
    x = torch.randn(9, 64).bfloat16()
    want = run(model, x)
    assert len(prepared(model).nvfp4_preparation.fused) == 1
    assert error(run(model, x), want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("what", ["activations of gate and up", "dialects"])
def test_fused_experts_round_gate_and_up_alike(what):
    """Up's mode was not looked at."""
    dialects = ["hardware", "hardware", "torchao"] if what == "dialects" else ["hardware"] * 3
    modes = ["dynamic"] * 3 if what == "dialects" else ["none", "dynamic", "none"]
    weights = {
        name: NVFP4Weight.from_dense(torch.randn(2, *shape), mode, dialect=dialect)
        for name, shape, mode, dialect in zip(
            ("gate_proj", "up_proj", "down_proj"), ((48, 64), (48, 64), (64, 48)), modes, dialects, strict=True
        )
    }
    with pytest.raises(ValueError, match=f"{what} differ"):
        FusedExperts(weights, {}, "silu(g) * u", "separate")


def test_old_parameters_are_freed_one_by_one():
    """All of them were kept to the end: twice the model's memory."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 8))
    model[4].weight = model[0].weight
    old, alive = [weakref.ref(p) for p in model.parameters()], []

    def replace(name, value):
        alive.append(sum(ref() is not None for ref in old))
        return value.clone()

    replace_parameters(model, replace)
    assert alive == [9, 9, 8, 7, 6, 5, 4, 3, 2]  # but for the tied one, the first
    assert model[4].weight is model[0].weight
    assert sum(ref() is not None for ref in old) == 0


def test_layers_share_one_class_and_keep_their_own_weights():
    model = Layers(3).eval()
    x = hidden_states(2, 9)
    expected = run(model, x)
    prepared(model)
    assert len({type(layer) for layer in model.layers}) == 1
    assert [f.where for f in model.nvfp4_preparation.fused] == [f"layers.{i}.experts" for i in range(3)]
    assert error(run(model, x), expected) < 1e-5
    compiled = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options={"codegen": False})
    assert error(run(compiled, x), expected) < 1e-5


def test_names_lead_from_new_parameters_to_old_ones():
    model = Layers(1).eval()
    old = dict(model.named_parameters())
    prepared(model)
    names = model.nvfp4_preparation.names()
    new = dict(model.named_parameters())
    assert set(names) == {n for n in new if ".experts." in n}
    for name, sources in names.items():
        assert len(sources) == EXPERTS
        assert set(sources) <= set(old)
        for e, source in enumerate(sources):
            assert torch.equal(new[name][e].dequantize(), old[source].dequantize())
    assert {n for n in old if ".experts." not in n} == {n for n in new if ".experts." not in n}


def test_biases_hold_their_values_and_are_never_trained_in_silence():
    module = parents.ExpertHit(expert=parents.PlainMLP).eval()
    expected = torch.stack([e.fc1.bias.detach().clone() for e in module.experts])
    prepared(module)
    assert torch.equal(module.experts.up_proj_bias, expected)
    with pytest.raises(RuntimeError, match="up_proj_bias requires a gradient"):
        module.experts.train()(torch.randn(2, HIDDEN), torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert "learn fc1.bias" in left_alone(parents.ExpertHit(expert=parents.PlainMLP).train())
    assert not module.experts.up_proj.requires_grad


def test_gradients_reach_hidden_states_and_router_as_before():
    module = parents.SharedExpert().train()

    def gradients():
        x = hidden_states(2, 9).requires_grad_()
        return torch.autograd.grad(module(x)[0].square().sum(), [x, module.gate.weight])

    expected = gradients()
    prepared(module)
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert error(actual, wanted) < 1e-4
    module.eval()
    assert run(module, hidden_states(1, 3))[0].shape == (1, 3, HIDDEN)


def test_a_mode_that_the_original_did_not_have_raises():
    class EvalOnly(parents.ExpertHit):
        def forward(self, hidden_states):
            assert not self.training
            return super().forward(hidden_states)

    module = prepared(EvalOnly().eval())
    with pytest.raises(RuntimeError, match="Call prepare"):
        module.train()(hidden_states(1, 3))


def test_copies_pickles_and_state_dicts(tmp_path):
    model = prepared(Layers(2).eval())
    x = hidden_states(2, 5)
    expected = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), expected)
    assert twin.layers[0].experts.down_proj.qdata.data_ptr() != model.layers[0].experts.down_proj.qdata.data_ptr()
    other = prepared(Layers(2).eval())
    assert not torch.equal(run(other, x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, x), expected)
    fx_nvfp4.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(fx_nvfp4.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(run(other, x), expected)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(again, x), expected)


def test_a_second_call_changes_nothing():
    module = prepared(parents.ExpertHit().eval())
    forward, experts = type(module), module.experts
    prepared(module)
    assert type(module) is forward
    assert module.experts is experts
    assert not module.nvfp4_preparation.fused


def test_modes_buffers_and_random_numbers_are_as_before():
    module = parents.SortedByNumpy().eval()
    module.shared_experts.train()
    before = copy.deepcopy(dict(module.gate.named_buffers()))
    state = torch.get_rng_state()
    prepared(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.shared_experts.training
    assert not module.training
    assert all(torch.equal(b, before[n]) for n, b in module.gate.named_buffers())


def test_weights_move_one_projection_at_a_time(monkeypatch):
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    from fx_nvfp4.preparation import stack

    class Mallinfo(ctypes.Structure):
        names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    libc.mallinfo2.restype = Mallinfo

    def allocated():
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd

    wide = 16384

    class WideMLP(GatedMLP):
        def __init__(self, dtype, activations):
            super().__init__(dtype, activations, intermediate=wide)

    model = Layers(2, lambda dtype: parents.ExpertHit(dtype, WideMLP)).eval()
    projection = EXPERTS * wide * (HIDDEN // 2 + HIDDEN // 16 + 4)
    seen = []
    parts = stack.ExpertPlan.parts
    monkeypatch.setattr(stack.ExpertPlan, "parts", lambda *a: (seen.append(allocated()), parts(*a))[1])
    prepared(model)
    assert len(seen) == 2 * 3 * EXPERTS
    # What recording left behind varies by a few megabytes; a second copy of the model would be six projections.
    assert max(seen) - seen[0] < 2 * projection
    assert allocated() - seen[0] < projection


def test_torchao_parameters_are_converted_and_tied_ones_stay_tied():
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    module = parents.ExpertHit().eval()
    for expert in module.experts:
        for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
            dense = linear.weight.dequantize()
            linear.weight = nn.Parameter(NVFP4Tensor.to_nvfp4(dense, is_swizzled_scales=True), requires_grad=False)
    model = nn.ModuleDict({"moe": module, "head": nn.Linear(HIDDEN, HIDDEN), "tied": nn.Linear(HIDDEN, HIDDEN)})
    model.head.weight = nn.Parameter(NVFP4Tensor.to_nvfp4(torch.randn(HIDDEN, HIDDEN)), requires_grad=False)
    model.tied.weight = model.head.weight
    codes = model.head.weight.qdata.data_ptr()
    x = hidden_states(2, 9)
    dense = copy.deepcopy(module)
    for expert in dense.experts:
        for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
            linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
    expected = run(dense, x)
    prepared(model)
    assert len(model.nvfp4_preparation.converted) == 3 * EXPERTS + 2
    assert isinstance(model.head.weight.data, NVFP4Weight)
    assert model.head.weight is model.tied.weight
    assert model.head.weight.qdata.data_ptr() == codes
    assert isinstance(module.experts, FusedExperts)
    assert error(run(module, x), expected) < 1e-4


def test_dense_experts_and_layers_are_not_spoken_of():
    class DenseMLP(nn.Module):
        def __init__(self, dtype, activations):
            super().__init__()
            self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

        def forward(self, x):
            return self.down(self.up(x).relu())

    model = prepared(Layers(2, lambda dtype: parents.ExpertHit(dtype, DenseMLP)).eval())
    record = model.nvfp4_preparation
    assert (record.fused, record.left_alone, record.converted) == ([], [], [])


def test_transformers_experts_are_switched_to_what_traces():
    pytest.importorskip("transformers")
    from checkpoint_files import SMALL

    model = fx_nvfp4.load(SMALL, dtype=torch.float32, progress=False)
    assert not prepared(model).nvfp4_preparation.switched  # load() has chosen
    input_ids = torch.arange(12).view(2, 6)
    for choice, switched in (("eager", "grouped_mm"), ("batched_mm", "batched_mm")):
        model.set_experts_implementation(choice)
        expected = run(model, input_ids).logits
        record = prepared(model).nvfp4_preparation
        assert (record.switched != []) == (choice == "eager")
        assert model.config._experts_implementation == switched
        assert error(run(model, input_ids).logits, expected) < 1e-4


# Lists that are left alone, and what the record says


def test_missing_experts():
    module = parents.ExpertHit().eval()
    module.experts[3] = None
    assert "experts 3 are missing" in left_alone(module)


def test_hooks():
    module = parents.ExpertHit().eval()
    module.experts[2].up_proj.register_forward_hook(lambda *_: None)
    assert "expert 2.up_proj has hooks" in left_alone(module)


def test_adapters():
    class WithAdapter(GatedMLP):
        def __init__(self, dtype, activations):
            super().__init__(dtype, activations)
            self.lora_a = nn.Linear(HIDDEN, 4, bias=False)
            self.lora_b = nn.Linear(4, HIDDEN, bias=False)

        def forward(self, x):
            return super().forward(x) + self.lora_b(self.lora_a(x))

    assert "lora_a.weight" in left_alone(parents.ExpertHit(expert=WithAdapter).eval())


def test_tied_experts():
    module = parents.ExpertHit().eval()
    module.experts[5].up_proj.weight = module.experts[1].up_proj.weight
    assert "expert 1 shares up_proj.weight" in left_alone(module)


def test_experts_of_different_shapes():
    module = parents.ExpertHit().eval()
    module.experts[4] = GatedMLP(torch.float32, intermediate=64)
    assert "expert 4 differs from the first" in left_alone(module)


def test_experts_with_different_settings():
    module = parents.ExpertHit().eval()
    module.experts[6].limit = 7.0
    assert "expert 6 differs from the first" in left_alone(module)


def test_experts_without_values():
    module = parents.ExpertHit().eval().to("meta")
    assert "meta device" in left_alone(module)


def test_experts_that_are_more_than_up_and_down():
    class Residual(GatedMLP):
        def forward(self, x):
            return x + super().forward(x)

    module = parents.ExpertHit(expert=Residual).eval()
    x = hidden_states(2, 9)
    expected = run(module, x)
    assert "experts" in left_alone(module)
    assert torch.equal(run(module, x)[0], expected[0])


def test_a_capacity_that_drops_tokens():
    class Capacity(parents.EveryExpert):
        def forward(self, x):
            rows = x.view(-1, x.shape[-1])
            weights, ids = self.gate(rows).softmax(dim=-1).topk(self.top_k)
            out, capacity = torch.zeros_like(rows), len(rows) * self.top_k // 4
            for e, expert in enumerate(self.experts):
                token, slot = (i[:capacity] for i in torch.where(ids == e))
                out[token] += weights[token, slot, None] * expert(rows[token])
            return out.view_as(x)

    # Random inputs never fill an expert, equal tokens do.
    assert "capacity" in left_alone(Capacity().eval())


def test_random_routing():
    class Noisy(parents.EveryExpert):
        def forward(self, x):
            return super().forward(x + torch.randn(x.shape, generator=self.generator))

    module = Noisy().eval()
    module.generator = torch.Generator().manual_seed(0)
    assert "experts" in left_alone(module)


def test_a_forward_that_counts():
    class Counts(parents.EveryExpert):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(EXPERTS))

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    module = Counts().eval()
    assert "writes to seen" in left_alone(module)
    assert not module.seen.any()


def test_a_forward_that_keeps_what_it_computed():
    class Keeps(parents.EveryExpert):
        def forward(self, x):
            self.logits = self.gate(x)
            return super().forward(x)

    module = Keeps().eval()
    assert "keeps tensors in self.logits" in left_alone(module)
    assert not hasattr(module, "logits")


def test_sums_that_depend_on_what_experts_say():
    class Normed(parents.EveryExpert):
        def forward(self, x):
            return F.normalize(super().forward(x) - x, dim=-1)

    from torch.nn import functional as F

    class PerExpert(parents.Parent):
        def forward(self, x):
            rows = x.view(-1, x.shape[-1])
            weights, ids, _ = self.route(rows)
            out = torch.zeros_like(rows)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(ids == e)
                out[token] += weights[token, slot, None] * F.normalize(expert(rows[token]), dim=-1)
            return out.view_as(x)

    prepared(Normed().eval())  # what follows the sum is kept
    assert "experts" in left_alone(PerExpert().eval())


def test_an_auxiliary_loss_in_the_backward_pass():
    class AddLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, loss):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, torch.ones(())

    class WithLoss(parents.EveryExpert):
        def forward(self, x):
            out = super().forward(x)
            return AddLoss.apply(out, self.gate(x).square().mean()) if self.training else out

    module = prepared(WithLoss().eval())
    with pytest.raises(RuntimeError, match="Call prepare"):
        module.train()(hidden_states(1, 3))
    assert "differs from the original" in left_alone(WithLoss().train())


def test_dynamic_scales_over_tokens_that_did_not_choose_the_expert():
    assert "dynamic scales" in left_alone(parents.StaticMasks(activations="dynamic").eval())


def test_no_forward_over_hidden_states():
    class NeedsMore(parents.EveryExpert):
        def forward(self, x, scale):
            return super().forward(x) * scale

    assert "hidden states alone" in left_alone(NeedsMore().eval())


def test_experts_that_are_not_called():
    class Direct(parents.Parent):
        def forward(self, x):
            return sum(nn.functional.linear(x, e.up_proj.weight) for e in self.experts)

    assert "does not call its experts" in left_alone(Direct().eval())


def test_explain_names_lists_that_prepare_would_fuse():
    module = parents.SortedByNumpy().eval()
    x = hidden_states(2, 4)
    hint = "fx_nvfp4.prepare(model)"
    assert any(hint in note and "experts" in note for note in fx_nvfp4.explain(module, x).notes)
    assert not any(hint in note for note in fx_nvfp4.explain(prepared(module), x).notes)
