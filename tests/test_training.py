"""Training with packed weights that stay frozen: gradients equal eager's, and nothing dense is made or saved.

Guarded here: activations, adapters beside linears and experts, a router trained through the routing weights, biases and
norms; spelled dequantisation and NVFP4Weight; checkpointed blocks; dynamic token counts; products that a model itself
takes over the rows of a weight; scales that are trained.
"""

import math

import pytest
import spelled_models
import torch
from fx_nvfp4.passes.nodes import hint
from spelled_models import EXPERTS, HIDDEN, INTERMEDIATE, STYLES, TOP_K, SpelledMoE
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.lowering import compat

# The grouped product of torch is bfloat16 alone when compiled.
FP32_STYLES = [style for style in STYLES if style != "grouped"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Graphs:
    """What the graphs hold that run forward and backward: their ops, and the size of the largest float tensor.

    What the forward graph keeps for the backward one is a tensor of both.
    """

    def __init__(self, monkeypatch):
        self.largest, self.targets = 0, []
        plain = compat._run_as_it_is

        def record(gm, example_inputs, **settings):
            for node in gm.graph.nodes:
                value = node.meta.get("val")
                if node.op != "output" and isinstance(value, torch.Tensor) and value.is_floating_point():
                    self.largest = max(self.largest, math.prod(map(hint, value.shape)))
                self.targets.append(node.target)
            return plain(gm, example_inputs, **settings)

        monkeypatch.setattr(compat, "_run_as_it_is", record)


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def compiled(model, **kwargs):
    options = {"codegen": False, "lift": False, **kwargs.pop("options", {})}
    return torch.compile(model, backend="nvfp4_emu", fullgraph=True, options=options, **kwargs)


def gradients(run, x, parameters):
    """Output and gradients of x and of the parameters, for a loss that weighs every output differently."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    found = torch.autograd.grad((y * seed).sum(), [x, *parameters])
    assert all(g.abs().max() > 0 for g in found)
    return [y, *found]


def assert_close(got, want, bound):
    for g, w in zip(got, want, strict=True):
        assert (g - w).float().abs().max() <= bound * w.float().abs().max()


def ops_of(report):
    return sorted(m.op for m in report.matched)


class Adapted(SpelledMoE):
    """The spelled layer with what people train beside it: a router, a low-rank adapter, a norm, a bias.

    The adapter is shared by all experts, so that it can stand beside any style of product.
    """

    def __init__(self, style, dtype=torch.float32):
        super().__init__(style, dtype)
        generator = torch.Generator().manual_seed(7)

        def parameter(*shape):
            return nn.Parameter((torch.randn(*shape, generator=generator) * 0.1).to(dtype))

        self.norm, self.bias = nn.RMSNorm(HIDDEN, dtype=dtype), parameter(HIDDEN)
        self.lora_a, self.lora_b = parameter(4, HIDDEN), parameter(HIDDEN, 4)

    def forward(self, x):
        h = self.norm(x)
        return x + super().forward(h) + self.bias + h @ self.lora_a.T @ self.lora_b.T

    def trained(self):
        """Parameters that the style's output depends on: the plain linear style does not route."""
        return [p for n, p in self.named_parameters() if n != "router" or self.style != "linear"]


@pytest.mark.in_part(2)
@pytest.mark.parametrize("style", FP32_STYLES)
def test_gradients_are_those_of_eager_and_nothing_dense_is_made(style, graphs):
    model = Adapted(style)
    x = spelled_models.tokens(9, torch.float32)
    with collect_reports() as report:
        got = gradients(compiled(model), x, model.trained())
    assert_close(got, gradients(model, x, model.trained()), 2e-5)
    assert ops_of(report) == sorted([STYLES[style], "input_grad"] * 2)
    assert not report.refused
    assert not report.notes
    assert "4 NVFP4 products (2 of them gradients)" in str(report)
    assert graphs.largest < model.down_qdata.numel()


@pytest.mark.in_part(3)
@pytest.mark.parametrize("style", STYLES)
def test_gradients_in_bfloat16(style, graphs):
    model = Adapted(style, torch.bfloat16)
    x = spelled_models.tokens(9, torch.bfloat16)
    with collect_reports() as report:
        got = gradients(compiled(model), x, model.trained())
    assert_close(got, gradients(model, x, model.trained()), 2**-5)
    assert ops_of(report) == sorted([STYLES[style], "input_grad"] * 2)
    assert graphs.largest < model.down_qdata.numel()


@pytest.mark.in_part(2)
@pytest.mark.parametrize("style", FP32_STYLES)
def test_dynamic_token_counts(style, graphs):
    model = Adapted(style)
    run = compiled(model, dynamic=True)
    for tokens in (7, 12, 33, 3):
        x = spelled_models.tokens(tokens, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=tokens != 7):
            got = gradients(run, x, model.trained())
        assert_close(got, gradients(model, x, model.trained()), 2e-5)


@pytest.mark.parametrize("style", ["linear", "einsum"])  # a plain product, and one whose rewriting adds views
def test_checkpointed_blocks_are_computed_again(style, graphs):
    model = Adapted(style)

    def run(x):
        return checkpoint(model, checkpoint(model, x, use_reentrant=False), use_reentrant=False)

    x = spelled_models.tokens(6, torch.float32)
    with collect_reports() as report:
        got = gradients(compiled(run), x, model.trained())
    assert_close(got, gradients(run, x, model.trained()), 1e-4)
    assert ops_of(report).count("input_grad") == 4
    # Forward and backward graph each hold the forward products.
    op = getattr(torch.ops.fx_nvfp4, STYLES[style]).default
    assert graphs.targets.count(op) > 4
    assert graphs.largest < model.down_qdata.numel()


class Packed(nn.Module):
    """A linear [N, K], and gate_up and down experts, as NVFP4Weight parameters; LoRA beside all of them."""

    def __init__(self, style, dtype=torch.float32, activations="none"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator) * 0.1

        def packed(*shape):
            scale = torch.tensor(0.003, dtype=torch.float64) if activations == "static" else None
            weight = NVFP4Weight.from_dense(randn(*shape).to(dtype), activations=activations, act_scale=scale)
            return nn.Parameter(weight, requires_grad=False)

        self.style = style
        self.dense = packed(HIDDEN, HIDDEN)
        self.up, self.down = packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN), packed(EXPERTS, HIDDEN, INTERMEDIATE)
        self.router = nn.Parameter(randn(EXPERTS, HIDDEN).to(dtype))
        self.lora_a = nn.Parameter(randn(EXPERTS, 4, HIDDEN).to(dtype))
        self.lora_b = nn.Parameter(randn(EXPERTS, 2 * INTERMEDIATE, 4).to(dtype))
        self.bias = nn.Parameter(randn(EXPERTS, HIDDEN).to(dtype))

    def forward(self, x):
        x = F.linear(x, self.dense)
        weights, ids = F.linear(x, self.router).softmax(dim=-1).topk(TOP_K, dim=-1)
        y = getattr(self, self.style)(x.repeat_interleave(TOP_K, dim=0), ids.flatten())
        return (y.view(*ids.shape, HIDDEN) * weights.unsqueeze(-1)).sum(dim=1)

    def experts(self, rows, product, chosen):
        """Rows through the experts of `product(rows, weight)`, with each expert's own adapter."""
        adapter = torch.bmm(self.lora_b[chosen], self.lora_a[chosen] @ rows.unsqueeze(-1)).squeeze(-1)
        gate, up = (product(rows, self.up) + adapter).chunk(2, dim=-1)
        return product(F.silu(gate) * up, self.down) + self.bias[chosen]

    def batched(self, rows, ids):
        return self.experts(rows, lambda r, w: torch.bmm(w[ids], r.unsqueeze(-1)).squeeze(-1), ids)

    def grouped(self, rows, ids):
        ids, order = ids.sort()
        offs = F.one_hot(ids, EXPERTS).sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        y = self.experts(rows[order], lambda r, w: F.grouped_mm(r, w.transpose(1, 2), offs=offs), ids)
        return torch.empty_like(y).index_copy(0, order, y)

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


