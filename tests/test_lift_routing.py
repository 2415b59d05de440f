"""Blocks of every routing, of token counts that are symbols, and with room for some of the tokens: lifted, or not.

The reason why not is always given; see tests/test_lift.py.
"""

import re

import pytest
import torch
from fx_nvfp4.passes.routing import Routing
from packed_blocks import (
    WIDTH,
    A,
    Block,
    E,
    H,
    T,
    compiled,
    dense,
    grouped,
    indexed,
    lifted,
    masked_loop,
    not_lifted,
    on_input,
    ops,
    share,
    swiglu,
    top_k,
    x_of,
)
from torch.nn import functional as F

from fx_nvfp4.backend import collect_reports


@pytest.mark.in_part(4)
@pytest.mark.parametrize("body", [indexed, grouped, dense, on_input, masked_loop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_counts_that_are_symbols(body, dtype):
    lifted(Block(body, dtype=dtype), [(T,), (12,), (2,), (33,)], dynamic=True, dtype=dtype)


@pytest.mark.in_part(4)
@pytest.mark.parametrize("body", [indexed, grouped, dense, on_input, masked_loop])
@pytest.mark.parametrize("tokens", [1, A, E])
def test_token_counts_that_equal_other_sizes(body, tokens):
    lifted(Block(body), [(tokens,)])
    lifted(Block(lambda m, x, *r: body(m, x, *r), route=lambda m, x: [t[:, :1] for t in top_k(m, x)]), [(tokens,)])


def test_tokens_of_a_batch_with_two_symbols():
    def batch(m, x):
        flat = x.view(-1, H)
        return grouped(m, flat, *top_k(m, flat)).view(x.shape)

    def inputs(b, s, dtype):
        return torch.randn(b, s, H, generator=torch.Generator().manual_seed(b * s)).to(dtype)

    model = Block(lambda m, x, *_: batch(m, x), route=lambda m, x: ())
    lifted(model, [(2, 3), (4, 5), (3, 2)], dynamic=True, inputs=inputs)


@pytest.mark.in_part(2)
@pytest.mark.parametrize("body", [indexed, grouped])
def test_routing_from_outside_whose_sizes_are_symbols_of_their_own(body):
    """Where x, ids and weights are inputs, nothing says at first that they are of the same tokens."""
    model = Block(lambda m, given: body(m, *given), route=lambda m, given: ())
    step = torch.compile(model, backend="nvfp4_emu", dynamic=True, options={"codegen": False})
    random = torch.Generator().manual_seed(0)
    for tokens, top in ((1, A), (7, A), (12, A), (9, A + 1)):
        ids = torch.rand(tokens, E, generator=random).topk(top).indices
        given = torch.randn(tokens, H, generator=random), torch.rand(tokens, top, generator=random), ids
        with collect_reports() as report:
            out = step(given)
        assert [b.lifted for b in report.blocks] in ([True], []), report.table()
        torch.testing.assert_close(out, model(given))
    assert [b.top_k for b in report.blocks] == [A + 1]


def routed(change):
    """Routing with something done to (weights, ids)."""
    return lambda m, x: change(m, x, *top_k(m, x))


ROUTINGS = {
    "weights squared": lambda m, x, w, i: (w * w, i),
    "scaled by token": lambda m, x, w, i: (w * torch.arange(1, len(x) + 1)[:, None], i),
    "softmax again": lambda m, x, w, i: (w.softmax(dim=-1), i),
    "some weights zero": lambda m, x, w, i: (torch.where(i % 2 == 0, w, 0), i),
    "experts placed anew": lambda m, x, w, i: (w, torch.tensor([3, 1, 5, 0, 4, 2])[i]),
    "experts renumbered": lambda m, x, w, i: (w, E - 1 - i),
    "int32": lambda m, x, w, i: (w, i.int()),
    "flat and back": lambda m, x, w, i: (w.flatten().view(w.shape), i.flatten().view(i.shape)),
    "top-1": lambda m, x, w, i: (w[:, :1], i[:, :1]),
    "all experts": lambda m, x, w, i: tuple(F.linear(x, m.router).sort(dim=-1)),
}


@pytest.mark.in_part(3)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("body", [indexed, lambda *a: grouped(*a, offs="histc")], ids=["indexed", "grouped"])
def test_routings(name, body):
    assert lifted(Block(lambda m, x, w, i: body(m, x, w, i.long()), route=routed(ROUTINGS[name])))


def test_experts_that_repeat_in_a_token():
    """Both slots count; where one of them wins, as in a scatter, there is no block."""
    route = routed(lambda m, x, w, i: (w, i // 2))
    lifted(Block(indexed, route=route))
    one_hot = lambda m, w, i: (F.one_hot(i, E) * w.unsqueeze(-1)).sum(dim=1).to(w.dtype)  # noqa: E731
    lifted(Block(lambda *a: dense(*a, spread=one_hot), route=route))
    assert "slots" in not_lifted(Block(dense, route=route))


def test_ids_of_no_expert():
    """A choice that is no expert of this block: a zero expert, or one that lies elsewhere."""

    def route(m, x):
        logits = torch.cat((F.linear(x, m.router), x[:, :2]), dim=1)
        return logits.softmax(dim=-1).topk(A, dim=-1)

    lifted(Block(masked_loop, route=route))
    lifted(Block(lambda *a: grouped(*a, offs="histc"), route=route))


class Given(Block):
    """A block that is told the routing."""

    def forward(self, x, weights, ids):
        return self.body(self, x, weights, ids)


@pytest.mark.in_part(3)
@pytest.mark.parametrize(
    ("body", "low"), [(indexed, 0), (indexed, -E), (grouped, 0), (masked_loop, 0), (masked_loop, -E)]
)
@pytest.mark.parametrize("wrap", [False, True])
def test_ids_from_outside(body, low, wrap):
    """Of no known range: ids below zero are none for the ops, and count from the end where a model indexes."""
    x, weights, random = x_of(), torch.rand(T, A), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(E, generator=random)[:A] for _ in range(T)])
    ids += torch.randint(2, (T, A), generator=random) * low
    model = Given(lambda m, x, w, i: body(m, x, w, torch.where(i < 0, i + E, i) if wrap else i))
    lifted(model, inputs=lambda *_: (x, weights, ids))


def test_ids_from_outside_that_may_repeat():
    """A scatter of weights keeps one of two slots."""
    ids = torch.arange(T * A).view(T, A) % E
    assert "slots" in not_lifted(Given(dense), inputs=lambda *_: (x_of(), torch.rand(T, A), ids))


SPREAD = {
    "clamp": lambda s: s.clamp(max=2.0),
    "threshold": lambda s: torch.where(s.abs() > 0.5, s, 0.0),
    "NaN removed": lambda s: s.nan_to_num(),
}


@pytest.mark.parametrize("name", SPREAD)
def test_weights_that_are_changed_after_they_are_spread(name):
    """By no more than the worlds would show: a weight of each expert is right then, and that of each slot is not."""
    weights = torch.tensor([2e-2, 3.0, 5.0] if name != "NaN removed" else [1.0, float("nan"), 2.0]).repeat(T, 1)
    inputs = lambda *_: (x_of(), weights, torch.rand(T, E, generator=torch.Generator().manual_seed(1)))  # noqa: E731

    def all_at_once(m, x, w, scores):
        return dense(m, x, w, scores.topk(A).indices, spread=lambda *a: SPREAD[name](share(*a)))

    lifted(Given(all_at_once), inputs=inputs)


def test_weights_that_are_changed_for_one_expert_at_a_time():
    def clamped(m, x, w, scores):
        ids, out = scores.topk(A).indices, torch.zeros_like(x)
        for e in range(E):
            out = out + m.expert(e, x) * torch.where(ids == e, w, 0).sum(dim=1, keepdim=True).clamp(max=2.0)
        return out

    inputs = lambda *_: (x_of(), torch.arange(T * A).view(T, A).float(), x_of()[:, :E])  # noqa: E731
    assert re.search("clamp.* changes .* inside of the block", not_lifted(Given(clamped), inputs=inputs))


def test_experts_of_two_routers_may_be_the_same():
    """Rows of top-k that are put together to one token's, whose weights a scatter would not add."""

    def two_routers(m, x, weights, scores):
        return dense(m, x, weights, scores.view(-1, 2, E).topk(1).indices.view(-1, 2))

    scores = F.one_hot(torch.arange(T) % E, E).float().repeat(1, 2)  # both take the same
    inputs = lambda *_: (x_of(), torch.rand(T, 2) + 0.5, scores)  # noqa: E731
    assert "slots" in not_lifted(Given(two_routers), inputs=inputs)


def test_capacity_for_every_token_and_for_few():
    """One-hot dispatch as in GShard drops what has no place: no block, unless all have one."""

    def dispatch(capacity):
        def body(m, x, weights, ids):
            chosen = F.one_hot(ids, E).sum(dim=1)
            place = torch.where(chosen > 0, chosen.cumsum(dim=0) - 1, capacity)
            there = (place.unsqueeze(-1) == torch.arange(capacity)).to(x.dtype)
            rows = torch.einsum("tec,td->ecd", there, x)
            y = m.down(ops.batched, swiglu(m.up(ops.batched, rows)))
            return torch.einsum("ecd,tec->td", y, there * share(m, weights, ids).unsqueeze(-1))

        return Block(body)

    lifted(dispatch(T))
    assert "slots are dropped" in not_lifted(dispatch(T - 1))


def first_tokens(count):
    """A combine that leaves out tokens from a number on."""
    keep = lambda y: torch.where(torch.arange(len(y))[:, None, None] < count, y, 0)  # noqa: E731
    return lambda *a: indexed(*a, combine=lambda y, w: (keep(y) * w.unsqueeze(-1)).sum(dim=1))


def with_room(room):
    """Dispatch by one-hot tensors [T, E, room], of every expert's tokens the first ones."""

    def body(m, x, weights, ids):
        chosen = F.one_hot(ids, E).sum(dim=1)
        place = (chosen.cumsum(dim=0) - 1).masked_fill(chosen == 0, room)
        dispatch = (place.unsqueeze(-1) == torch.arange(room)).to(x.dtype)
        y = m.down(ops.batched, swiglu(m.up(ops.batched, torch.einsum("tec,td->ecd", dispatch, x))))
        return torch.einsum("ecd,tec->td", y, dispatch * share(m, weights, ids).unsqueeze(-1))

    return body


@pytest.mark.in_part(2)
@pytest.mark.parametrize("body", [first_tokens(60), with_room(40)], ids=["first tokens", "room for some"])
def test_numbers_that_a_symbolic_count_of_tokens_passes(body):
    """They hold for what tracing saw, and for three times as many."""
    assert "slots are dropped" in not_lifted(Block(body), [(T,), (150,)], dynamic=True)
    lifted(Block(body), [(T,)])


@pytest.mark.parametrize(
    "keeps",
    [
        lambda place: place // 60 == 0,
        lambda place: (place >> 6) == 0,
        lambda place: place.float() / 60 < 1,
        lambda place: (place & ~63) == 0,
    ],
    ids=["division", "shift", "scaled", "mask"],
)
def test_capacities_in_other_words(keeps):
    """Numbers were looked for in comparisons alone, so that more tokens than these were never tried."""

    def combine(y, w):
        keep = keeps(torch.arange(len(y)))[:, None, None]
        return (torch.where(keep, y, 0) * w.unsqueeze(-1)).sum(dim=1)

    body = lambda *a: indexed(*a, combine=combine)  # noqa: E731
    assert "slots are dropped" in not_lifted(Block(body), [(T,), (150,)], dynamic=True)


def test_one_token_of_very_many_gets_nothing():
    """Of over 12288 tokens some were looked at in no world."""
    tokens = 16384

    def spread_but(m, x, weights, ids):
        keep = (torch.arange(tokens) != 12345)[:, None, None]
        return indexed(m, x, weights, ids, combine=lambda y, w: (torch.where(keep, y, 0) * w.unsqueeze(-1)).sum(1))

    assert "slots are dropped" in not_lifted(Block(spread_but), [(tokens,)])


def test_numbers_that_are_too_large_to_be_passed():
    assert "compares with 100000" in not_lifted(Block(first_tokens(100_000)), dynamic=True)


def masked_scores(m, x, hidden=float("-inf"), squash=torch.sigmoid):
    """transformers' Llama 4: scores [T, E] of all experts, of which those that are not chosen are hidden."""
    scores = F.linear(x, m.router)
    top, ids = scores.topk(A, dim=-1)
    return squash(torch.full_like(scores, hidden).scatter(1, ids, top).float()).to(x.dtype), None


def repeated_input(m, x, share, _, act=swiglu, bias=None):
    rows = x.repeat(len(m.up_q), 1) * share.transpose(0, 1).reshape(-1, 1)
    y = m.up(ops.batched, rows.view(len(m.up_q), -1, H))
    y = m.down(ops.batched, act(y if bias is None else y + bias[:, None]))
    return y.view(len(m.up_q), -1, H).sum(dim=0)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squash", [torch.sigmoid, lambda s: s.softmax(dim=-1)], ids=["sigmoid", "softmax"])
def test_scores_of_all_experts_that_are_hidden_but_for_the_top(squash, dtype):
    model = Block(repeated_input, lambda *a: masked_scores(*a, squash=squash), dtype)
    block = lifted(model, [(T,), (12,)], dynamic=True, dtype=dtype)
    assert (block.experts, block.top_k, block.style) == (E, A, "dense")


NOT_HIDDEN = {
    "scores that are only low": (repeated_input, lambda m, x: masked_scores(m, x, hidden=-9.0), "nor weighted by"),
    "all experts count": (
        repeated_input,
        lambda m, x: (F.linear(x, m.router).softmax(dim=-1), None),
        "no integers say",
    ),
    "a bias": (lambda m, *a: repeated_input(m, *a, bias=m.up_bias), masked_scores, "as zeros"),
    "not zero of zeros": (
        lambda *a: repeated_input(*a, act=lambda y: y[..., :WIDTH].sigmoid() * (y[..., WIDTH:] + 1)),
        masked_scores,
        "as zeros",
    ),
}


@pytest.mark.parametrize("name", NOT_HIDDEN)
def test_experts_that_are_not_hidden_stay_dense(name):
    body, route, reason = NOT_HIDDEN[name]
    found = not_lifted(Block(body, route))
    assert re.search(reason, found), found


def test_layers_that_hide_by_another_number_are_not_alike():
    """A constant below the weights is part of what is proven."""

    def layers(m, x, *_):
        for hidden in (float("-inf"), -9.0):
            x = x + repeated_input(m, x, *masked_scores(m, x, hidden))
        return x

    report, _ = compiled(Block(layers, route=lambda m, x: ()))
    assert [b.lifted for b in report.blocks] == [True, False]


def test_layers_that_are_alike_are_proven_once(monkeypatch):
    from fx_nvfp4.passes import known

    proofs = []
    plain = known.prove
    monkeypatch.setattr(known, "prove", lambda c: proofs.append(c) or plain(c))

    def layers(m, x, *_):
        for body in (grouped, indexed, grouped, indexed, grouped):
            x = x + body(m, x, *top_k(m, x))
        return x

    report, names = compiled(Block(layers, route=lambda m, x: ()), [(T,), (12,)], dynamic=True)
    assert [b.lifted for b in report.blocks] == [True] * 5
    assert names == ["moe"] * 5
    assert len(proofs) == 2


def test_integers_that_only_a_gpu_counts_are_counted_all_the_same():
    """By histc of integers, as transformers does on a GPU: a CPU, where routing is tried, has it for floats alone."""
    graph = torch.fx.Graph()
    ids = graph.placeholder("ids")
    counts = graph.call_function(torch.ops.aten.histc.default, (ids, 4, 0, 3))
    ids.meta["val"], counts.meta["val"] = torch.empty(6, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    found = Routing({ids: torch.tensor([3, 0, 3, 1, 3, 0], dtype=torch.int32)}, frozenset(), {}).value(counts)
    assert found.dtype == torch.int32
    assert found.tolist() == [2, 1, 0, 3]
