"""The backend puts the weights that a model owns into tiles; no graph meets a weight in another layout than its own.

On a CPU by the option "always". Edges: parameters, buffers and arguments, memory that others see, weights that fill no
tiles, graph breaks, tied weights, symbolic numbers of tokens, training, inference mode, graphs compiled before, layouts
that change to and fro, warm caches.
"""

import pytest
import torch
from routed_model import Routed, tokens
from test_tensor import E, K, N, hold, make_weight
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight, backend, tile_inputs
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.layouts import is_tiled
from fx_nvfp4.tensor import layout_key


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Model(nn.Module):
    """A parameter of experts, one of a linear, and a buffer."""

    def __init__(self):
        super().__init__()
        self.experts = hold(make_weight(dtype=torch.float32))
        self.linear = nn.Linear(K, N)
        nn.init.ones_(self.linear.bias).requires_grad_(False)
        self.linear.weight = hold(make_weight((N, K), seed=1, dtype=torch.float32))
        self.register_buffer("b", make_weight((N, K), seed=2, dtype=torch.float32))

    def weights(self):
        return self.experts, self.linear.weight, self.b

    def forward(self, x, ids):
        chosen = torch.bmm(self.experts[ids], x.unsqueeze(-1)).squeeze(-1)
        return chosen + self.linear(x) + x @ self.b.t()


def inputs(tokens=5):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, K, generator=generator), torch.arange(tokens) % E


def compiled(model, prepack="always", **kwargs):
    options = {"codegen": False, "prepack": prepack}
    return torch.compile(model, backend="nvfp4_emu", options=options, **{"fullgraph": True, **kwargs})


def tiled(model):
    return [is_tiled(w.qdata) for w in model.weights()]


@pytest.mark.parametrize(
    ("context", "codegen"), [(torch.no_grad, True), (torch.inference_mode, False), (torch.enable_grad, False)]
)
def test_weights_of_the_model_are_tiled_where_they_lie(context, codegen):
    model = Model()
    want, places = model(*inputs()), [w.qdata.data_ptr() for w in model.weights()]
    run = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options={"codegen": codegen, "prepack": "always"})
    with context(), collect_reports() as report:
        got = run(*inputs())
        assert torch.equal(run(*inputs()), got)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    assert tiled(model) == [True] * 3
    assert [w.qdata.data_ptr() for w in model.weights()] == places
    assert report.graphs == 1
    assert {(m.source, m.n, m.k) for m in report.matched} == {("packed tensor, tiles", N, K)}
    assert not report.refused
    assert not report.notes


@pytest.mark.parametrize("prepack", [True, False])
def test_on_a_cpu_nothing_is_tiled_unless_asked_for(prepack):
    model = Model()
    want = model(*inputs())
    assert torch.equal(compiled(model, prepack)(*inputs()), want)
    assert tiled(model) == [False] * 3


