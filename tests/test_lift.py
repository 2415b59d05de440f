"""Whole blocks as one op: what is lifted equals eager, and what only looks like a block is not lifted, with the reason.

Models call the ops of fx_nvfp4 themselves, so that nothing but the lift is at stake. tests/test_zoo.py has the styles
that models are written in.
"""

import re
import time
import types

import pytest
import torch
from fx_nvfp4.passes.routing import Routing
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports

T, E, A, H, WIDTH = 7, 6, 3, 64, 48
ops = torch.ops.fx_nvfp4


def pack(*shape, seed):
    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    scale = dense.abs().amax(dim=(-1, -2)) / nvfp4.TWO_LEVEL_MAX
    qdata, block_scale = nvfp4.quantize(dense, scale[..., None, None])
    return qdata, block_scale.view(torch.uint8), scale[..., None].expand(shape[:-1]).contiguous()


class Block(nn.Module):
    """Packed experts and a router; `body(module, x, weights, ids)` is the block, `route(module, x)` the routing."""

    def __init__(self, body, route=None, dtype=torch.float32, experts=E, rows=2 * WIDTH):
        super().__init__()
        self.body, self.choose = body, route or top_k
        for name, shape, seed in (("up", (experts, rows, H), 0), ("down", (experts, H, WIDTH), 1)):
            for part, value in zip("qsg", pack(*shape, seed=seed), strict=True):
                self.register_buffer(f"{name}_{part}", value)
        random = torch.Generator().manual_seed(2)
        self.router = nn.Parameter(torch.randn(experts, H, generator=random).to(dtype), requires_grad=False)
        self.up_bias = nn.Parameter(torch.randn(experts, rows, generator=random).to(dtype), requires_grad=False)
        self.down_bias = nn.Parameter(torch.randn(experts, H, generator=random).to(dtype), requires_grad=False)

    def forward(self, x):
        return self.body(self, x, *self.choose(self, x))

    def up(self, op, x, *args, **kwargs):
        return op(x, self.up_q, self.up_s, self.up_g, *args, **kwargs)

    def down(self, op, x, *args, **kwargs):
        return op(x, self.down_q, self.down_s, self.down_g, *args, **kwargs)

    def expert(self, e, x):
        """One expert's weights, selected from all."""
        h = swiglu(ops.linear(x, self.up_q[e], self.up_s[e], self.up_g[e]))
        return ops.linear(h, self.down_q[e], self.down_s[e], self.down_g[e])


def top_k(m, x):
    weights, ids = F.linear(x, m.router).float().softmax(dim=-1).topk(A, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), ids


def swiglu(y):
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def share(m, weights, ids):
    return torch.zeros(len(ids), len(m.up_q), dtype=weights.dtype).scatter(1, ids, weights)


def indexed(m, x, weights, ids, act=swiglu, combine=None):
    """Every slot a row: the style that most tests below vary."""
    flat = ids.flatten()
    y = m.down(ops.indexed, act(m.up(ops.indexed, x.repeat_interleave(ids.shape[1], dim=0), flat)), flat)
    y = y.view(*ids.shape, H)
    return (y * weights.unsqueeze(-1)).sum(dim=1) if combine is None else combine(y, weights)