@pytest.mark.in_part(3)
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("style", ["batched", "grouped"])
def test_packed_parameters(style, activations, graphs):
    """Rounding of activations counts as the identity, as in quantisation-aware training."""
    dtype, bound = (torch.bfloat16, 2**-5) if style == "grouped" else (torch.float32, 2e-5)
    model, x = Packed(style, dtype, activations), spelled_models.tokens(9, dtype)
    with collect_reports() as report:
        got = gradients(compiled(model), x, model.trained())
    assert_close(got, gradients(model, x, model.trained()), bound)
    forward = "indexed" if style == "batched" else "grouped"
    assert ops_of(report) == sorted(["linear", forward, forward, "input_grad", "input_grad", "input_grad"])
    assert not report.refused
    assert graphs.largest < model.down.qdata.numel()


def test_gradients_of_packed_parameters_are_those_of_dense_ones():
    """The truth of the test above: autograd on the dequantised weights."""
    model, x = Packed("batched"), spelled_models.tokens(9, torch.float32)
    got = gradients(compiled(model), x, model.trained())
    for name in ("dense", "up", "down"):
        setattr(model, name, nn.Parameter(getattr(model, name).dequantize(), requires_grad=False))
    assert_close(got, gradients(model, x, model.trained()), 2e-5)


