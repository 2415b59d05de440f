"""Whole blocks as one op: what is lifted equals eager.

Models call the ops of fx_nvfp4 themselves, so that nothing but the lift is at stake. tests/test_lift_routing.py has
routings and token counts, tests/test_lift_impostors.py what only looks like a block; tests/test_zoo.py the styles that
models are written in.
"""

import time

import pytest
import torch
from packed_blocks import (
    OFFSETS,
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
    not_lifted,
    on_input,
    ops,
    pack,
    share,
    swiglu,
    top_k,
    wide_sum,
    x_of,
)
from torch.nn import functional as F


@pytest.mark.in_part(4)
@pytest.mark.parametrize("back", ["index_put", "argsort", "index_copy", "scatter", "index_add", "scatter_add"])
@pytest.mark.parametrize("offs", OFFSETS)
def test_sorted_rows_in_every_spelling(offs, back):
    block = lifted(Block(lambda *a: grouped(*a, offs=offs, back=back)))
    assert (block.experts, block.top_k, block.activation, block.style) == (E, A, "silu(g) * u", "grouped")


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


def test_block_that_feeds_a_block_directly():
    model = Block(lambda m, x, w, i: indexed(m, indexed(m, x, w, i), w, i))
    report, names = compiled(model)
    assert names == ["moe", "moe"]
    assert [b.lifted for b in report.blocks] == [True, True]


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
