"""Where `recognise_weight` finds codes, block scales and global scales: every dimension of each leaf has its axis."""

import itertools
import random

import pytest
import torch
from fx_nvfp4.passes.weights import Axis, PackedWeight, recognise_weight
from recognition import BF16, E, K, N, accepted, chosen, dim, refused, weight
from spellings import DECODERS, by_blocks, dequantise, lookup, packed, trace

from fx_nvfp4.format import swizzle


def test_two_dimensional_and_transposed():
    q, s = packed(N, K)
    found, _ = accepted(lambda q, s, g: dequantise(q, s, g).t(), q, s, torch.tensor(0.3))
    assert (found.k_dim, found.qdata_axes, found.global_axes) == (0, (dim(1),), ())


def test_stored_transposed():
    """ModelOpt's fused experts are [E, in / 2, out]."""
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q.transpose(1, 2), s.transpose(1, 2), g).transpose(1, 2)  # noqa: E731
    found, _ = accepted(fn, q.mT.contiguous(), s.mT.contiguous(), g)
    assert (found.k_dim, found.packed_dim, found.scale_dim) == (1, 1, 1)
    assert found.qdata_axes == found.scale_axes == (dim(0), dim(2))


@pytest.mark.parametrize("shape", [(), (1,), (E,), (E, 1, 1), (E, N, 1), (1, 1, 1)])
def test_shapes_of_global_scale(shape):
    q, s, _ = weight()
    found, _ = accepted(dequantise, q, s, torch.rand(shape) + 0.5)
    of_size = {E: dim(0), N: dim(1), 1: Axis("const", value=0)}
    assert found.global_axes == tuple(of_size[size] for size in shape)


@pytest.mark.parametrize("lead", [(), (1,), (2,)])
@pytest.mark.parametrize("k", [16, 32])
def test_one_and_two_blocks(lead, k):
    """K // 16 is nearly nothing then, or what experts are numbered by too."""
    q, s = packed(*lead, N, k)
    found, inputs = accepted(lambda q, s, g: dequantise(q, s, g), q, s, torch.rand(lead) + 0.1)
    assert (found.qdata, found.block_scale, found.global_scale) == inputs
    assert found.k_dim == len(lead) + 1


def test_no_global_scale():
    q, s = packed(N, K)
    found, _ = accepted(lambda q, s: by_blocks(lookup(q), s.float()).to(BF16), q, s)
    assert (found.global_scale, found.global_op, found.global_axes) == (None, None, ())


@pytest.mark.parametrize("packed_first", [True, False])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_experts_chosen_by_ids(packed_first, ids):
    q, s, g = weight()

    def fn(q, s, g, i):
        if packed_first:
            return dequantise(q[i], s.view(torch.uint8)[i].view(torch.float8_e4m3fn), g[i])
        return dequantise(q, s, g)[i]

    found, inputs = accepted(fn, q, s, g, torch.randint(0, E, (5,), dtype=ids), dynamic={3: (0,)})
    assert found.qdata_axes == found.scale_axes == (chosen(inputs[3], dim(0)), dim(1))
    assert found.global_axes == (chosen(inputs[3], dim(0)),)


def test_experts_chosen_by_flattened_ids():
    """Each use may flatten the ids by itself: equal nodes are one."""
    q, s, g = weight()
    fn = lambda q, s, g, i: dequantise(q[i.flatten()], s[i.flatten()], g[i.flatten()])  # noqa: E731
    found, _ = accepted(fn, q, s, g, torch.randint(0, E, (5, 2)), dynamic={3: (0,)})
    (expert, _), (scale_expert, _), (global_expert,) = found.qdata_axes, found.scale_axes, found.global_axes
    assert expert == scale_expert == global_expert
    assert expert.index_axes == (dim(0),)
    assert list(expert.node.meta["val"].shape[1:]) == []


def test_experts_gathered_with_expanded_ids():
    q, s, g = weight()

    def fn(q, s, g, i):
        wide = i[:, None, None].expand(-1, N, K)
        return torch.gather(dequantise(q, s, g), 0, wide)

    found, inputs = accepted(fn, q, s, g, torch.randint(0, E, (5,)))
    assert found.qdata_axes == (chosen(inputs[3], dim(0)), dim(1))


