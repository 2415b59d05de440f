"""Every way to write a product with packed experts becomes one op, with the numbers of the model as it is written.

Each is run with a dynamic number of tokens, in one graph, and with its gradient, which keeps the weight packed too.
"""

import pytest
import torch
from packed_modules import E, K, N, Packed, matched, x
from torch.nn import functional as F

from fx_nvfp4.backend import collect_reports

IDS = torch.tensor([0, 3, 7, 1, 1])
PAIRS = torch.stack((IDS, IDS.flip(0)), 1)
TRIPLES = torch.stack((PAIRS[:3], PAIRS[2:]))
ENDS = torch.arange(2, 2 * E + 2, 2, dtype=torch.int32)


def einsum(spec):
    return lambda m, x: torch.einsum(spec, x, m.w())


# name -> (body, inputs, op unless it is the same for all)
ONE = {
    "linear with bias": (lambda m, x: F.linear(x, m.w(), torch.ones(N)), x(2, 3, K)),
    "w @ x": (lambda m, x: m.w() @ x.T, x()),
    "matrix times vector": (lambda m, x: m.w() @ x, x(K)),
    "addmv": (lambda m, x: torch.addmv(torch.ones(N), m.w(), x, beta=2, alpha=3), x(K)),
    "addmm, alpha and beta": (lambda m, x: torch.addmm(torch.ones(N), x, m.w().T, alpha=2, beta=0.5), x()),
    "addmm, beta of 0": (lambda m, x: torch.addmm(torch.full((N,), torch.nan), x, m.w().T, beta=0), x()),
    "bsd,nd->nbs": (einsum("bsd,nd->nbs"), x(2, 3, K)),
    "dt,nd->tn": (einsum("dt,nd->tn"), x(K, 5)),
    "inner": (lambda m, x: torch.inner(x, m.w()), x()),
    "one row": (lambda m, x: F.linear(x, m.w()[7:8]), x()),
}
ALL = {
    "td,end->ten": (einsum("td,end->ten"), x(), "linear"),
    "td,end->nte": (einsum("td,end->nte"), x(), "linear"),
    "td,end->ten, a part": (lambda m, x: torch.einsum("td,end->ten", x, m.w()[:, :48]), x(), "batched"),
    "td,end->ten, every other": (lambda m, x: torch.einsum("td,end->ten", x, m.w()[:, 1::2]), x(), "batched"),
    "td,egnd->tegn": (lambda m, x: torch.einsum("td,egnd->tegn", x, m.w().view(E, 2, 48, K)), x(), "linear"),
    "bsed,end->bsen": (einsum("bsed,end->bsen"), x(2, 3, E, K), "batched"),
    "det,end->etn": (einsum("det,end->etn"), x(K, E, 5), "batched"),
    "d,end->en": (einsum("d,end->en"), x(K), "linear"),
    "matmul, x has batches": (lambda m, x: x @ m.w().mT, x(2, E, 3, K), "batched"),
    "matmul, x is broadcast": (lambda m, x: x.unsqueeze(1) @ m.w().mT, x(2, 3, K), "batched"),
    "each expert twice": (lambda m, x: torch.bmm(x, m.w().repeat_interleave(2, 0).mT), x(2 * E, 5, K), "batched"),
    "w @ vector": (lambda m, x: m.w() @ x, x(K), "linear"),
    "baddbmm": (lambda m, x: torch.baddbmm(torch.ones(E, 1, N), x, m.w().mT, alpha=3), x(E, 5, K), "batched"),
    "some experts": (lambda m, x: torch.bmm(x, m.w()[2:6].mT), x(4, 5, K), "batched"),
    "every other expert": (lambda m, x: torch.bmm(x, m.w()[1::2].mT), x(4, 5, K), "batched"),
    "a row of each expert": (lambda m, x: F.linear(x, m.w()[:, 5]), x(), "linear"),
    "vmap": (lambda m, x: torch.vmap(lambda w, x: x @ w.T)(m.w(), x), x(E, 5, K), "batched"),
}
CHOSEN = {
    "td,tand->tan": (lambda m, x, i: torch.einsum("td,tand->tan", x, m.w()[i]), x(), PAIRS),
    "td,atnd->atn": (lambda m, x, i: torch.einsum("td,atnd->atn", x, m.w()[i.T]), x(), PAIRS),
    "tad,tand->tan": (lambda m, x, i: torch.einsum("tad,tand->tan", x, m.w()[i]), x(5, 2, K), PAIRS),
    "bsd,bsand->bsan": (
        lambda m, x, i: torch.einsum("bsd,bsand->bsan", x, m.w()[i]),
        x(2, 3, K),
        PAIRS[:3].repeat(2, 1, 1),
    ),
    "a part": (lambda m, x, i: torch.einsum("td,tand->tan", x, m.w()[i][:, :, 48:]), x(), PAIRS),
    "a part of what is chosen": (lambda m, x, i: torch.einsum("td,tand->tan", x, m.w()[:, ::2][i]), x(), PAIRS),
    "every other row": (lambda m, x, i: torch.bmm(m.w()[i][:, 1::2], x[:, :, None]), x(), IDS),
    "same slots for all": (lambda m, x, i: torch.einsum("td,and->tan", x, m.w()[i]), x(), IDS[:3]),
    "flattened with rows": (lambda m, x, i: torch.bmm(m.w().view(E * N, K).view(E, N, K)[i], x[:, :, None]), x(), IDS),
    "several rows a batch": (lambda m, x, i: torch.bmm(x, m.w()[i].mT), x(5, 3, K), IDS),
    "w @ column": (lambda m, x, i: m.w()[i] @ x[:, None, :, None], x(), PAIRS),
    "vmap": (lambda m, x, i: torch.vmap(lambda x, i: m.w()[i] @ x)(x, i), x(), IDS),
}
GROUPS = {
    "offs": lambda m, x, offs: F.grouped_mm(x, m.w().bfloat16().mT, offs=offs),
    "out_dtype": lambda m, x, offs: F.grouped_mm(x, m.w().bfloat16().mT, offs=offs, out_dtype=torch.bfloat16),
    "weight on the left": lambda m, x, offs: F.grouped_mm(m.w().bfloat16(), x.mT, offs=offs),
    "half of the rows": lambda m, x, offs: F.grouped_mm(x, m.w()[:, 48:].bfloat16().mT, offs=offs),
}


