"""Packed weights where Dynamo ends a graph: outside of graphs, and as views that one graph hands to the next.

Dynamo would trace the Python behind every operation on a tensor subclass as frames of their own, and a graph that
returns a view of its input asks for it by strides, which packed weights do not have.
"""

import pytest
import torch
from test_torchao import make as make_torchao
from torch import nn

from fx_nvfp4 import NVFP4Weight

E, N, K = 4, 128, 64


def make(kind):
    weight = make_torchao((E, N, K)).data
    return nn.Parameter(NVFP4Weight.from_torchao(weight) if kind == "ours" else weight, requires_grad=False)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="nvfp4_emu", options={"codegen": False}, **options)


class HitExperts(nn.Module):
    """Runs the experts that some token chose, as transformers' eager loop does."""

    def __init__(self, kind):
        super().__init__()
        self.up = make(kind)

    def forward(self, x, ids):
        y = x.new_zeros(len(x), N)
        for e in range(E):
            hit = (ids == e).nonzero()[:, 0]
            if hit.numel():
                w = self.up[e]
                y[hit] = x[hit] @ w.T
        return y


@pytest.mark.parametrize("kind", ["ours", "torchao"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_loop_over_hit_experts(kind, dynamic, context):
    model = HitExperts(kind)
    run = compiled(model, dynamic=dynamic)
    with context():
        for ids in (torch.tensor([0, 1, 3, 3, 1, 0]), torch.tensor([0, 1, 0, 2, 2, 0, 1, 1])):
            x = torch.randn(len(ids), K)
            want = torch.stack([t @ model.up[int(e)].dequantize().T for t, e in zip(x, ids, strict=True)])
            torch.testing.assert_close(run(x, ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ours", "torchao"])
def test_loop_whose_token_counts_are_traced_is_one_graph(kind):
    weight, x, ids = make(kind), torch.randn(6, K), torch.tensor([0, 1, 3, 3, 1, 0])

    def run(x, ids):
        y = x.new_zeros(len(x), N)
        for e in range(E):
            hit = (ids == e).nonzero()[:, 0]
            y = y.index_add(0, hit, x[hit] @ weight[e].T)
        return y

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        got = compiled(run, fullgraph=True)(x, ids)
    torch.testing.assert_close(got, run(x, ids), rtol=1e-4, atol=1e-4)


VIEWS = {
    "one": lambda w: w[1],
    "chosen": lambda w: w[torch.tensor([1, 2])],
    "rows": lambda w: w[:, : N // 2],
    "transposed": lambda w: w.mT,
    "itself, detached": lambda w: w.detach(),
}


@pytest.mark.in_part(5)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["ours", "torchao"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_survives_the_end_of_a_graph(name, kind, context):
    if (name, kind, context) == ("itself, detached", "torchao", torch.inference_mode):
        pytest.skip("torchao itself cannot")
    weight, x = make(kind), torch.randn(3, K)

    def run(x):
        view = VIEWS[name](weight)
        torch._dynamo.graph_break()
        return x @ (view if view.shape[-2] == K and name == "transposed" else view.transpose(-2, -1))

    with context():
        torch.testing.assert_close(compiled(run)(x), run(x), rtol=1e-4, atol=1e-4)