def test_experts_chosen_by_routing():
    """What lies behind the ids (here topk) is no part of the weight."""
    q, s, g = weight()

    def fn(q, s, g, logits):
        return dequantise(q, s, g)[torch.topk(logits, 2).indices]

    found, _ = accepted(fn, q, s, g, torch.randn(5, E))
    (expert, rows) = found.qdata_axes
    assert expert.kind == "index"
    assert expert.index_axes == (dim(0), dim(1))
    assert rows == dim(2)


def test_constant_expert():
    q, s, g = weight()
    found, _ = accepted(lambda q, s, g: dequantise(q, s, g)[5].t(), q, s, g)
    assert found.qdata_axes == found.scale_axes == (Axis("const", value=5), dim(1))
    assert found.global_axes == (Axis("const", value=5),)


def test_einsum_merges_slots_and_rows():
    """einsum("td,tand->tan") multiplies by an operand [T, K, A * N]."""
    q, s, g = weight()
    ids, x = torch.randint(0, E, (5, 2)), torch.randn(5, K, dtype=BF16)
    fn = lambda q, s, g, i, x: torch.einsum("td,tand->tan", x, dequantise(q, s, g)[i])  # noqa: E731
    traced = trace(fn, q, s, g, ids, x, dynamic={3: (0,), 4: (0,)})
    (bmm,) = (n for n in traced.module.graph.nodes if n.target is torch.ops.aten.bmm.default)
    assert recognise_weight(bmm.args[0], traced.constants) is None
    found = recognise_weight(bmm.args[1], traced.constants)
    assert isinstance(found, PackedWeight)
    expert = chosen(traced.inputs[3], dim(0), Axis("quotient", dim=2, size=N))
    assert (found.k_dim, found.qdata_axes) == (1, (expert, Axis("remainder", dim=2, size=N)))
    assert found.global_axes == (expert,)


def test_einsum_of_all_experts_merges_experts_and_rows():
    q, s, g = weight()
    fn = lambda q, s, g, x: torch.einsum("td,end->ten", x, dequantise(q, s, g))  # noqa: E731
    traced = trace(fn, q, s, g, torch.randn(5, K, dtype=BF16), dynamic={3: (0,)})
    matmuls = [
        n for n in traced.module.graph.nodes if n.target in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
    ]
    found = recognise_weight(matmuls[0].args[1], traced.constants)
    assert isinstance(found, PackedWeight)
    last = len(found.operand.meta["val"].shape) - 1
    assert found.qdata_axes == (Axis("quotient", dim=last, size=N), Axis("remainder", dim=last, size=N))


