"""The sampled evaluator against eager: every op that it walks through, at every coordinate, bit for bit.

Also: what it records (which coordinates of which leaf were read, through which other leaves), that it names what it
cannot do, that it finds the places where a graph changes its course, and sizes that are symbols.
"""

import itertools
import math

import pytest
import torch
from fx_nvfp4.passes.sample import (
    Coords,
    Sampler,
    SymbolicPosition,
    Unsupported,
    hint,
    is_supported,
    shape_of,
    with_boundaries,
)
from spellings import trace
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def data(traced, args):
    """A leaf function that reads the real inputs."""
    values = {**traced.constants, **dict(zip(traced.inputs, args, strict=True))}
    return lambda node, at: values[node][tuple(at.index.unbind(1))].expand(len(at.sample)) if node in values else None


def everywhere(shape):
    index = list(itertools.product(*map(range, shape)))
    return torch.tensor(index, dtype=torch.int64).reshape(math.prod(shape), len(shape))


def check(fn, *args, **kwargs):
    traced = trace(lambda *a: fn(*a).clone(), *args, **kwargs)  # tracing has outputs alias no inputs
    expected = fn(*args)
    sampler = Sampler(data(traced, args))
    found = sampler.evaluate(traced.operand, everywhere(expected.shape))
    assert found.dtype == expected.dtype
    raw = [
        x.contiguous().view(-1).view(torch.uint8) if x.is_floating_point() else x.reshape(-1) for x in (found, expected)
    ]
    assert torch.equal(*raw)
    return sampler, traced


