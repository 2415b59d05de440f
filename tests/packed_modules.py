"""Modules that hold one packed weight and spell its dequantisation, and what the backend makes of their products."""

import torch
from torch import nn

from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports

E, N, K = 8, 96, 64


class Packed(nn.Module):
    """Packed weights [*shape]; `body(module, *inputs)` is what the model computes with them."""

    def __init__(self, *shape, body):
        super().__init__()
        dense = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        scale = dense.abs().amax(dim=(-1, -2)) / nvfp4.TWO_LEVEL_MAX
        qdata, block_scale = nvfp4.quantize(dense, scale[..., None, None])
        for name, value in (("q", qdata), ("s", block_scale), ("g", scale)):
            self.register_buffer(name, value)
        self.register_buffer("table", torch.tensor(nvfp4.E2M1_VALUES))
        self.body = body

    def w(self, chosen=...):
        """The dequantised weight [*shape], or of the chosen experts alone."""
        q, s, g = self.q[chosen], self.s[chosen], self.g[chosen] if self.g.dim() else self.g
        values = self.table[torch.stack((q & 15, q >> 4), -1).flatten(-2).int()].unflatten(-1, (-1, 16))
        return (values * (s.float() * g[..., None, None]).unsqueeze(-1)).flatten(-2)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def x(*shape):
    """Activations, [5, K] unless told otherwise."""
    return torch.randn(*shape or (5, K), generator=torch.Generator().manual_seed(1))


def ran(model, *calls, tolerance=1e-5, **kwargs):
    """What was reported of a model that gives eager's numbers for each of the calls' inputs."""
    torch._dynamo.reset()  # what one model's inputs were makes no size of the next one's a symbol
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False, "lift": False}, **kwargs)
    with collect_reports() as report:
        for inputs in calls:
            got, want = run(*inputs), model(*inputs)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    return report


def matched(model, *calls, **kwargs):
    """The ops that took the place of a model's products; nothing is left."""
    report = ran(model, *calls, **kwargs)
    assert not report.refused, report
    return [m.op for m in report.matched]


def refused(model, *calls, **kwargs):
    """The reasons for a model of which nothing is emulated."""
    report = ran(model, *calls, **kwargs)
    assert not report.matched, report
    return " ".join(r.reason for r in report.refused)
