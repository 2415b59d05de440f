"""What only looks like a block, or is read elsewhere too, is not lifted, with the reason; see tests/test_lift.py."""

import re
import types

import pytest
import torch
from packed_blocks import (
    WIDTH,
    A,
    Block,
    E,
    H,
    T,
    compiled,
    dense,
    gathered_loop,
    grouped,
    indexed,
    not_lifted,
    on_input,
    one_hot_offsets,
    ops,
    swiglu,
    top_k,
    x_of,
)
from torch.nn import functional as F

from fx_nvfp4.backend import collect_reports


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


@pytest.mark.in_part(4)
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
