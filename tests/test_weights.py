"""What `recognise_weight` takes for an NVFP4 weight: every spelling that models use, whatever the weight's size."""

import pytest
import torch
from fx_nvfp4.passes.weights import PackedWeight, recognise_weight
from recognition import BF16, FP16, FP32, E, K, N, accepted, dim, refused, weight
from spellings import DECODERS, E2M1, by_blocks, dequantise, lookup, packed, per_matrix, trace
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("name", DECODERS)
def test_spelling_is_what_it_claims(name):
    """Guards the tests: a wrong spelling that is refused would prove nothing."""
    q, _ = packed(3, 8, 64)
    values = torch.tensor(E2M1)[torch.stack((q & 15, q >> 4), -1).flatten(-2).long()]
    assert torch.equal(DECODERS[name](q).float(), values)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("name", DECODERS)
def test_spelling_is_recognised(name, dtype):
    q, s, g = weight()
    found, inputs = accepted(lambda q, s, g: dequantise(q, s, g, dtype, DECODERS[name]), q, s, g)
    assert (found.qdata, found.block_scale, found.global_scale) == inputs
    assert (found.k_dim, found.packed_dim, found.scale_dim, found.scale_layout) == (2, 2, 2, "linear")
    assert found.qdata_axes == found.scale_axes == (dim(0), dim(1))
    assert found.global_axes == (dim(0),)
    assert (found.low_nibble_first, found.global_op, found.dtype) == (True, "multiply", dtype)
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    assert found.formula == f"{short}(v * (s * g))"


def test_table_as_an_input_is_reported():
    """A compiled artifact is valid for the table's values only, so the caller must know which tables counted."""
    q, s, g = weight()
    table = torch.tensor(E2M1)
    found, inputs = accepted(
        lambda q, s, g, t: dequantise(q, s, g, decode=lambda q: lookup(q, t)), q, s, g, table, tables=(3,)
    )
    assert found.tables == (inputs[3],)


def test_table_of_unknown_values_is_refused():
    q, s, g = weight()
    reason = refused(lambda q, s, g, t: dequantise(q, s, g, decode=lambda q: lookup(q, t)), q, s, g, torch.tensor(E2M1))
    assert "values are unknown" in reason


def test_known_scales_are_not_trusted():
    """Scales that the caller knows (static, small) must stay inputs: their values differ from model to model."""
    q, s = packed(N, K)
    found, inputs = accepted(dequantise, q, s, torch.tensor([0.5]), tables=(0, 1, 2))
    assert (found.block_scale, found.global_scale) == inputs[1:]
    assert not set(found.tables) & set(inputs)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "g",
    [
        lambda g, h: g * h,
        lambda g, h: g / (448 * 6) * h,
        lambda g, h: torch.where(h > 1, g, g * 2),
        lambda g, h: (g.double() / h.double()).float(),
    ],
)
def test_computed_global_scale(g, dtype):
    """Two scales, or one that is computed: what they come to is a node of the graph."""
    q, s, first = weight()
    fn = lambda q, s, a, b: dequantise(q, s, g(a, b), dtype)  # noqa: E731
    found, inputs = accepted(fn, q, s, first, torch.rand(E))
    assert found.global_scale not in inputs
    assert found.global_scale.meta["val"].shape == (E,)
    assert found.global_axes == (dim(0),)


def test_global_scale_computed_from_one_input():
    """ModelOpt keeps amax, of which the global scale is a share."""
    q, s, amax = weight()
    found, inputs = accepted(lambda q, s, a: dequantise(q, s, a.float() / 2688), q, s, amax)
    assert found.global_scale.args == (inputs[2], 2688)


@pytest.mark.parametrize("clamp", [lambda g: g.clamp(min=1e-4), lambda g: 1 / (1 / g).clamp(max=1e4)])
def test_a_global_scale_that_is_clamped_out_of_sight(clamp):
    """Scales were tried from 2^-12 on, so that what acts below was not seen, and dropped."""
    q, s, g = weight()
    found, inputs = accepted(lambda q, s, g: dequantise(q, s, clamp(g.float())), q, s, g)
    assert found.global_scale not in inputs


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        (lambda v, s: by_blocks(v, s * 0.37), 0.37),
        (lambda v, s: by_blocks(v, s) / 2688, 1 / 2688),
        (lambda v, s: by_blocks(v * 0.37, s), 0.37),
        (lambda v, s: by_blocks(v, s) * torch.tensor(0.37), 0.37),
    ],
)
def test_number_for_global_scale(scale, factor, dtype):
    q, s = packed(N, K)
    found, _ = accepted(lambda q, s: scale(lookup(q), s.float()).to(dtype), q, s)
    if found.global_scale is None:
        assert (found.global_op, found.factor) == (None, factor)
    else:
        assert found.global_scale.op == "get_attr"


