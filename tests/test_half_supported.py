"""The report of a model of which half is NVFP4: every site that is skipped is named, with its reason and a way out.

One layer for each kind of skipping: other formats, damaged tables, uses that are no product, branches of control
flow, a graph break in front of a product, and experts that nobody calls.
"""

import pytest
import torch
from spellings import E2M1, by_blocks, lookup, packed
from test_near_misses import NF4, ONE_PERCENT, integers
from torch import nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight

N = K = 64


def packed_linear():
    return nn.Parameter(NVFP4Weight.from_dense(torch.randn(N, K) * 0.1), requires_grad=False)


class Spelled(nn.Module):
    """A linear layer that spells how its weight is dequantised."""

    def __init__(self, decode=lookup, block=16, scales=torch.float8_e4m3fn, use=F.linear):
        super().__init__()
        qdata, scale = packed(N, K)
        if block != 16:
            scale = scale[:, : K // block].contiguous()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale.float().to(scales))
        self.block, self.decode, self.use = block, decode, use

    def weight(self):
        scale = self.scale.float().unsqueeze(-1)
        return (self.decode(self.qdata).unflatten(-1, (-1, self.block)) * scale).flatten(-2)

    def forward(self, x):
        return self.use(x, self.weight())


class Explicit(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = packed_linear()

    def forward(self, x):
        return x * self.weight.dequantize().sum()


class Branch(Spelled):
    """Its weight is a near miss in one branch of control flow: a graph of its own."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: F.linear(x, self.weight()), lambda x: x.clone(), (x,))


class Hidden(nn.Module):
    """A line that no graph can hold, right at the product."""

    def __init__(self):
        super().__init__()
        self.weight = packed_linear()

    def forward(self, x):
        x = x + 1
        return self.product(x)

    @torch.compiler.disable
    def product(self, x):
        return x @ self.weight.T


class Experts(nn.Module):
    """The second expert is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = packed_linear(), packed_linear()

    def forward(self, x):
        return x @ self.first.T


class HalfSupported(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "good": Spelled(),
                "experts": Experts(),
                "mxfp4": Spelled(block=32, scales=torch.float8_e8m0fnu),
                "block32": Spelled(block=32),
                "int4": Spelled(decode=integers),
                "nf4": Spelled(decode=lambda q: lookup(q, torch.tensor(NF4))),
                "table": Spelled(decode=lambda q: lookup(q, torch.tensor(ONE_PERCENT))),
                "scales": Spelled(scales=torch.float32),
                "dense": Spelled(use=lambda x, w: x * w.sum(0)),
                "explicit": Explicit(),
                "branch": Branch(decode=integers),
                "last": Spelled(),
                **{name: layer() for name, layer in more.items()},
            }
        )

    def forward(self, x):
        for layer in self.layers.values():
            x = x + layer(x)
        return x


# layer -> what its refusal says
SKIPPED = {
    "mxfp4": "scale is e8m0: MXFP4; block of 32",
    "block32": "block of 32, NVFP4 has 16",
    "int4": "codes are int4 (two's complement), not E2M1",
    "nf4": "codes are NF4, not E2M1",
    "table": "table entry 5 is 3.03, NVFP4 has 3.0",
    "scales": "block scale is float32",
    "dense": "an NVFP4 weight is dequantised for aten.sum",
    "explicit": "the packed weight [64, 64] is dequantised for aten.sum",
    "branch": "codes are int4",
    "experts.second": "no compiled graph uses this packed weight [64, 64]",
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def refusals(report):
    return {r.where.removeprefix("layers."): r for r in report.refused}


def check(report, skipped):
    found = refusals(report)
    assert found.keys() == skipped.keys()
    for name, reason in skipped.items():
        assert reason in found[name].reason, f"{name}: {found[name]}"
        assert found[name].advice, name
    text = str(report)
    assert all(f"refused: layers.{name}" in text for name in skipped)


def test_every_skipped_site_is_named_with_its_reason():
    x = torch.randn(5, K)
    torch._dynamo.mark_dynamic(x, 0)  # the test of graph breaks has static sizes
    with torch.no_grad():
        report = fx_nvfp4.explain(HalfSupported(), x)
    check(report, SKIPPED)
    assert sorted(m.where for m in report.matched) == ["layers.experts", "layers.good", "layers.last"]
    assert (report.graphs, report.breaks) == (1, [])


def test_a_graph_break_in_the_middle_hides_nothing_else():
    # Dynamo then compiles layer by layer, and each graph begins at its own layer: names are still those of the model.
    with torch.no_grad():
        report = fx_nvfp4.explain(HalfSupported(hidden=Hidden), torch.randn(5, K))
    check(report, SKIPPED | {"hidden.weight": "no compiled graph uses this packed weight [64, 64]"})
    assert {"layers.experts", "layers.good", "layers.last"} <= {m.where for m in report.matched}
    (hides,) = [b for b in report.breaks if b.hides]
    assert hides.hides == ("layers.hidden.weight",)
    assert hides.file.endswith("test_half_supported.py")
    assert hides.code == "return self.product(x)"
    assert "torch.compiler.disable" in hides.reason
    assert f"{hides.file}:{hides.line}" in refusals(report)["hidden.weight"].advice


def test_the_formats_of_this_model_are_what_they_are_called():
    # A layer whose weight were NVFP4 after all, or garbage, would be refused for another reason than its own.
    model = HalfSupported().layers
    good = model["good"]
    assert torch.equal(good.weight(), by_blocks(lookup(good.qdata), good.scale.float()))
    assert sorted(set(model["int4"].decode(model["int4"].qdata).unique().tolist())) == list(range(-8, 8))
    assert sorted({abs(v) for v in E2M1} - {3.0}) == sorted({abs(v) for v in ONE_PERCENT} - {3.03, 3.0})