def of_tokens(inputs, count):
    """Inputs for `count` tokens instead of 5, along whichever dimension they are."""
    return [t if 5 not in t.shape else t.index_select(t.shape.index(5), torch.arange(count) % 5) for t in inputs]


def gradient(y, x):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad(y, x, cotangent)[0]


def check(model, inputs, op):
    torch._dynamo.reset()
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False})
    with collect_reports() as report:
        for count in (5, 7):
            h, *routing = of_tokens(inputs, count)
            h.requires_grad_()
            for t in (h, *routing):
                if count in t.shape:
                    torch._dynamo.mark_dynamic(t, t.shape.index(count))
            got, want = run(h, *routing), model(h, *routing)
            for a, b in ((got, want), (gradient(got, h), gradient(want, h))):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert not report.refused, report
    assert not report.notes
    assert [m.op for m in report.matched] == [op, "input_grad"]


@pytest.mark.in_part(3)
@pytest.mark.parametrize("name", ONE)
def test_one_weight(name):
    body, inputs = ONE[name]
    check(Packed(N, K, body=body), (inputs,), "linear")


@pytest.mark.in_part(6)
@pytest.mark.parametrize("name", ALL)
def test_all_experts(name):
    body, inputs, op = ALL[name]
    check(Packed(E, N, K, body=body), (inputs,), op)


@pytest.mark.in_part(6)
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_experts(name):
    body, *inputs = CHOSEN[name]
    check(Packed(E, N, K, body=body), inputs, "indexed")


@pytest.mark.in_part(2)
@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    model = Packed(E, N, K, body=GROUPS[name])
    assert matched(model, (x(2 * E, K).bfloat16(), ENDS), tolerance=2**-6) == ["grouped"]