@pytest.fixture
def gpu(monkeypatch):
    """CPU weights pass for weights on a GPU."""
    monkeypatch.setattr(tile_inputs, "_on_gpu", lambda weight: True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.usefixtures("gpu")
def test_what_kernels_of_tiles_do_not_serve_stays_canonical(dtype, training):
    model, (x, ids) = Model().to(dtype), inputs()
    x = x.to(dtype).requires_grad_(training)
    want = model(x, ids)
    assert torch.equal(compiled(model, True)(x, ids), want)
    assert tiled(model) == [dtype == torch.float16 and not training] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("gpu")
@torch.no_grad()
def test_weights_of_fused_experts_are_tiled_too(dtype):
    """Their graph holds the parts of the weights, not the weights, which once stayed canonical for that."""
    model, x = Routed().to(dtype), tokens(5).to(dtype)
    want = model(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(model, True)(x), want)
    names = ("gate_proj", "up_proj", "down_proj")
    assert [is_tiled(getattr(model.experts, n).qdata) for n in names] == [dtype == torch.bfloat16] * 3


def test_memory_of_fused_experts_that_others_see_is_left_and_reported():
    model = Routed()
    state = model.experts.state_dict()
    want = model(tokens(5))
    with collect_reports() as report:
        torch.testing.assert_close(compiled(model)(tokens(5)), want)
    assert "the codes of experts.gate_proj share" in report.notes[0]
    assert not is_tiled(state["up_proj"].qdata)
    assert is_tiled(model.head.weight.qdata)


def test_another_value_of_the_option_is_refused():
    with pytest.raises(RuntimeError, match=r'option \'prepack\' must be True or False or "always", got "?\'?gpu'):
        compiled(Model(), "gpu")(*inputs())


def test_arguments_are_the_callers():
    weight, (x, _) = make_weight((N, K), dtype=torch.float32), inputs()
    run = compiled(lambda x, w: x @ w.t())
    assert torch.equal(run(x, weight), x @ weight.t())
    assert not is_tiled(weight.qdata)


@pytest.mark.parametrize("how", ["dict", "list", "functional_call"])
def test_arguments_in_containers_are_the_callers_too(how):
    """Only a bare argument was told from a parameter."""
    weight, (x, _) = make_weight((N, K), dtype=torch.float32), inputs()
    linear = nn.Linear(K, N, bias=False)
    calls = {
        "dict": (lambda x, p: x @ p["w"].t(), {"w": weight}),
        "list": (lambda x, p: x @ p[0].t(), [weight]),
        "functional_call": (lambda x, p: torch.func.functional_call(linear, p, x), {"weight": weight}),
    }
    run, given = calls[how]
    assert torch.equal(compiled(run)(x, given), x @ weight.t())
    assert not is_tiled(weight.qdata)


class OwnBuffers(nn.Module):
    """Hands its own buffers, which it may read as well, to the op."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads
        for name, shape in (("up", (E, 2 * K, K)), ("down", (E, K, K))):
            w = NVFP4Weight.from_dense(torch.randn(shape))
            for part in ("qdata", "block_scale", "global_scale"):
                self.register_buffer(f"{name}_{part}", getattr(w, part))

    def forward(self, x, ids, weights):
        up, down = (
            [getattr(self, f"{name}_{part}") for part in ("qdata", "block_scale", "global_scale")]
            for name in ("up", "down")
        )
        act, layout = "silu(g) * u", "concatenated"
        y = torch.ops.fx_nvfp4.moe(x, ids, weights, *([part] for part in up), *down, act, layout)
        return y + self.down_qdata[0, 0, 0] if self.reads else y


@pytest.mark.parametrize("reads", [False, True])
@torch.no_grad()
def test_buffers_that_a_module_gives_to_the_op_itself_stay(reads):
    """They were permuted: the module's own reads of them failed from then on, and its state dict fitted no other."""
    model = OwnBuffers(reads)
    call = torch.randn(3, K), torch.randint(0, E, (3, 2)), torch.rand(3, 2)
    state, want = {name: t.clone() for name, t in model.state_dict().items()}, model(*call)
    torch.testing.assert_close(compiled(model)(*call), want)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items() if t.dtype == torch.uint8)
    torch.testing.assert_close(model(*call), want)


def test_memory_that_others_see_is_left_and_reported():
    model = Model()
    state = model.state_dict()
    with collect_reports() as report:
        got = compiled(model)(*inputs())
    assert torch.equal(got, model(*inputs()))
    assert tiled(model) == [False] * 3
    assert len(report.notes) == 3
    assert "not in tiles: tile_: the codes of experts share their memory with 1 other tensor" in report.notes[0]
    assert torch.equal(state["b"].dequantize(), model.b.dequantize())


def test_weights_that_fill_no_tiles_stay_beside_those_that_do():
    model = Model()
    model.b = make_weight((N, K), dtype=torch.float32)[:8].clone()
    model.forward = lambda x, ids: (model.linear(x).sum(), x @ model.b.t())
    with collect_reports() as report:
        got = compiled(model)(*inputs())
    assert all(map(torch.equal, got, model.forward(*inputs())))
    assert tiled(model) == [False, True, False]
    assert [note.partition(",")[0] for note in report.notes] == ["not in tiles: prepack: model.b is [8"]


def test_numbers_of_tokens_stay_symbols_and_weights_none():
    model = Model()
    graphs = []
    with collect_reports() as report:
        run = compiled(model, dynamic=True)
        for tokens in (5, 9, 3):
            assert torch.equal(run(*inputs(tokens)), model(*inputs(tokens)))
            graphs.append(report.graphs)
    assert graphs == [1, 1, 1]
    assert tiled(model) == [True] * 3