def test_packed_parameters_stay_frozen():
    model, x = Packed("batched"), spelled_models.tokens(3, torch.float32)
    with pytest.raises(RuntimeError, match="frozen"):
        model.up.requires_grad_()
    compiled(model)(x).sum().backward()
    assert model.up.grad is None
    assert model.router.grad is not None


def test_an_optimiser_trains_through_packed_weights():
    model, x = Packed("batched"), spelled_models.tokens(16, torch.float32)
    target = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.1
    codes = model.up.qdata.clone()
    optimizer, run = torch.optim.Adam(model.trained(), lr=0.02), compiled(model)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.up.qdata, codes)


# Products that a model itself takes over the rows, or in another form of the backward pass


class Spelled(nn.Module):
    """Packed weights [*shape] with a global scale per expert; `body(module, *inputs)` uses `module.w()`."""

    def __init__(self, *shape, body, dtype=torch.float32):
        super().__init__()
        dense = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        scale = dense.abs().amax(dim=(-1, -2)) / nvfp4.TWO_LEVEL_MAX
        qdata, block_scale = nvfp4.quantize(dense, scale[..., None, None])
        self.q, self.s, self.table = (nn.Buffer(t) for t in (qdata, block_scale, torch.tensor(nvfp4.E2M1_VALUES)))
        self.g, self.body, self.dtype = nn.Parameter(scale, requires_grad=False), body, dtype

    def w(self):
        values = self.table[torch.stack((self.q & 15, self.q >> 4), -1).flatten(-2).int()].unflatten(-1, (-1, 16))
        return (values * (self.s.float() * self.g[..., None, None]).unsqueeze(-1)).flatten(-2).to(self.dtype)

    def forward(self, *inputs):
        return self.body(self, *inputs)


E, N, K = 8, 96, 64


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


OVER_ROWS = {
    "mm": (lambda m, g: g @ m.w(), (N, K), (x(5, N),)),
    "leading dims": (lambda m, g: g @ m.w(), (N, K), (x(2, 3, N),)),
    "weight on the left": (lambda m, g: m.w().T @ g, (N, K), (x(N, 5),)),
    "addmm": (lambda m, g, b: torch.addmm(b, g, m.w()), (N, K), (x(5, N), x(K))),
    "one expert": (lambda m, g: g @ m.w()[3], (E, N, K), (x(5, N),)),
    "part of the rows": (lambda m, g: g @ m.w()[32:64], (N, K), (x(5, 32),)),
    "part of an expert's rows": (lambda m, g: torch.bmm(g, m.w()[:, 32:64]), (E, N, K), (x(E, 5, 32),)),
    "all experts side by side": (lambda m, g: g @ m.w().flatten(0, 1), (E, N, K), (x(5, E * N),)),
    "bmm": (lambda m, g: torch.bmm(g, m.w()), (E, N, K), (x(E, 5, N),)),
    "bmm, weight on the left": (lambda m, g: torch.bmm(m.w().mT, g), (E, N, K), (x(E, N, 5),)),
    "gathered": (lambda m, g, i: torch.bmm(g, m.w()[i]), (E, N, K), (x(4, 3, N), torch.tensor([7, 0, -1, 7]))),
    "einsum of chosen experts": (
        lambda m, g, i: torch.einsum("tan,tand->td", g, m.w()[i]),
        (E, N, K),
        (x(5, 2, N), torch.tensor([[0, 1], [7, 7], [3, -1], [2, 0], [5, 6]])),
    ),
}


