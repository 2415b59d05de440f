"""Every spelling of the dequantisation, through the backend: rewritten, nothing dense left, right numbers.

Each case compiles one graph with a linear product and a product of all experts, and compares with the dequantised
product in float32. Token counts are dynamic in float32, where one graph serves two of them, and static otherwise.
"""

import pytest
import torch
from fx_nvfp4.passes.nodes import hint
from spellings import BLOCK, DECODERS, E2M1, by_blocks, by_repeating, lookup
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports

E, N, K = 3, 40, 96
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]
TOLERANCE = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-9}
TABLE = torch.tensor(E2M1)


class TwoProducts(nn.Module):
    """A weight [N, K] and weights [E, N, K]; `dequantise(module, name, q, s, g)` spells both.

    `store(q, s, g)` gives the three tensors as the model holds them.
    """

    def __init__(self, dequantise, store=lambda q, s, g: (q, s, g), per_row=False):
        super().__init__()
        self.dequantise, self.exact = dequantise, {}
        self.register_buffer("table", TABLE.clone())
        for name, shape in (("one", (N, K)), ("all", (E, N, K))):
            dense = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
            dims = -1 if per_row else (-2, -1)
            g = dense.abs().amax(dim=dims, keepdim=True) / nvfp4.TWO_LEVEL_MAX
            q, s = nvfp4.quantize(dense, g)
            self.exact[name] = nvfp4.dequantize(q, s, g)
            for part, value in zip("qsg", store(q, s, g), strict=True):
                self.register_buffer(f"{name}_{part}", value)

    def weight(self, name):
        return self.dequantise(self, *(getattr(self, f"{name}_{part}") for part in "qsg"))

    def forward(self, x, batches):
        return F.linear(x, self.weight("one")), torch.bmm(batches, self.weight("all").mT)

    def reference(self, x, batches):
        return F.linear(x.float(), self.exact["one"]), torch.bmm(batches.float(), self.exact["all"].mT)


class LargestFloat:
    """A pass that keeps the size of the largest floating-point tensor of the graph that is run."""

    elements = 0

    def __call__(self, graph):
        floats = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        self.elements = max(hint(t.numel()) for t in floats if t.is_floating_point() and t.dtype.itemsize > 1)