def grouped(m, x, weights, ids, offs=None, back="index_put", act=swiglu):
    """Rows sorted by expert; counts and the way back are spelled in as many ways as there are."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = (OFFSETS[offs] if offs else one_hot_offsets)(flat, len(m.up_q))
    rows = x[order // ids.shape[1]]
    y = m.down(ops.grouped, act(m.up(ops.grouped, rows, ends)), ends)
    weight = weights.flatten()[order].unsqueeze(-1)
    if back == "index_add":
        return torch.zeros_like(x).index_add(0, order // ids.shape[1], y * weight)
    if back == "scatter_add":
        index = (order // ids.shape[1]).unsqueeze(-1).expand(-1, H)
        return torch.zeros_like(x).scatter_add(0, index, y * weight)
    if back == "argsort":
        y = (y * weight)[order.argsort()]
    elif back == "index_copy":
        y = torch.empty_like(y).index_copy(0, order, y * weight)
    elif back == "scatter":
        y = torch.zeros_like(y).scatter(0, order.unsqueeze(-1).expand_as(y), y * weight)
    else:
        y = torch.index_put(torch.empty_like(y), (order,), y * weight)
    return y.view(*ids.shape, H).sum(dim=1)


def one_hot_offsets(flat, experts):
    return F.one_hot(flat, experts).sum(dim=0).cumsum(0, dtype=torch.int32)


OFFSETS = {
    "one-hot": one_hot_offsets,
    "histc": lambda f, e: torch.histc(f.float(), bins=e, min=0, max=e - 1).cumsum(0).int(),
    "search": lambda f, e: torch.searchsorted(f.sort()[0], torch.arange(e), right=True).int(),
    "scatter": lambda f, e: torch.zeros(e).scatter_add(0, f, torch.ones_like(f).float()).cumsum(0).int(),
    "comparison": lambda f, e: (f <= torch.arange(e)[:, None]).sum(dim=1).int(),
    "bucketize": lambda f, e: torch.bucketize(torch.arange(e), f.sort()[0], right=True).int(),
}  # fmt: skip


def dense(m, x, weights, ids, act=swiglu, spread=share):
    y = m.down(ops.batched, act(m.up(ops.batched, x.expand(len(m.up_q), *x.shape))))
    return torch.einsum("etd,te->td", y, spread(m, weights, ids))


def on_input(m, x, weights, ids, act=swiglu):
    """Llama 4: every expert sees every token times its weight, which is zero for most."""
    rows = x.unsqueeze(0) * share(m, weights, ids).t().unsqueeze(-1)
    return m.down(ops.batched, act(m.up(ops.batched, rows))).sum(dim=0)


def masked_loop(m, x, weights, ids):
    out = torch.zeros_like(x)
    for e in range(len(m.up_q)):
        out = out + m.expert(e, x) * torch.where(ids == e, weights, 0).sum(dim=1, keepdim=True)
    return out


def gathered_loop(m, x, weights, ids):
    """transformers' eager loop over all experts."""
    out = torch.zeros_like(x)
    for e in range(len(m.up_q)):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, m.expert(e, x[token]) * weights[token, slot, None])
    return out


