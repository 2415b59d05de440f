"""explain() on models as they come: compiled or not, functions, broken graphs, layers that share one.

What it names, it names as the model does, whichever function Dynamo's graph began at.
"""

import pytest
import torch
from torch import nn

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.report import GraphBreak

K = 32


def packed(*shape):
    return nn.Parameter(NVFP4Weight.from_dense(torch.randn(*shape) * 0.1), requires_grad=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = packed(4, 2 * K, K), packed(4, K, K)

    def forward(self, x, ids):
        h = torch.bmm(self.gate_up[ids], x.unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        return torch.bmm(self.down[ids], (nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)


class DisabledExperts(Experts):
    forward = torch.compiler.disable(Experts.forward)


class Layer(nn.Module):
    def __init__(self, experts=Experts):
        super().__init__()
        self.experts, self.router = experts(), nn.Linear(K, 4)

    def forward(self, x):
        return x + self.experts(x, self.router(x).argmax(dim=-1))


class Model(nn.Module):
    def __init__(self, *experts):
        super().__init__()
        self.layers = nn.ModuleList([Layer(e) for e in experts])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class BreaksBetweenLayers(Model):
    """Dynamo skips a function that breaks in a loop, and compiles the layers one by one: equal ones share a graph."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.isnan().any():
                break
        return x


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def explained(model, *args):
    return fx_nvfp4.explain(model, *(args or (torch.randn(6, K),)))


def weights(*layers):
    return {f"layers.{i}.experts.{name}" for i in layers for name in ("gate_up", "down")}


def test_layers_that_share_a_graph_are_all_listed():
    model = BreaksBetweenLayers(Experts, Experts, Experts)
    report = explained(model)
    assert report.weights == weights(0, 1, 2)
    assert not report.refused
    assert {m.where for m in report.matched} == {f"layers.{i}.experts" for i in range(3)}
    assert "layers.{0..2}.experts  3      moe" in str(report)
    (found,) = report.breaks
    assert found.code == "if x.isnan().any():"
    assert found.file.endswith("test_explain.py")
    assert found.line == BreaksBetweenLayers.forward.__code__.co_firstlineno + 3
    assert "Data-dependent branching" in found.reason
    assert "runs uncompiled" in found.reason
    assert found.hints
    assert not found.hides


def test_the_break_that_hides_a_weight_is_named_with_its_line():
    report = explained(Model(Experts, DisabledExperts, DisabledExperts))
    assert report.weights == weights(0)
    assert {r.where for r in report.refused} == weights(1, 2)
    (found,) = [b for b in report.breaks if b.hides]
    assert set(found.hides) == weights(1, 2)
    assert found.code == "return x + self.experts(x, self.router(x).argmax(dim=-1))"
    assert all(f"{found.file}:{found.line}" in r.advice for r in report.refused)
    text = str(report)
    assert "it hides layers.{1..2}.experts.gate_up, layers.{1..2}.experts.down" in text
    assert "hint: Remove the `torch.compiler.disable` call" in text


def test_a_break_elsewhere_hides_nothing():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.never = Model(Experts), Experts()

        def forward(self, x):
            return self.model(x)

    def broken(self, x):
        torch._dynamo.graph_break()
        return Layer.forward(self, x)

    model = Calls()
    model.model.layers[0].forward = broken.__get__(model.model.layers[0])
    report = explained(model)
    assert {r.where for r in report.refused} == {"never.gate_up", "never.down"}
    assert all("did not call it" in r.advice for r in report.refused)
    assert not any(b.hides for b in report.breaks)


def test_layers_past_the_recompilation_limit_are_told_from_layers_that_nobody_calls():
    class Numbered(Layer):
        number = 0

        def forward(self, x):
            return super().forward(x) + self.number

    model = BreaksBetweenLayers(*[Experts] * 4)
    for i in range(4):
        layer = Numbered()
        layer.number = i  # Dynamo compiles the layer anew for each
        model.layers[i] = layer
    with torch._dynamo.config.patch(recompile_limit=2):
        report = explained(model)
    assert report.weights == weights(0, 1)
    assert {r.where for r in report.refused} == weights(2, 3)
    (found,) = [b for b in report.breaks if b.hides]
    assert set(found.hides) == weights(2, 3)
    assert found.code == "def forward(self, x):"
    assert "compiled 2 times" in found.reason
    assert "number" in found.reason
    assert "recompile_limit" in found.hints[0]


def test_breaks_are_told_again_at_the_next_call():
    # Dynamo shortens the message of a break that it has told of before.
    model = Model(Experts, DisabledExperts)
    assert explained(model).breaks == explained(model).breaks != []


def test_dynamos_log_is_as_it_was():
    import logging

    names = "torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame"
    logs = [logging.getLogger(name) for name in names]
    before = [(log.level, log.propagate, list(log.handlers)) for log in logs]
    explained(Model(DisabledExperts))
    assert [(log.level, log.propagate, list(log.handlers)) for log in logs] == before


def compiled_whole(model):
    return torch.compile(model, backend="nvfp4_emu")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_inside(model):
    model.layers[0].experts.compile(backend="eager")
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled_whole, compiled_in_place, compiled_forward, compiled_inside])
def test_a_compiled_model_is_explained_like_any_other_and_stays_compiled(how):
    plain = Model(Experts, Experts)
    model = how(plain)
    forward = vars(plain).get("forward")
    report = explained(model)
    assert report.weights == weights(0, 1)
    assert not report.refused
    assert vars(plain).get("forward") is forward
    assert how is not compiled_in_place or plain._compiled_call_impl is not None


def test_a_method_that_is_disabled_stays_disabled():
    model = Model(Experts, Experts)
    model.layers[0].experts.forward = torch.compiler.disable(model.layers[0].experts.forward)
    report = explained(model)
    assert report.weights == weights(1)
    assert {r.where for r in report.refused} == weights(0)


def test_functions_and_methods_are_explained():
    model = Model(Experts, Experts)
    assert explained(model.forward).weights == weights(0, 1)
    assert explained(torch.compile(model.forward, backend="eager")).weights == weights(0, 1)
    assert len(explained(lambda x: model.layers[1](x)).matched) == 2


def test_torchaos_packed_parameters_are_found_used_or_not():
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    model = nn.ModuleDict({name: nn.Linear(K, K, bias=False, dtype=torch.bfloat16) for name in ("used", "unused")})
    for linear in model.values():
        linear.weight = nn.Parameter(NVFP4Tensor.to_nvfp4(linear.weight.detach()), requires_grad=False)
    model.forward = lambda x: model["used"](x)
    report = explained(model, torch.randn(6, K, dtype=torch.bfloat16))
    assert [m.weight for m in report.matched] == ["used.weight"]
    assert [r.where for r in report.refused] == ["unused.weight"]


def test_inference_mode():
    model = Model(Experts)
    with torch.inference_mode():
        assert explained(model).weights == weights(0)


def test_unused_bytes_beside_block_scales_are_packed_weights_too():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(8, 16, dtype=torch.uint8))
            self.register_buffer("scale", torch.zeros(8, 2, dtype=torch.float8_e4m3fn))
            self.register_buffer("image", torch.zeros(3, 16, 16, dtype=torch.uint8))

        def forward(self, x):
            return x + 1

    (refusal,) = explained(Spelled()).refused
    assert refusal.where == "codes"
    assert "no compiled graph uses this packed weight [8, 16]" in refusal.reason


def test_a_report_without_breaks_reads_as_before():
    report = explained(Model(Experts))
    assert report.breaks == []
    assert "graph break" not in str(report)
    assert str(GraphBreak("a.py", 3, "", "why")) == "a.py:3: why"