def test_high_nibble_first():
    q, s, g = weight()
    swapped = lambda q, s, g: dequantise((q >> 4) | (q << 4), s, g)  # noqa: E731
    assert not accepted(swapped, q, s, g)[0].low_nibble_first


def test_scale_bytes_seen_as_e4m3():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q, s.view(torch.float8_e4m3fn), g)  # noqa: E731
    found, inputs = accepted(fn, q, s.view(torch.uint8), g)
    assert (found.qdata, found.block_scale) == inputs[:2]


def test_scale_bytes_decoded_by_table():
    q, s, g = weight()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    fn = lambda q, s, g, t: by_blocks(lookup(q), t[s.int()] * per_matrix(g)).to(BF16)  # noqa: E731
    found, inputs = accepted(fn, q, s.view(torch.uint8), g, table, tables=(3,))
    assert found.block_scale == inputs[1]
    assert inputs[3] in found.tables


@pytest.mark.parametrize("order", [(7, 6, 5, 4, 3, 2, 1, 0), (1, 0, 3, 2, 5, 4, 7, 6), (0, 4, 1, 5, 2, 6, 3, 7)])
def test_order_of_nibbles_in_words(order):
    q, s, g = weight()

    def fn(q, s, g):
        codes = (q[..., None] >> torch.tensor([4 * place for place in order], dtype=torch.int32)) & 15
        return by_blocks(torch.tensor(E2M1)[codes].flatten(-2), s.float() * per_matrix(g)).to(BF16)

    assert accepted(fn, q.view(torch.int32), s, g)[0].nibbles == order


def test_unknown_order_of_nibbles_is_refused():
    q, s, g = weight()

    def fn(q, s, g):
        codes = (q[..., None] >> torch.tensor([0, 4, 8, 12, 16, 24, 20, 28], dtype=torch.int32)) & 15
        return by_blocks(torch.tensor(E2M1)[codes].flatten(-2), s.float() * per_matrix(g)).to(BF16)

    assert refused(fn, q.view(torch.int32), s, g)


@pytest.mark.parametrize("how", ["shift", "view"])
def test_int32_words(how):
    q, s, g = weight()

    def fn(q, s, g):
        if how == "view":
            return dequantise(q.view(torch.uint8), s, g)
        codes = (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        return by_blocks(torch.tensor(E2M1)[codes].flatten(-2), s.float() * per_matrix(g)).to(BF16)

    found, inputs = accepted(fn, q.view(torch.int32), s, g)
    assert (found.qdata, found.packed_dim, found.low_nibble_first) == (inputs[0], 2, True)


def test_int8_bytes():
    q, s, g = weight()
    found, inputs = accepted(lambda q, s, g: dequantise(q.view(torch.uint8), s, g), q.view(torch.int8), s, g)
    assert found.qdata == inputs[0]


def test_float4_bytes():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q.view(torch.uint8), s, g)  # noqa: E731
    found, inputs = accepted(fn, q.view(torch.float4_e2m1fn_x2), s, g)
    assert (found.qdata, found.packed_dim) == (inputs[0], 2)


class LargestTensor(TorchDispatchMode):
    """The largest tensor that anything computes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("name", ["lookup", "arithmetic", "where_chain", "slice_assign", "one_hot"])
def test_cost_does_not_grow_with_the_weight(name):
    q, s = packed(128, 3072, 4096, device="meta")
    fn = lambda q, s, g: dequantise(q, s, g, decode=DECODERS[name])  # noqa: E731
    traced = trace(fn, q, s, torch.empty(128, device="meta"))
    with LargestTensor() as largest:
        found = recognise_weight(traced.operand, traced.constants)
    assert isinstance(found, PackedWeight)
    assert largest.elements < 128 * 3072 * 4096 / 200