def check(model, dtype):
    torch._dynamo.reset()
    largest = LargestFloat()
    options = {"codegen": False, "joint_custom_post_pass": largest}
    run = torch.compile(model, backend="nvfp4_emu", fullgraph=True, options=options)
    with collect_reports() as report, torch.no_grad():
        for tokens in (5, 9) if dtype == FP32 else (5,):
            generator = torch.Generator().manual_seed(tokens)
            x, batches = (torch.randn(*lead, tokens, K, generator=generator).to(dtype) for lead in ((), (E,)))
            if dtype == FP32:
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(batches, 1)
            for got, want in zip(run(x, batches), model.reference(x, batches), strict=True):
                assert got.dtype == dtype
                assert (got.float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    assert not report.refused, report
    assert [m.op for m in report.matched] == ["linear", "batched"]
    assert report.graphs == 1
    assert largest.elements < N * K
    return report


def plain(decode, dtype):
    return lambda m, q, s, g: by_blocks(decode(q), s.float() * g).to(dtype)


@pytest.mark.in_part(16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, dtype):
    check(TwoProducts(plain(DECODERS[name], dtype)), dtype)


PAIRS = torch.tensor([[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)])
TABLES = {  # entries -> decode(q, table), table
    "8": (lambda q, t: _signed(t[(_codes(q) & 7).long()], q), TABLE[:8]),
    "16": (lookup, TABLE),
    "256": (lambda q, t: torch.stack((t[q.int()], TABLE[(q >> 4).int()]), -1).flatten(-2), PAIRS[:, 0]),
    "256 x 2": (lambda q, t: t[q.long()].flatten(-2), PAIRS),
}


def _codes(q):
    return torch.stack((q & 15, q >> 4), -1).flatten(-2)


def _signed(magnitude, q):
    return torch.where(_codes(q) > 7, -magnitude, magnitude)


@pytest.mark.in_part(4)
@pytest.mark.parametrize("held", ["buffer", "global", "inline"])
@pytest.mark.parametrize("entries", TABLES)
def test_tables(entries, held):
    decode, table = TABLES[entries]
    dtype = DTYPES[len(held) % 3]
    values = table.tolist()
    tables = {"buffer": lambda m: m.lut, "global": lambda m: table, "inline": lambda m: torch.tensor(values)}
    model = TwoProducts(lambda m, q, s, g: by_blocks(decode(q, tables[held](m)), s.float() * g).to(dtype))
    model.register_buffer("lut", table.clone())
    check(model, dtype)


def words(order):
    """Codes as int32 or int64 words, the k-th of eight or sixteen at nibble order[k]."""

    def pack(q):
        codes = nvfp4.unpack(q).long().unflatten(-1, (-1, len(order)))
        value = sum(codes[..., k] << 4 * place for k, place in enumerate(order))
        return value.to(torch.uint32).view(torch.int32) if len(order) == 8 else value

    def decode(q):
        shifts = torch.tensor([4 * place for place in order], dtype=q.dtype)
        return TABLE[((q[..., None] >> shifts) & 15)].flatten(-2)

    return pack, decode


RISING = tuple(range(8))
PACKINGS = {  # how codes are stored -> (pack, decode)
    "int8": (lambda q: q.view(torch.int8), lambda q: lookup(q.view(torch.uint8))),
    "float4": (lambda q: q.view(torch.float4_e2m1fn_x2), lambda q: lookup(q.view(torch.uint8))),
    "high nibble first": (lambda q: (q >> 4) | (q << 4), lambda q: _both_nibbles(q >> 4, q & 15)),
    "int32 as bytes": (lambda q: q.view(torch.int32), lambda q: lookup(q.view(torch.uint8))),
    "int32": words(RISING),
    "int32 from the high end": words(RISING[::-1]),
    "int32, high nibbles first": words(tuple(i ^ 1 for i in RISING)),
    "int32, AWQ": words((0, 4, 1, 5, 2, 6, 3, 7)),
    "int16": (lambda q: q.view(torch.int16), lambda q: lookup(q.view(torch.uint8))),
    "uint32": (lambda q: q.view(torch.uint32), lambda q: lookup(q.view(torch.uint8))),
    "int64": words(tuple(range(16))),
    "int64, from the high end": words(tuple(range(16))[::-1]),
    "int64 as bytes": (lambda q: q.view(torch.int64), lambda q: lookup(q.view(torch.uint8))),
    "[K/2, N]": (lambda q: q.mT.contiguous(), lambda q: lookup(q.mT)),
    "int32 [K/8, N]": (lambda q: words(RISING)[0](q).mT.contiguous(), lambda q: words(RISING)[1](q.mT)),
}


def _both_nibbles(even, odd):
    return torch.stack((TABLE[even.int()], TABLE[odd.int()]), -1).flatten(-2)


@pytest.mark.in_part(4)
@pytest.mark.parametrize("name", PACKINGS)
def test_packings(name):
    pack, decode = PACKINGS[name]
    dtype = DTYPES[len(name) % 3]
    model = TwoProducts(plain(decode, dtype), lambda q, s, g: (pack(q), s, g))
    report = check(model, dtype)
    sorted_at_each_call = name in ("high nibble first", "[K/2, N]", "int32 [K/8, N]") or name.startswith(
        ("int32 ", "int64 ")
    )
    if not name.endswith("as bytes"):
        assert bool(report.matched[0].notes) == (sorted_at_each_call or "," in name)


@pytest.mark.parametrize("code", [5, 9])
def test_every_code_is_tried_in_the_highest_nibble_of_a_word(code):
    """A word's sign bit is in it; one code of sixteen that decodes to something else there must be seen."""
    pack, decode = PACKINGS["int64"]

    def almost(q):
        special = (q >> 60) & 15 == code
        return decode(torch.where(special, q ^ (1 << 60), q))

    model = TwoProducts(plain(almost, torch.float32), lambda q, s, g: (pack(q), s, g))
    with torch.no_grad(), collect_reports() as report:
        torch.compile(model, backend="nvfp4_emu", options={"codegen": False})(torch.randn(3, K), torch.randn(E, 3, K))
    assert not report.matched
    assert report.refused


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def tiles(s):
    return torch.stack([nvfp4.swizzle(x) for x in s.view(-1, *s.shape[-2:])]).view(*s.shape[:-2], -1)


def from_tiles(s):
    tall, wide = -(-N // 128), -(-K // BLOCK // 4)
    t = s.view(torch.uint8).view(-1, tall, wide, 32, 4, 4).permute(0, 1, 4, 3, 2, 5)
    t = t.reshape(-1, tall * 128, wide * 4)[:, :N, : K // BLOCK].view(torch.float8_e4m3fn)
    return t if s.dim() > 1 else t[0]


def halves(g):
    return torch.stack((g * 3, torch.full_like(g, 1 / 3)))


def in_dtype(v, s, g, dtype):
    return by_blocks(v.to(dtype), s.to(dtype)) * g.to(dtype)


SCALES = {  # name -> (scale(v, s, g, dtype) -> weight, store(q, s, g) or None for as they are)
    "folded": (lambda v, s, g, d: by_blocks(v, s.float() * g).to(d), None),
    "repeated": (lambda v, s, g, d: by_repeating(v, s.float() * g).to(d), None),
    "after the block scale": (lambda v, s, g, d: (by_blocks(v, s.float()) * g).to(d), None),
    "before the block scale": (lambda v, s, g, d: by_blocks(v * g, s.float()).to(d), None),
    "in the model's dtype": (in_dtype, None),
    "rounded first": (lambda v, s, g, d: (by_blocks(v.to(d), s.to(d)).float() * g).to(d), None),
    "divided": (lambda v, s, g, d: (by_blocks(v, s.float()) / g).to(d), lambda q, s, g: (q, s, 1 / g)),
    "divided, folded": (lambda v, s, g, d: by_blocks(v, s.float() / g).to(d), lambda q, s, g: (q, s, 1 / g)),
    "reciprocal": (lambda v, s, g, d: by_blocks(v, s.float() * (1 / g)).to(d), lambda q, s, g: (q, s, 1 / g)),
    "float64": (lambda v, s, g, d: (by_blocks(v, s.float()).double() * g).to(d), lambda q, s, g: (q, s, g.double())),
    "of amax": (lambda v, s, g, d: by_blocks(v, s.float() * (g / 2688)).to(d), lambda q, s, g: (q, s, g * 2688)),
    "two": (lambda v, s, g, d: by_blocks(v, s.float() * (g[0] * g[1])).to(d), lambda q, s, g: (q, s, halves(g))),
    "bytes": (
        lambda v, s, g, d: by_blocks(v, s.view(torch.float8_e4m3fn).float() * g).to(d),
        lambda q, s, g: (q, s.view(torch.uint8), g),
    ),
    "bytes by table": (
        lambda v, s, g, d: by_blocks(v, E4M3[s.int()] * g).to(d),
        lambda q, s, g: (q, s.view(torch.uint8), g),
    ),
    "tiles": (lambda v, s, g, d: by_blocks(v, from_tiles(s).float() * g).to(d), lambda q, s, g: (q, tiles(s), g)),
    "[K/16, N]": (
        lambda v, s, g, d: by_blocks(v, s.mT.float() * g).to(d),
        lambda q, s, g: (q, s.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn), g),
    ),
}


@pytest.mark.in_part(8)
@pytest.mark.parametrize("decode", ["lookup", "arithmetic", "slice_assign"])
@pytest.mark.parametrize("name", SCALES)
def test_scales(name, decode):
    scale, store = SCALES[name]
    dtype = DTYPES[(len(name) + len(decode)) % 3]
    spelled = lambda m, q, s, g: scale(DECODERS[decode](q), s, g, dtype)  # noqa: E731
    check(TwoProducts(spelled, store or (lambda q, s, g: (q, s, g))), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_global_scale_of_every_row(dtype):
    check(TwoProducts(plain(lookup, dtype), per_row=True), dtype)


@pytest.mark.parametrize("where", ["before", "after"])
def test_global_scale_apart_from_the_weight(where):
    """The weight has block scales alone, and x or the product is multiplied by the global scale."""

    class Apart(TwoProducts):
        def forward(self, x, batches):
            before, after = (lambda t, g: t * g, lambda t, g: t)[:: 1 if where == "before" else -1]
            one = F.linear(before(x, self.one_g), self.weight("one"))
            every = torch.bmm(before(batches, self.all_g), self.weight("all").mT)
            return after(one, self.one_g), after(every, self.all_g)

    check(Apart(lambda m, q, s, g: by_blocks(lookup(q), s.float())), FP32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_global_scale_written_as_a_number(dtype):
    """It is part of the program, and of what Dynamo guards: another number is another graph."""
    spelled = lambda m, q, s, g: (by_blocks(lookup(q), s.float()) * m.number).to(dtype)  # noqa: E731
    model = TwoProducts(spelled)
    for model.number in (0.37, 1 / 2688):
        for name in ("one", "all"):
            q, s = getattr(model, f"{name}_q"), getattr(model, f"{name}_s")
            model.exact[name] = nvfp4.dequantize(q, s, model.number)
        report = check(model, dtype)
        assert f"g = {model.number:.6g}" in report.matched[0].source