def x(*shape, dtype=torch.float32):
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    return torch.randint(0, 100, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


LAYOUT = {
    "view": lambda t: t.view(6, 20),
    "view splits and merges": lambda t: t.view(2, 6, 10).view(12, 2, 5),
    "reshape of transposed": lambda t: t.transpose(0, 2).reshape(-1, 4),
    "permute": lambda t: t.permute(2, 0, 1),
    "permute by negative numbers": lambda t: t.permute(-1, 0, -2),
    "transpose": lambda t: t.transpose(-1, 0),
    "t": lambda t: t[0].t(),
    "unsqueeze": lambda t: t.unsqueeze(-2).unsqueeze(0),
    "squeeze": lambda t: t.unsqueeze(1).squeeze(1) + t[:1, :1].squeeze(),
    "expand": lambda t: t[:, :, None].expand(-1, -1, 3, -1),
    "repeat": lambda t: t.repeat(2, 1, 3),
    "repeat_interleave": lambda t: t.repeat_interleave(3, 1),
    "slice": lambda t: t[1:, -3:, 1:4:2],
    "slice past the end": lambda t: t[:, 2:99],
    "select": lambda t: t[-1, :, 2],
    "cat": lambda t: torch.cat((t, t[:1] * 2, t[1:] + 1), 0),
    "cat along the last": lambda t: torch.cat((t, -t), -1),
    "stack": lambda t: torch.stack((t, t + 1, t * 3), 1),
    "stack last": lambda t: torch.stack((t, -t), -1).flatten(-2),
    "split": lambda t: t.split(3, 2)[1],
    "split with sizes": lambda t: t.split([1, 3], 1)[1],
    "chunk": lambda t: t.chunk(2, 1)[1] * t.chunk(2, 1)[0],
    "unbind": lambda t: t.unbind(1)[2],
    "slice_scatter": lambda t: torch.slice_scatter(t, t[:, 1:4:2] * 2, 1, 0, 4, 2),
    "select_scatter": lambda t: torch.select_scatter(t, t[0] - 1, 0, -1),
    "assignment to slices": lambda t: _assign(t),
    "pad": lambda t: torch.nn.functional.pad(t, (1, 2, 0, 1, 2, 0), value=-7.0),
    "crop by padding": lambda t: torch.nn.functional.pad(t, (-1, 2, 1, -1)),
    "flip": lambda t: t.flip(0, 2),
    "roll": lambda t: t.roll(2, 1),
    "clone and detach": lambda t: t.detach().clone(),
    "0-dim": lambda t: t[1, 2, 3] * 2,
}


def _assign(t):
    out = torch.zeros(3, 8, 5)
    out[:, 0::2] = t
    out[:, 1::2] = -t
    out[1] = 7.0
    return out


@pytest.mark.parametrize("name", LAYOUT)
def test_layout(name):
    check(LAYOUT[name], x(3, 4, 10) if name.startswith("view") else x(3, 4, 5))


VALUES = {
    "arithmetic of broadcast": lambda t: t * t[:, :1] + t[0],
    "where": lambda t: torch.where(t > 0, t, -1.0),
    "clamp": lambda t: t.clamp(-1, 1).clamp(min=-0.5),
    "to bf16 and back": lambda t: t.to(torch.bfloat16).float(),
    "mixed with 0-dim": lambda t: t.to(torch.bfloat16) * t[0, 0],
    "integer ops": lambda t: ((t.int() & 7) << 2) | (t.int() >> 1) ^ 3,
    "division of integers": lambda t: torch.div(t.int(), 3, rounding_mode="floor") + torch.remainder(t.int(), 3),
    "sum": lambda t: t.round().sum(1),
    "sum of several": lambda t: t.round().sum((0, 2), keepdim=True),
    "sum of all": lambda t: t.round().sum(),
    "amax": lambda t: t.abs().amax(-1, keepdim=True),
    "amin": lambda t: t.amin((0, 1)),
    "max": lambda t: t.max(1).values,
    "max with indices": lambda t: t.max(-1).indices,
    "argmax": lambda t: t.argmax(1),
    "argmin of all kept": lambda t: t.argmin(0, keepdim=True),
    "any": lambda t: (t > 5).any(-1),
    "full": lambda t: torch.full_like(t, 2.5) + torch.ones(5) + torch.zeros(4, 1),
    "arange": lambda t: t * torch.arange(5) + torch.arange(2, 14, 3)[:, None],
    "one_hot": lambda t: (torch.arange(5) == (t.int() & 3)[..., :1]).float(),
    "bucketize": lambda t: torch.bucketize(t, torch.tensor([-2.0, -0.5, 0.0, 1.0])),
    "bucketize right": lambda t: torch.bucketize(t.round(), torch.tensor([-2.0, 0.0, 1.0]), right=True),
    "masked fill": lambda t: t.masked_fill(t > 1, 9.0),
    "masked assignment": lambda t: _assign_mask(t),
    "copy": lambda t: torch.empty(3, 4, 5).copy_(t[:, :1]),
}


def _assign_mask(t):
    t = t.clone()
    t[t < 0] = 3.0
    return t


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    check(VALUES[name], x(3, 4, 5))


I64 = torch.int64
GATHERS = {
    "one index": lambda t, i: t[i],
    "two dims of ids": lambda t, i: t[torch.stack((i, 2 - i))],
    "in the middle": lambda t, i: t[:, i],
    "negative": lambda t, i: t[:, i - 3],
    "adjacent": lambda t, i: t[i, i + 1],
    "apart": lambda t, i: t[i, :, i + 1],
    "broadcast": lambda t, i: t[i[:, None], i],
    "index_select": lambda t, i: t.index_select(2, i),
    "embedding": lambda t, i: torch.nn.functional.embedding(torch.stack((i, i)), t[0]),
    "gather": lambda t, i: t.gather(1, i[:, None, None].expand(3, 2, 5)),
    "gather fewer": lambda t, i: t.gather(-1, i[None, :, None].expand(2, 3, 4)),
}


@pytest.mark.parametrize("name", GATHERS)
def test_gathers(name):
    check(GATHERS[name], x(3, 4, 5), torch.tensor([2, 0, 1]))


@pytest.mark.parametrize("name", [name for name in GATHERS if "gather" not in name])
def test_gathers_of_float8(name):
    """Eager has no torch.gather of it."""
    check(GATHERS[name], x(3, 4, 5).to(torch.float8_e4m3fn), torch.tensor([2, 0, 1]))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int16, torch.bfloat16, torch.int32, torch.float32, torch.int64]
)
def test_views_as_another_dtype(dtype):
    """Bytes as wider numbers and wider numbers as bytes."""
    raw = x(3, 8, dtype=torch.uint8)
    check(lambda t: t.view(dtype), raw)
    check(lambda t: t.view(torch.uint8), raw.view(dtype))
    check(lambda t: t.view(torch.int16), raw.view(dtype))