@pytest.mark.in_part(3)
@pytest.mark.parametrize("name", OVER_ROWS)
def test_products_over_the_rows(name):
    """In the forward graph they are the same op, and their own gradient is a product over K."""
    body, shape, inputs = OVER_ROWS[name]
    model = Spelled(*shape, body=body)
    with collect_reports() as report, torch.no_grad():
        got = compiled(model)(*inputs)
    assert [m.op for m in report.matched] == ["input_grad"]
    assert not report.refused
    torch.testing.assert_close(got, model(*inputs), rtol=1e-5, atol=1e-4)
    with collect_reports() as report:
        got = gradients(compiled(lambda g: model(g, *inputs[1:])), inputs[0], [])
    assert sorted(m.op for m in report.matched) != ["input_grad"] * 2
    assert len(report.matched) == 2
    assert_close(got, gradients(lambda g: model(g, *inputs[1:]), inputs[0], []), 2e-5)


def test_grouped_products_over_the_rows():
    """Stored [E, K, N], as gradients have it, also with empty groups and rows of nobody."""
    model = Spelled(E, N, K, body=lambda m, g, offs: F.grouped_mm(g, m.w(), offs=offs), dtype=torch.bfloat16)
    g, offs = x(20, N).bfloat16(), torch.tensor([0, 4, 4, 9, 9, 15, 15, 18], dtype=torch.int32)
    with collect_reports() as report, torch.no_grad():
        got = compiled(model)(g, offs)
    assert [m.op for m in report.matched] == ["input_grad"]
    assert_close([got[:18]], [model(g, offs)[:18]], 2**-7)


def test_transformers_grouped_product_in_float32():
    """Its backward op returns the gradient of the weight too, dense: it must not even be computed."""
    pytest.importorskip("transformers.integrations.moe")
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this transformers loops over the groups in Python to differentiate, which no compiler traces")
    fallback = torch.ops.transformers.grouped_mm_fallback
    model = Spelled(E, N, K, body=lambda m, h, offs: fallback(h, m.w().mT, offs))
    offs = torch.tensor([0, 4, 4, 9, 9, 15, 15, 18], dtype=torch.int32)
    run = lambda h: model(h, offs)  # noqa: E731
    with collect_reports() as report:
        got = gradients(compiled(run), x(18, K), [])
    assert ops_of(report) == ["grouped", "input_grad"]
    assert not report.notes
    assert_close(got, gradients(run, x(18, K), []), 2e-5)


def test_scales_can_be_trained():
    """Their gradients need the dense codes, which then stay in the graph beside the ops."""
    model = Spelled(N, K, body=lambda m, h: F.linear(h, m.w()))
    model.g.requires_grad_()
    with collect_reports() as report:
        got = gradients(compiled(model), x(5, K), [model.g])
    assert ops_of(report) == ["input_grad", "linear"]
    assert not report.refused
    assert_close(got, gradients(model, x(5, K), [model.g]), 2e-5)


def test_a_part_of_k_over_the_rows_is_refused():
    model = Spelled(N, K, body=lambda m, g: g @ m.w()[:, :32])
    with torch.no_grad(), collect_reports() as report:
        got = compiled(model)(x(5, N))
    assert not report.matched
    assert report.refused
    torch.testing.assert_close(got, model(x(5, N)))
