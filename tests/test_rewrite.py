"""The backend end to end on products that were, or might be, rewritten wrongly: same numbers as eager, and what ran.

Guarded here: symbols among indices and sizes, negative ids, one token, one expert, one row.
"""

from collections import Counter

import pytest
import spelled_models
import torch
from packed_modules import E, K, N, Packed, matched, ran, refused, x
from spelled_models import SpelledMoE
from torch import nn
from torch.nn import functional as F

aten = torch.ops.aten


@pytest.mark.parametrize("body", [lambda m, x, e: F.linear(x, m.w(e)), lambda m, x, e: F.linear(x, m.w()[e])])
def test_numbers_that_choose_experts_are_not_baked_in(body):
    """Under automatic dynamic shapes the second number becomes a symbol, and that graph serves all later ones."""
    assert matched(Packed(E, N, K, body=body), *((x(), e) for e in range(2, 6))) == ["linear"] * 2


def test_number_read_from_a_tensor_is_not_baked_in():
    def body(m, x, i):
        e = i.item()
        torch._check(e >= 0)
        torch._check(e < E)
        return F.linear(x, m.w(e))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert matched(Packed(E, N, K, body=body), *((x(), torch.tensor(e)) for e in (3, 5))) == ["linear"]


def test_symbolic_start_of_rows_is_refused():
    model = Packed(E, N, K, body=lambda m, x, e: F.linear(x, m.w()[0, e : e + 32]))
    assert "symbolic index" in ran(model, *((x(), e) for e in range(2, 6))).refused[0].reason


@pytest.mark.parametrize("first", [N, 40])
def test_symbolic_number_of_rows_is_not_the_whole(first):
    model = Packed(N, K, body=lambda m, x, n: F.linear(x, m.w()[:n]))
    assert "symbolic" in refused(model, *((x(), n) for n in (first, 48, 33)), dynamic=True)


def test_symbolic_part_of_k_is_not_the_whole():
    model = Packed(N, K, body=lambda m, x, k: F.linear(x[:, :k], m.w()[:, :k]))
    assert "only part of" in ran(model, *((x(), k) for k in (48, K, 32)), dynamic=True).refused[0].reason


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_negative_ids_count_from_the_end(dtype):
    ids = torch.tensor([0, -1, 3, -8, 2], dtype=dtype)
    model = Packed(E, N, K, body=lambda m, x, i: torch.bmm(m.w(i), x.unsqueeze(-1)))
    assert matched(model, (x(), ids)) == ["indexed"]
    model = Packed(E, N, K, body=lambda m, x, i: torch.einsum("td,tand->tan", x, m.w()[i]))
    assert matched(model, (x(), torch.stack((ids, ids.flip(0)), 1))) == ["indexed"]


class Targets:
    """A pass that counts the ops of the graph that is run."""

    def __call__(self, graph):
        self.of = Counter(n.target for n in graph.nodes if n.op == "call_function")


def ops_left(model, *inputs):
    torch._dynamo.reset()
    targets = Targets()
    options = {"codegen": False, "joint_custom_post_pass": targets}
    torch.testing.assert_close(
        torch.compile(model, backend="nvfp4_emu", options=options)(*inputs), model(*inputs), rtol=1e-5, atol=1e-4
    )
    return targets.of


@pytest.mark.parametrize(
    ("route", "checked"),
    [
        (lambda x: x[:, :E].topk(1).indices.flatten(), False),
        (lambda x: x[:, :E].argmax(1), False),
        (lambda x: x[:, :E].sort(descending=True).indices[:, 0].int(), False),
        (lambda x: x[:, :E].argmax(1) - 1, True),
        (lambda x: x[:, :E].topk(1).values.flatten().long().clamp(-3, 3), True),
        (lambda x: x[:, :E].argmax(1).clamp(max=2), True),
    ],
)
def test_ids_that_are_places_are_not_checked_for_their_sign(route, checked):
    body = lambda m, x: torch.bmm(m.w(route(x)), x.unsqueeze(-1))  # noqa: E731
    assert bool(ops_left(Packed(E, N, K, body=body), x())[aten.where.self]) == checked


def test_products_of_one_weight_share_its_parts():
    model = Packed(E, N, K, body=lambda m, x: torch.bmm(x, m.w()[:, ::2].mT) * torch.bmm(x, m.w()[:, 1::2].mT))
    ops = ops_left(model, x(E, 5, K))
    assert ops[torch.ops.fx_nvfp4.batched.default] == 2
    assert ops[aten.expand.default] == 1  # of the global scales


def test_products_in_a_row():
    """What the second multiplies is the first, which is replaced before it."""
    model = Packed(E, N, K, body=lambda m, x: F.linear(F.linear(x, m.w()[0, :K]), m.w()[1, :K]))
    assert matched(model, (x(),)) == ["linear"] * 2


@pytest.mark.parametrize("style", ["batched", "einsum"])
def test_one_token(style):
    model = SpelledMoE(style, torch.bfloat16)
    with torch.no_grad():
        got = matched(model, (spelled_models.tokens(1, torch.bfloat16),), tolerance=2**-6)
    assert got == ["indexed"] * 2


def test_one_expert_and_one_row():
    """Dims of size 1 are addressed by nothing, and are rows and experts all the same."""
    assert matched(Packed(1, K, body=lambda m, x: F.linear(x, m.w())), (x(),)) == ["linear"]
    bmm = lambda m, x: torch.bmm(x.expand(len(m.q), 5, K), m.w().mT)  # noqa: E731
    assert matched(Packed(E, 1, K, body=bmm), (x(),)) == ["batched"]
    assert matched(Packed(1, N, K, body=bmm), (x(),)) == ["linear"]
    grouped = lambda m, x, offs: F.grouped_mm(x.bfloat16(), m.w().bfloat16().mT, offs=offs)  # noqa: E731
    offs = torch.tensor([5], dtype=torch.int32)
    assert matched(Packed(1, N, K, body=grouped), (x(), offs), tolerance=2**-6) == ["grouped"]
    chosen = lambda m, x, i: torch.bmm(m.w(i), x.unsqueeze(-1))  # noqa: E731
    assert matched(Packed(E, 1, K, body=chosen), (x(), torch.tensor([0, 3, 7, 1, 1]))) == ["indexed"]


UNSERVED = {
    "mul and sum": (lambda m, x: (x[:, None] * m.w()).sum(-1), (x(),)),
    "conv": (lambda m, x: F.conv1d(x.t()[None], m.w()[:, :, None]), (x(),)),
    "embedding": (lambda m, i: F.embedding(i, m.w()), (torch.tensor([1, 5, 7]),)),
    "output": (lambda m, x: m.w(), (x(),)),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_no_dense_weight_goes_unreported(name):
    body, inputs = UNSERVED[name]
    assert "NVFP4 weight is dequantised for" in refused(Packed(N, K, body=body), inputs)


def test_images_are_no_weights():
    linear = nn.Linear(192, 8).requires_grad_(False)
    image = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert matched(lambda im: linear((im.float() / 255).flatten(1)), (image,)) == []


def test_branch_is_refused_truthfully():
    """What a branch of torch.cond gets as a table is an input of its own, whose values only the call knows."""

    def body(m, x):
        return torch.cond(x.sum() > 0, lambda x: F.linear(x, m.w()), lambda x: -F.linear(x, m.w()), (x,))

    assert "control-flow branch" in refused(Packed(N, K, body=body), (x(),))