def test_float8_through_cat_and_scatter():
    """Indexed assignment of float8 does not exist in eager."""
    check(lambda t: torch.cat((t, t), 1)[:, 1:].float(), x(3, 8).to(torch.float8_e4m3fn))


def test_symbolic_sizes():
    """Coordinates come from hints, in views and in the ends of slices too."""
    fn = lambda t: torch.cat((t.reshape(-1, 5), t[:, 0]), 0)[1 : t.shape[0] + 2] * 2  # noqa: E731
    check(fn, x(3, 4, 5), dynamic={0: (0,)})


@pytest.mark.parametrize(
    "fn",
    [
        lambda t, u: torch.select(u, 0, t.shape[0]),
        lambda t, u: u[t.shape[0] :],
        lambda t, u: torch.select(t, 0, -1),
        lambda t, u: t[-2:],
        lambda t, u: u.split([t.shape[0], 8 - t.shape[0]])[1],
        lambda t, u: torch.select_scatter(u, u[0], 0, t.shape[0]),
        lambda t, u: torch.slice_scatter(u, u[:2], 0, t.shape[0], t.shape[0] + 2),
        lambda t, u: u[torch.arange(t.shape[0], t.shape[0] + 2)],
        lambda t, u: u[torch.full((2,), t.shape[0])],
        lambda t, u: u * t.shape[0],
    ],
)
def test_symbolic_places(fn):
    """A place, or a value, that is a symbol must not pass for what tracing saw: the next call has another."""
    traced = trace(lambda t, u: fn(t, u).clone(), x(3, 4), x(8, 4), dynamic={0: (0,)})
    sampler = Sampler(data(traced, (x(3, 4), x(8, 4))))
    with pytest.raises(SymbolicPosition):
        sampler.evaluate(traced.operand, torch.zeros(1, len(shape_of(traced.operand)), dtype=torch.int64))


def test_hint_of_unbacked_size():
    """A size known at run time only still gets a number, so that a graph with nonzero in it can be sampled."""
    env = ShapeEnv()
    assert hint(env.create_unbacked_symint()) > 0
    assert hint(7) == 7


def test_reads_are_recorded():
    sampler, traced = check(lambda t: t[:, 1:3].transpose(0, 1), x(3, 4))
    (read,) = sampler.reads[traced.inputs[0]]
    assert torch.equal(read.index, torch.tensor([[n, k] for k in (1, 2) for n in (0, 1, 2)]))
    assert torch.equal(read.sample, torch.arange(6))
    assert read.via == frozenset()


def test_reads_tell_through_what_a_place_was_chosen():
    """A table is told from a scale by this: codes choose where it is read."""
    sampler, traced = check(lambda t, q: t[(q & 3).long()] * t[0], x(4), x(3, 2, dtype=torch.uint8))
    table, codes = traced.inputs
    assert {read.via for read in sampler.reads[table]} == {frozenset((codes,)), frozenset()}


def test_unsupported_op_is_named():
    traced = trace(lambda t: t[:, 0:2].cumsum(0) + 1, x(3, 4))
    with pytest.raises(Unsupported, match=r"cumsum.*no rule") as caught:
        Sampler(lambda node, at: None).evaluate(traced.operand, everywhere((3, 2)))
    assert caught.value.node.target is torch.ops.aten.cumsum.default


def test_input_without_a_value_is_named():
    traced = trace(lambda t: t + 1, x(3, 4))
    with pytest.raises(Unsupported, match=traced.inputs[0].name):
        Sampler(lambda node, at: None).evaluate(traced.operand, everywhere((3, 4)))


def test_index_out_of_range_is_refused():
    """Virtual values may be no valid index: that must not read some other element."""
    traced = trace(lambda t, i: t[i], x(3, 4), torch.tensor([0, 1]))
    with pytest.raises(Unsupported, match="outside a dimension of 3"):
        Sampler(data(traced, (x(3, 4), torch.tensor([0, 3])))).evaluate(traced.operand, everywhere((2, 4)))