def x_of(tokens=T, dtype=torch.float32):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def compiled(model, shapes=((T,),), dynamic=False, dtype=torch.float32, inputs=x_of):
    """(report, names of our ops in the graph) of a model whose numbers are eager's."""
    torch._dynamo.reset()
    names = []

    def record(graph):
        names.extend(str(n.target).split(".")[1] for n in graph.nodes if "fx_nvfp4" in str(n.target))

    options = {"codegen": False, "force_disable_caches": True, "joint_custom_post_pass": record}
    run = torch.compile(model, backend="nvfp4_emu", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad(), collect_reports() as report:
        for shape in shapes:
            given = inputs(*shape, dtype)
            given = given if isinstance(given, tuple) else (given,)
            got, want = run(*given), model(*given)
            got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
            for g, w in zip(got, want, strict=True):
                limit = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
                assert w.abs().max() > 0
                assert (g.double() - w.double()).abs().max() <= limit * w.double().abs().max()
    return report, names


def lifted(model, *args, beside=(), **kwargs):
    """The report's block of a model that becomes one moe op, and the ops `beside` it."""
    report, names = compiled(model, *args, **kwargs)
    (block,) = report.blocks
    assert block.lifted, block
    assert sorted(names) == sorted(["moe", *beside])
    return block


def not_lifted(model, *args, **kwargs):
    """Why the model's block is not lifted."""
    report, names = compiled(model, *args, **kwargs)
    assert "moe" not in names, report
    (block,) = report.blocks
    assert not block.lifted
    assert block.reason
    assert block.advice
    return block.reason


# Blocks


@pytest.mark.in_part(4)
@pytest.mark.parametrize("back", ["index_put", "argsort", "index_copy", "scatter", "index_add", "scatter_add"])
@pytest.mark.parametrize("offs", OFFSETS)
def test_sorted_rows_in_every_spelling(offs, back):
    block = lifted(Block(lambda *a: grouped(*a, offs=offs, back=back)))
    assert (block.experts, block.top_k, block.activation, block.style) == (E, A, "silu(g) * u", "grouped")


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


ACTIVATIONS = {
    "gelu(g) * u": lambda y: F.gelu(y[..., :WIDTH]) * y[..., WIDTH:],
    "gelu_tanh(g) * u": lambda y: F.gelu(y[..., :WIDTH], approximate="tanh") * y[..., WIDTH:],
    "silu(u) * g": lambda y: F.silu(y[..., WIDTH:]) * y[..., :WIDTH],
    "relu(g) * u": lambda y: F.relu(y[..., :WIDTH]) * y[..., WIDTH:],
    "g * u": lambda y: y[..., :WIDTH] * y[..., WIDTH:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_read_as_expressions(name):
    for body in (indexed, dense):
        assert lifted(Block(lambda *a, body=body: body(*a, act=ACTIVATIONS[name]))).activation == name


def test_interleaved_clamped_activation():
    def act(y):
        gate, up = y[..., ::2].clamp(max=1.5), y[..., 1::2].clamp(-1.5, 1.5)
        return (up + 1) * (gate * torch.sigmoid(1.702 * gate))

    for body in (indexed, grouped, dense):
        assert "1.702" in lifted(Block(lambda *a, body=body: body(*a, act=act))).activation


def test_experts_without_a_gate():
    act = lambda y: F.relu(y).square()  # noqa: E731
    for body in (indexed, grouped, dense, on_input):
        block = lifted(Block(lambda *a, body=body: body(*a, act=act), rows=WIDTH))
        assert block.activation == "relu(u) * relu(u)"


def test_biases():
    def biased(m, x, weights, ids):
        flat = ids.flatten()
        rows = x.repeat_interleave(A, dim=0)
        y = m.down(ops.indexed, swiglu(m.up(ops.indexed, rows, flat) + m.up_bias[flat]), flat) + m.down_bias[flat]
        return torch.einsum("tah,ta->th", y.view(T, A, H), weights)

    def biased_dense(m, x, weights, ids):
        y = m.up(ops.batched, x.expand(E, T, H)) + m.up_bias[:, None]
        y = m.down(ops.batched, swiglu(y)) + m.down_bias[:, None]
        return torch.einsum("eth,te->th", y, share(m, weights, ids))

    for dtype in (torch.float32, torch.bfloat16):
        lifted(Block(biased, dtype=dtype), dtype=dtype)
        lifted(Block(biased_dense, dtype=dtype), dtype=dtype)


def test_gate_and_up_as_two_products_of_one_weight():
    def apart(m, x, weights, ids):
        flat, rows = ids.flatten(), x.repeat_interleave(A, dim=0)
        gate = ops.indexed(rows, m.up_q[:, :WIDTH], m.up_s[:, :WIDTH], m.up_g[:, :WIDTH].contiguous(), flat)
        up = ops.indexed(rows, m.up_q[:, WIDTH:], m.up_s[:, WIDTH:], m.up_g[:, WIDTH:].contiguous(), flat)
        y = m.down(ops.indexed, up * F.silu(gate), flat).view(*ids.shape, H)
        return (y * weights.unsqueeze(-1)).sum(dim=1)

    assert lifted(Block(apart)).activation == "silu(g) * u"


def test_rows_padded_to_whole_tiles():
    """Rows past the last group, and rows of zeros in it."""

    def padded(m, x, weights, ids, align=8):
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = F.one_hot(flat, E).sum(dim=0)
        ends = ((counts + align - 1) // align * align).cumsum(0)
        start = ends - (counts + align - 1) // align * align
        place = start[flat[order]] + torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
        size = len(flat) + E * align
        rows = torch.zeros(size, H, dtype=x.dtype).index_put((place,), x[order // A])
        y = m.down(ops.grouped, swiglu(m.up(ops.grouped, rows, ends.int())), ends.int())[place]
        return torch.zeros_like(x).index_add(0, order // A, y * weights.flatten()[order, None])

    lifted(Block(padded))
    lifted(Block(padded), [(T,), (12,), (3,)], dynamic=True)


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


def wide_sum(m, x, weights, ids):
    """Results in x's dtype, weighted and summed in fp32."""
    return indexed(m, x, weights, ids, combine=lambda y, w: (y.float() * w.float().unsqueeze(-1)).sum(dim=1))


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


def test_an_activation_that_uses_its_value_again_and_again():
    """Written out it grows threefold with each step: it took minutes, then hours."""

    def long(y):
        gate, up = y.chunk(2, -1)
        for _ in range(12):
            gate = gate - gate * gate * 0.01
        return gate * up

    start = time.perf_counter()
    assert "calls long" in not_lifted(Block(lambda *a: indexed(*a, act=long)))
    assert time.perf_counter() - start < 60


def test_numbers_that_are_too_large_to_be_passed():
    assert "compares with 100000" in not_lifted(Block(first_tokens(100_000)), dynamic=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [lambda y, x: y, lambda y, x: y + x, lambda y, x: (y + x.float()).to(x.dtype)])
def test_sums_in_fp32_that_are_used_in_fp32_are_not_rounded(change, dtype):
    """What reads digits of the sum that the products' dtype lacks must find them in the op's result."""
    model, x = Block(lambda m, x, *a: change(wide_sum(m, x, *a), x), dtype=dtype), x_of(dtype=dtype)
    lifted(model, dtype=dtype)
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False})
    with torch.no_grad():
        result, (weights, ids) = run(x), top_k(model, x)
        parts = [(getattr(model, f"{w}_q"), getattr(model, f"{w}_s"), getattr(model, f"{w}_g")) for w in ("up", "down")]
        ups, down = [[part] for part in parts[0]], parts[1]
        if torch.__version__ < "2.12":  # Inductor drops the cast of the router's weights, as the next takes it back
            chosen = F.linear(x, model.router).float().softmax(dim=-1).gather(1, ids)
            weights = chosen / chosen.sum(dim=-1, keepdim=True)
        sums = ops.moe(x, ids, weights, *ups, *down, "silu(g) * u", "concatenated", out_dtype=torch.float32)
        assert not torch.equal(sums, sums.to(dtype).float())
        torch.testing.assert_close(result, change(sums, x), rtol=0, atol=1e-6 if result.dtype != dtype else 0)


def test_sums_in_fp64_stay_apart():
    body = lambda m, x, *a: indexed(m, x, *a, combine=lambda y, w: (y.double() * w.unsqueeze(-1)).sum(dim=1))  # noqa: E731
    assert "float64 and used as such" in not_lifted(Block(body))


def test_sums_in_fp32_that_are_rounded_right_after_are_lifted():
    for shape in ((T, H), (1, T, H)):
        body = lambda m, x, *a, s=shape: wide_sum(m, x, *a).view(s).to(x.dtype)  # noqa: E731
        lifted(Block(body, dtype=torch.bfloat16), dtype=torch.bfloat16)


@pytest.mark.parametrize("place", ["up", "down"])
def test_biases_that_are_added_in_fp32_are_not_rounded(place):
    def body(m, x, weights, ids):
        flat = ids.flatten()
        up = m.up(ops.indexed, x.repeat_interleave(A, dim=0), flat)
        h = swiglu(up.float() + m.up_bias[flat].float() if place == "up" else up).to(x.dtype)
        y = m.down(ops.indexed, h, flat)
        y = y.float() + m.down_bias[flat].float() if place == "down" else y
        return (y.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    assert "is added in float32" in not_lifted(Block(body, dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_products_in_two_dtypes_stay_apart():
    def body(m, x, weights, ids):
        flat = ids.flatten()
        h = swiglu(m.up(ops.indexed, x.repeat_interleave(A, dim=0), flat).float())
        y = m.down(ops.indexed, h, flat)
        return (y.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    assert "bfloat16 and float32" in not_lifted(Block(body, dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_shared_experts_stay_beside():
    def shared(m, x, weights, ids):
        return grouped(m, x, weights, ids) + m.expert(0, x) * F.linear(x, m.router[:1]).sigmoid()

    assert lifted(Block(shared), beside=["linear", "linear"]).experts == E


def test_projections_of_the_next_layer_are_no_experts():
    """k and v after a norm: they take rows from a product of their own K, and integers say where results belong."""
    first, second, k, v = (pack(*size, seed=5) for size in ((32, H), (H, 32), (32, H), (32, H)))

    def layer(m, x, weights, ids):
        x = x + indexed(m, x, weights, ids) + ops.linear(F.relu(ops.linear(x, *first)), *second)
        x = x * x.square().mean(dim=-1, keepdim=True).rsqrt()
        return torch.cat([ops.linear(x, *part) * m.table[m.positions] for part in (k, v)], dim=-1)

    model = Block(layer)
    model.register_buffer("positions", torch.arange(T))
    model.register_buffer("table", torch.linspace(1, 2, 32 * T).view(T, 32))
    lifted(model, beside=["linear"] * 4)


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


def test_block_that_feeds_a_block_directly():
    model = Block(lambda m, x, w, i: indexed(m, indexed(m, x, w, i), w, i))
    report, names = compiled(model)
    assert names == ["moe", "moe"]
    assert [b.lifted for b in report.blocks] == [True, True]


# Static activation scales stay per expert, dynamic ones need the same rows


@pytest.mark.parametrize("body", [indexed, grouped, dense])
def test_static_activation_scales_of_each_expert(body):
    scale = torch.rand(E, dtype=torch.float64) * 0.01 + 0.001

    class Rounded(Block):
        def up(self, op, x, *args):
            return super().up(op, x, *args, act_scale=scale, activations="static", dialect="modelopt")

        def down(self, op, x, *args):
            return super().down(op, x, *args, act_scale=scale.flip(0), activations="static", dialect="modelopt")

    lifted(Rounded(body))


def test_dynamic_activation_scales():
    class Rounded(Block):
        def up(self, op, x, *args):
            return super().up(op, x, *args, activations="dynamic")

    lifted(Rounded(indexed))
    lifted(Rounded(grouped))
    assert "dynamic activation scales" in not_lifted(Rounded(dense))


# No blocks


def combined(combine):
    return lambda *a: indexed(*a, combine=combine)


def swapped_order(m, x, weights, ids):
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = one_hot_offsets(flat, E)
    y = m.down(ops.grouped, swiglu(m.up(ops.grouped, x[order // A], ends)), ends)[order]  # not its inverse
    return (y.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1)


def other_expert(m, x, weights, ids):
    rows = x.repeat_interleave(A, dim=0)
    y = m.down(ops.indexed, swiglu(m.up(ops.indexed, rows, ids.flatten())), ids.roll(1, dims=1).flatten())
    return (y.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1)


def other_token(m, x, weights, ids):
    rows, flat = x.repeat_interleave(A, dim=0), ids.flatten()
    gate, up = m.up(ops.indexed, rows, flat)[:, :WIDTH], m.up(ops.indexed, rows.roll(A, dims=0), flat)[:, WIDTH:]
    y = m.down(ops.indexed, F.silu(gate) * up, flat).view(*ids.shape, H)
    return (y * weights.unsqueeze(-1)).sum(dim=1)


def unsorted_groups(m, x, weights, ids):
    """Rows in groups that are not their experts'."""
    ends = one_hot_offsets(ids.flatten(), E)
    y = m.down(ops.grouped, swiglu(m.up(ops.grouped, x.repeat_interleave(A, dim=0), ends)), ends)
    return (y.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1)


def soft_mask(m, weights, ids):
    return torch.full((len(ids), E), 1e-3, dtype=weights.dtype).scatter(1, ids, weights)


def special_row(y, w):
    return torch.index_put((y * w.unsqueeze(-1)).sum(dim=1), (torch.tensor([3]),), y[3, :1])


def special_feature(y, w):
    y = torch.cat((y[..., :5], y[..., 5:6] * 2, y[..., 6:]), dim=-1)
    return (y * w.unsqueeze(-1)).sum(dim=1)


def special_element(y, w):
    row, column = torch.arange(T)[:, None], torch.arange(H)
    mask = ((row == 3) & (column == 7)).unsqueeze(1)
    return (torch.where(mask, 0, y) * w.unsqueeze(-1)).sum(dim=1)


def extra_term(y, w):
    return ((y + torch.eye(T, A)[..., None]) * w.unsqueeze(-1)).sum(dim=1)


def two_routings(y, w):
    return (y * (w * w.flip(0)).unsqueeze(-1)).sum(dim=1) + (y * w.unsqueeze(-1)).sum(dim=1)


def weighted(change):
    """A combine that does something to the results before, and something after they are weighted."""
    return combined(lambda y, w: (change(y) * w.unsqueeze(-1)).sum(dim=1))


def summed(total):
    return combined(lambda y, w: total(y * w.unsqueeze(-1)))


def act(function):
    return lambda *a: indexed(*a, act=function)


def act_of_token(m, x, weights, ids):
    return indexed(m, x, weights, ids, act=lambda y: swiglu(y) * x[:, :1].repeat_interleave(A, 0))


def act_of_weight(m, x, weights, ids):
    return indexed(m, x, weights, ids, act=lambda y: swiglu(y) * weights.reshape(-1, 1))


def act_of_row(y):
    return torch.where(torch.arange(T * A)[:, None] % 2 == 0, swiglu(y), 0)


IMPOSTORS = {
    "one slot has an extra term": (combined(extra_term), "adds something"),
    "one slot is left out": (summed(lambda y: y[:, 1:].sum(dim=1)), "slots are dropped"),
    "mean of slots": (summed(lambda y: y.mean(dim=1)), "slots are not weighted|mean"),
    "largest slot": (summed(lambda y: y.amax(dim=1)), "amax"),
    "twice as much": (summed(lambda y: (y * 2).sum(dim=1)), "slots are not weighted"),
    "slots in turn": (weighted(lambda y: y * torch.arange(A)[:, None]), "slots are dropped|not weighted"),
    "clamped results": (weighted(lambda y: y.clamp(-1e4, 1e4)), "clamp"),
    "NaN removed": (weighted(lambda y: y.nan_to_num()), "where|isnan|nan"),
    "normalised results": (weighted(lambda y: F.normalize(y, dim=-1)), "no rule|multiplied"),
    "result times result": (weighted(lambda y: y * y), "multiplied"),
    "next token's slots": (weighted(lambda y: y.roll(1, dims=0)), "slots are dropped"),
    "slots as tokens": (summed(lambda y: y.view(A, T, H).sum(dim=0)), "slots are dropped|not weighted"),
    "features shifted": (weighted(lambda y: y.roll(1, dims=-1)), "no sum over the slots"),
    "one row is special": (combined(special_row), "slots|written"),
    "one feature is special": (combined(special_feature), "slots are not weighted"),
    "one element is special": (combined(special_element), "from element to element"),
    "weights from two routings": (combined(two_routings), "slots are not weighted"),
    "rows back in wrong order": (swapped_order, "slots are (dropped|not weighted)"),
    "another expert goes down": (other_expert, "other experts|slots"),
    "gate and up of different tokens": (other_token, "different tokens"),
    "rows of other groups": (unsorted_groups, "slots are (dropped|not weighted)"),
    "unchosen experts count a little": (lambda *a: dense(*a, spread=soft_mask), "zero for experts|slots"),
    "activation knows the token": (act_of_token, "activation reads"),
    "activation knows the weight": (act_of_weight, "activation reads"),
    "activation mixes features": (act(lambda y: swiglu(y).softmax(dim=-1)), "no expression|takes"),
    "activation shifts features": (
        act(lambda y: F.silu(y[..., :WIDTH]).roll(1, -1) * y[..., WIDTH:]),
        "several parts|out of order",
    ),
    "activation differs by row": (act(act_of_row), "depends on the routing"),
    "activation rounds to fp8": (
        act(lambda y: swiglu(y).to(torch.float8_e5m2).to(y.dtype)),
        "rounds to torch.float8_e5m2",
    ),
    "results are rounded to fp8": (
        combined(lambda y, w: (y.to(torch.float8_e5m2).to(y.dtype) * w.unsqueeze(-1)).sum(dim=1)),
        "experts' results are rounded to torch.float8_e5m2",
    ),
    "results are rounded to bf16": (
        combined(lambda y, w: (y.bfloat16().float() * w.unsqueeze(-1)).sum(dim=1)),
        "experts' results are rounded to torch.bfloat16",
    ),
    "only half of the rows": (act(lambda y: F.silu(y[..., :WIDTH])), "takes"),
    "not zero of zeros": (lambda *a: on_input(*a, act=lambda y: swiglu(y) + 1), "as zeros"),
}


@pytest.mark.in_part(2)
@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_only_looks_like_a_block_stays_apart(name):
    body, reason = IMPOSTORS[name]
    found = not_lifted(Block(body))
    assert re.search(reason, found), found


def test_slots_as_tokens_where_tokens_are_as_many_as_slots():
    """What a symbolic size coincides with in tracing proves nothing."""

    def confused(y, w):
        return (y * w.unsqueeze(-1)).view(A, -1, H).sum(dim=0)

    report, names = compiled(Block(combined(confused)), [(A,), (6,), (9,)], dynamic=True)
    assert "moe" not in names
    assert all("slots" in b.reason for b in report.blocks)


def test_results_that_are_used_outside():
    def body(m, x, weights, ids):
        flat = ids.flatten()
        h = swiglu(m.up(ops.indexed, x.repeat_interleave(A, dim=0), flat))
        y = m.down(ops.indexed, h, flat).view(*ids.shape, H)
        return (y * weights.unsqueeze(-1)).sum(dim=1), h

    assert "used outside" in not_lifted(Block(body))


def test_routing_that_is_used_outside_is_no_obstacle():
    _, names = compiled(Block(lambda m, x, w, i: (indexed(m, x, w, i), w)))
    assert names == ["moe"]


def trained(body, what):
    """The report's block of a model of which one input, x or the router, has a gradient, which is eager's."""
    model, x = Block(body), x_of()
    leaf = (x if what == "x" else model.router).requires_grad_()
    model(x).square().sum().backward()
    want, leaf.grad = leaf.grad, None
    torch._dynamo.reset()
    options = {"codegen": False, "force_disable_caches": True}
    with collect_reports() as report:
        torch.compile(model, backend="nvfp4_emu", options=options)(x).square().sum().backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    (block,) = report.blocks
    return block


@pytest.mark.in_part(2)
@pytest.mark.parametrize("what", ["x", "router"])
@pytest.mark.parametrize("body", [dense, grouped, indexed, on_input])
def test_training_keeps_products_apart(body, what):
    block = trained(body, what)
    assert not block.lifted
    assert "needed for gradients" in block.reason
    assert "no_grad" in block.advice


def test_a_frozen_block_below_what_is_trained_is_lifted():
    def body(m, x, weights, ids):
        return grouped(m, x, weights, ids) @ m.router.T

    model = Block(body, route=lambda m, x: top_k(types.SimpleNamespace(router=m.up_bias[:, :H]), x))
    model.router.requires_grad_()
    torch._dynamo.reset()
    options = {"codegen": False, "force_disable_caches": True}
    with collect_reports() as report:
        torch.compile(model, backend="nvfp4_emu", options=options)(x_of()).sum().backward()
    assert [b.lifted for b in report.blocks] == [True]


def test_a_loop_over_gathered_tokens():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report, names = compiled(Block(gathered_loop, experts=3, route=lambda m, x: [t[:, :2] for t in top_k(m, x)]))
    assert [b.lifted for b in report.blocks] == [True]
    assert names == ["moe"]


def test_lift_is_an_option():
    torch._dynamo.reset()
    options = {"codegen": False, "force_disable_caches": True, "lift": False}
    with torch.no_grad(), collect_reports() as report:
        torch.compile(Block(indexed), backend="nvfp4_emu", options=options)(x_of())
    assert not report.blocks
    assert [m.op for m in report.matched] == ["indexed"] * 2


def test_integers_that_only_a_gpu_counts_are_counted_all_the_same():
    """By histc of integers, as transformers does on a GPU: a CPU, where routing is tried, has it for floats alone."""
    graph = torch.fx.Graph()
    ids = graph.placeholder("ids")
    counts = graph.call_function(torch.ops.aten.histc.default, (ids, 4, 0, 3))
    ids.meta["val"], counts.meta["val"] = torch.empty(6, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    found = Routing({ids: torch.tensor([3, 0, 3, 1, 3, 0], dtype=torch.int32)}, frozenset(), {}).value(counts)
    assert found.dtype == torch.int32
    assert found.tolist() == [2, 1, 0, 3]