def test_a_training_step_gives_the_gradient_of_the_canonical_layout():
    def gradient(prepack):
        torch._dynamo.reset()
        model, (x, ids) = Model(), inputs()
        x.requires_grad_()
        compiled(model, prepack)(x, ids).square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient("always"), gradient(False), rtol=1e-6, atol=1e-6)


def test_both_sides_of_a_graph_break_share_a_weight():
    model = Model()

    def broken(x, ids):
        y = model(x, ids)
        torch._dynamo.graph_break()
        return model(x + y.mean(), ids)

    want = broken(*inputs())
    run = compiled(broken, fullgraph=False)
    for _ in range(2):
        torch.testing.assert_close(run(*inputs()), want)
    assert tiled(model) == [True] * 3


def test_tied_weights_are_tiled_once():
    model = Model()
    model.head = nn.Linear(K, N)
    model.head.weight = model.linear.weight
    model.forward = lambda x, ids: model.linear(x) + model.head(x)
    want = model.forward(*inputs())
    assert torch.equal(compiled(model)(*inputs()), want)
    assert is_tiled(model.linear.weight.qdata)


# Graphs that are there already


@pytest.mark.parametrize("change", ["other graph", "tile_", "prepack"])
def test_a_graph_compiled_with_the_canonical_layout_is_compiled_again(change):
    model = Model()
    want = model(*inputs())
    with collect_reports() as report:
        run = compiled(model, prepack=False)
        run(*inputs())
        assert report.graphs == 1
        if change == "other graph":
            compiled(lambda *args: model(*args) * 2)(*inputs())
        elif change == "tile_":
            [w.tile_() for w in model.weights()]
        else:
            assert not fx_nvfp4.prepack(model).left
        before = report.graphs
        assert torch.equal(run(*inputs()), want)
        assert report.graphs == before + 1
        assert torch.equal(run(*inputs()), want)
        assert report.graphs == before + 1
    assert tiled(model) == [True] * 3


def test_layouts_may_change_to_and_fro():
    model, canonical = Model(), Model()
    run = compiled(model, prepack=False)
    want = run(*inputs())
    fx_nvfp4.prepack(model)
    assert torch.equal(run(*inputs()), want)
    model.load_state_dict(canonical.state_dict())  # keeps the layout
    assert torch.equal(run(*inputs()), want)
    model.load_state_dict(canonical.state_dict(), assign=True)
    assert tiled(model) == [False] * 3
    assert torch.equal(run(*inputs()), want)


def test_keys_of_caches_tell_the_layouts_apart():
    weight = make_weight()
    assert layout_key(weight) != layout_key(weight.tiled())
    assert weight._stable_hash_for_caching() != weight.tiled()._stable_hash_for_caching()
    assert weight.__tensor_flatten__()[1] != weight.tiled().__tensor_flatten__()[1]


def test_cached_artifacts_of_one_layout_do_not_serve_the_other(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    passes, call = [], backend.EmulationPass.__call__
    monkeypatch.setattr(backend.EmulationPass, "__call__", lambda *args: (passes.append(1), call(*args))[1])

    def run(prepack):
        torch._dynamo.reset()
        passes.clear()
        model = Model()
        want = model(*inputs())
        if prepack:
            fx_nvfp4.prepack(model)
        with torch.no_grad(), collect_reports() as report:
            got = torch.compile(model, backend="nvfp4_emu")(*inputs())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
        return len(passes), {m.source for m in report.matched}

    for passes_run in (1, 0):
        assert run(False) == (passes_run, {"packed tensor"})
        assert run(True) == (passes_run, {"packed tensor, tiles"})


def test_without_dynamo_around_it_the_backend_tiles_nothing():
    model, seen = Model(), []

    def keep(gm, example_inputs):
        seen.append((gm, example_inputs))
        return gm

    torch.compile(model, backend=keep, fullgraph=True)(*inputs())
    ((gm, example_inputs),) = seen
    with torch.no_grad():
        run = backend.nvfp4_emu(gm, example_inputs, options={"codegen": False, "prepack": "always"})
        (got,) = run(*example_inputs)
    assert torch.equal(got, model(*inputs()))
    assert tiled(model) == [False] * 3