def test_large_reductions_end_the_cone():
    traced = trace(lambda t: t.mean(-1), x(2, 5000))
    reductions = [n for n in traced.module.graph.nodes if n.target is torch.ops.aten.mean.dim]
    assert reductions
    assert not any(map(is_supported, reductions))


def test_random_ops_end_the_cone():
    """Sampling a random op twice would give two values for one element."""
    traced = trace(lambda t: torch.nn.functional.dropout(t, 0.5, training=True), x(4, 4))
    assert not all(is_supported(n) for n in traced.module.graph.nodes if n.op == "call_function")


BIG = 1 << 20
EDGES = {
    "cat": (lambda t: torch.cat((t[:77_777], -t[77_777:])), {77_776, 77_777}),
    "slice_scatter": (
        lambda t: torch.slice_scatter(t, t[5:7] * 2, 0, 500_000, 500_002),
        {499_999, 500_000, 500_001, 500_002},
    ),
    "select_scatter": (lambda t: torch.select_scatter(t, t[0], 0, 900_001), {900_000, 900_001, 900_002}),
    "eq": (lambda t: torch.where(torch.arange(BIG)[:, None] == 31, -t, t), {30, 31, 32}),
    "ge": (lambda t: torch.where(torch.arange(BIG)[:, None] >= 31, -t, t), {30, 31}),
    "merged": (
        lambda t: torch.cat((t.view(4, -1, 3)[:1], -t.view(4, -1, 3)[1:])).reshape(-1, 3),
        {BIG // 4 - 1, BIG // 4},
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_boundaries_are_found(name):
    """Random coordinates would not meet them: 64 samples among a million rows."""
    fn, rows = EDGES[name]
    traced = trace(fn, torch.empty(BIG, 3, device="meta"))
    leaf = lambda node, at: at.index[:, 0].float() if node in traced.inputs else None  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    start = torch.stack([torch.randint(0, n, (64,), generator=generator) for n in (BIG, 3)], 1)
    start[0], start[1] = torch.zeros(2), torch.tensor((BIG - 1, 2))
    found = with_boundaries(traced.operand, lambda: Sampler(leaf), start, generator)
    assert torch.equal(found[:64], start)
    assert rows <= set(found[:, 0].tolist())
    assert len(found) > 64


def test_boundary_behind_a_boundary_is_found():
    traced = trace(
        lambda t: torch.select_scatter(t, torch.slice_scatter(t[0], t[0, :1], 0, 999, 1000), 0, 123),
        torch.empty(5000, 3000, device="meta"),
    )
    leaf = lambda node, at: at.index[:, 0].float() if node in traced.inputs else None  # noqa: E731
    start = torch.stack((torch.arange(0, 5000, 100), torch.arange(0, 3000, 60)), 1)
    found = with_boundaries(traced.operand, lambda: Sampler(leaf), start, torch.Generator().manual_seed(0))
    assert ((found == torch.tensor((123, 999))).all(1)).any()


def test_coordinates_of_shared_nodes_are_evaluated_once():
    """A chain that uses its link twice would else take 2^30 steps."""

    def fn(t):
        for _ in range(30):
            t = torch.where(t > 0, t * 0.5, t + 1)
        return t

    check(fn, x(3, 4))


def test_deep_graphs_are_refused_rather_than_overflow():
    def fn(t):
        for _ in range(2000):
            t = t + 1
        return t

    traced = trace(fn, x(2, 2))
    with pytest.raises(Unsupported):
        Sampler(data(traced, (x(2, 2),))).evaluate(traced.operand, everywhere((2, 2)))


def test_shapes_of_nodes_are_hints():
    traced = trace(lambda t: t * 2, x(3, 4), dynamic={0: (0,)})
    assert shape_of(traced.operand) == (3, 4)
    assert isinstance(traced.operand.meta["val"].shape[0], torch.SymInt)
    assert Coords(everywhere((3, 4)), torch.arange(12)).take(torch.arange(12) == 5).index.tolist() == [[1, 1]]