def test_einsum_of_some_rows_of_all_experts():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q, s, g)[:, 1::3].flatten(0, 1)  # noqa: E731
    found, _ = accepted(fn, q, s, g)
    rows = Axis("remainder", dim=0, size=N // 3, step=3, value=1)
    assert found.qdata_axes == found.scale_axes == (Axis("quotient", dim=0, size=N // 3), rows)


@pytest.mark.parametrize(
    ("part", "axis"),
    [
        (lambda w: w[:, :16], Axis("affine", dim=1, size=1, value=0)),
        (lambda w: w[:, 16:], Axis("affine", dim=1, size=1, value=16)),
        (lambda w: w[:, 1::2], Axis("affine", dim=1, size=2, value=1)),
        (lambda w: w.chunk(2, 1)[1], Axis("affine", dim=1, size=1, value=24)),
    ],
)
def test_part_of_the_rows(part, axis):
    """Gate and up are often halves, or every other row, of one tensor: a part must not pass for the whole."""
    found, _ = accepted(lambda q, s, g: part(dequantise(q, s, g)), *weight())
    assert found.qdata_axes == found.scale_axes == (dim(0), axis)


@pytest.mark.parametrize(
    "part",
    [
        lambda w, n: w[:, n : n + 32],
        lambda w, n: w[:, n:],
        lambda w, n: w[torch.full((2,), n)],
    ],
)
def test_symbolic_places_are_refused(part):
    """What tracing saw is not what the next call means."""
    q, s, g = weight()
    fn = lambda q, s, g, t: part(dequantise(q, s, g), t.shape[0])  # noqa: E731
    assert refused(fn, q, s, g, torch.rand(3), dynamic={3: (0,)}).startswith("expert chosen by a symbolic index")


@pytest.mark.parametrize("d", [0, 1])
def test_symbolic_number_selects(d):
    """It is an index like any tensor of ids, of no dimensions; the expert that tracing saw is none of its values."""
    q, s, g = weight()
    fn = lambda q, s, g, t: torch.select(dequantise(q, s, g), d, t.shape[0])  # noqa: E731
    found, _ = accepted(fn, q, s, g, torch.rand(3), dynamic={3: (0,)})
    symbol = found.qdata_axes[d]
    assert (symbol.kind, symbol.index_axes) == ("index", ())
    assert isinstance(symbol.node.meta["val"], torch.SymInt)
    assert found.qdata_axes[1 - d] == dim(0)
    assert found.global_axes == found.qdata_axes[:1]


def test_rows_stored_flattened():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q.view(E, N, K // 2), s, g)  # noqa: E731
    found, _ = accepted(fn, q.view(E * N, K // 2), s, g)
    assert found.qdata_axes == (Axis("pair", size=N, parts=(dim(0), dim(1))),)
    assert found.scale_axes == (dim(0), dim(1))


def test_symbolic_experts_are_whole():
    """Sizes that are symbols are equal where they are the same symbol."""
    q, s, g = weight()
    found, _ = accepted(dequantise, q, s, g, dynamic={0: (0,), 1: (0,), 2: (0,)})
    assert found.qdata_axes == (dim(0), dim(1))


def unswizzle(s, rows, cols):
    tall, wide = -(-rows // 128), -(-cols // 4)
    tiles = s.view(torch.uint8).view(tall, wide, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(tall * 128, wide * 4)
    return tiles[:rows, :cols].view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "k"), [(128, 64), (256, 512), (200, 160)])
def test_swizzled_scales(rows, k):
    q, s = packed(rows, k)
    assert torch.equal(unswizzle(swizzle(s), rows, k // 16).float(), s.float())
    fn = lambda q, s, g: dequantise(q, unswizzle(s, rows, k // 16), g)  # noqa: E731
    found, inputs = accepted(fn, q, swizzle(s), torch.tensor(0.5))
    assert (found.scale_layout, found.block_scale, found.scale_dim) == ("swizzled", inputs[1], 0)
    assert found.scale_axes == found.qdata_axes == (dim(0),)


def test_swizzled_scales_of_each_expert():
    q, s = packed(3, 128, 128)
    flat = torch.stack([swizzle(x) for x in s]).view(torch.uint8).view(3, 128, 8)

    def fn(q, s, g):
        tiles = s.view(3, 1, 2, 32, 4, 4).permute(0, 1, 4, 3, 2, 5).reshape(3, 128, 8)
        return dequantise(q, tiles.view(torch.float8_e4m3fn), g)

    found, _ = accepted(fn, q, flat, torch.rand(3))
    assert (found.scale_layout, found.scale_dim, found.scale_axes) == ("swizzled", 1, (dim(0), dim(1)))


def test_random_layouts():
    """Property: for random shapes, orders of dimensions and choices, each axis is where it was put."""
    rng = random.Random(0)
    for _ in range(20):
        e, n, k = rng.randint(2, 9), rng.randint(2, 70), 16 * rng.randint(2, 12)
        order = rng.choice(list(itertools.permutations(range(3))))
        by_ids, name = rng.random() < 0.5, rng.choice(list(DECODERS))
        q, s = packed(e, n, k)

        def fn(q, s, g, i, by_ids=by_ids, name=name, order=order):
            w = dequantise(q, s, g, decode=DECODERS[name])
            return (w[i] if by_ids else w).permute(order)

        found, inputs = accepted(fn, q, s, torch.rand(e), torch.randint(0, e, (rng.randint(2, 6),)))
        expert = dim(order.index(0))
        expert = chosen(inputs[3], expert) if by_ids else expert
        assert found.k_dim == order.index(2)
        assert found.qdata_axes == found.scale_axes == (expert, dim(order.index(1)))
        assert found.global_axes == (expert,)
