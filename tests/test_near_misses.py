"""What `recognise_weight` refuses, and why: nothing that is almost NVFP4 passes, not even by one row or table entry.

Bytes that are no packed codes at all are no business of its, and not refused either.
"""

import pytest
import torch
from recognition import BF16, FP16, FP32, E, K, N, accepted, recognise, refused, scaled, weight
from spellings import E2M1, by_blocks, by_repeating, dequantise, lookup, packed


def test_mxfp4():
    q, _ = packed(N, K)
    e = torch.randint(120, 130, (N, K // 32), dtype=torch.uint8)
    fn = lambda q, e: (lookup(q) * e.view(torch.float8_e8m0fnu).float().repeat_interleave(32, -1)).to(BF16)  # noqa: E731
    assert refused(fn, q, e.view(torch.uint8)).startswith("block of 32")
    fn = lambda q, e: (lookup(q) * e.float().repeat_interleave(32, -1)).to(BF16)  # noqa: E731
    assert "scale is e8m0: MXFP4; block of 32" in refused(fn, q, e.view(torch.float8_e8m0fnu))


def test_e8m0_bytes_in_blocks_of_16():
    q, s = packed(N, K)
    fn = lambda q, s: (lookup(q) * torch.exp2(s.float() - 127).repeat_interleave(16, -1)).to(BF16)  # noqa: E731
    assert "e8m0" in refused(fn, q, s.view(torch.uint8))


def test_block_of_32():
    q, s = packed(N, 2 * K)
    fn = lambda q, s: (lookup(q) * s.float().repeat_interleave(32, -1)).to(BF16)  # noqa: E731
    assert "block of 32, NVFP4 has 16" in refused(fn, q, s[:, :8].contiguous())


def test_scale_in_float32():
    q, s = packed(N, K)
    fn = lambda q, s: by_repeating(lookup(q), s).to(BF16)  # noqa: E731
    assert "block scale is float32" in refused(fn, q, s.float())


def integers(q):
    codes = torch.stack((q & 15, q >> 4), -1).flatten(-2).float()
    return torch.where(codes > 7, codes - 16, codes)


NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
E3M0 = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
ONE_PERCENT = [*E2M1[:5], 3.03, *E2M1[6:]]
OTHER_DECODERS = {
    "int4": (integers, "int4"),
    "offset int4": (lambda q: torch.stack((q & 15, q >> 4), -1).flatten(-2).float() - 8, "offset by 8"),
    "NF4": (lambda q: lookup(q, torch.tensor(NF4)), "NF4"),
    "E3M0": (lambda q: lookup(q, torch.tensor(E3M0 + [-x for x in E3M0])), "E3M0"),
    "one entry off": (lambda q: lookup(q, torch.tensor(ONE_PERCENT)), "table entry 5 is 3.03, NVFP4 has 3.0"),
    "integer for 1.5": (lambda q: lookup(q, torch.tensor([*E2M1[:3], 1.0, *E2M1[4:]])), "table entry 3 is 1"),
    "sign flipped": (lambda q: lookup(q ^ 0x88), "codes are offset by 8"),
    "sign order": (lambda q: lookup(q, torch.tensor(E2M1[:8] + E2M1[:7:-1])), "negative half"),
    "six times": (lambda q: lookup(q) / 6, "0.167"),
}


@pytest.mark.parametrize("name", OTHER_DECODERS)
def test_other_codes(name):
    decode, reason = OTHER_DECODERS[name]
    q, s, g = weight()
    assert reason in refused(lambda q, s, g: dequantise(q, s, g, decode=decode), q, s, g)


NEXT_TO_3 = float(torch.nextafter(torch.tensor(3.0), torch.tensor(4.0)))
WRONG_TABLES = {
    "int4": [*map(float, range(8)), *map(float, range(-8, 0))],
    "offset int4": [float(i - 8) for i in range(16)],
    "NF4": NF4,
    "E3M0": E3M0 + [-x for x in E3M0],
    "one entry off by 1%": ONE_PERCENT,
    "one entry off by one unit in the last place": [*E2M1[:5], NEXT_TO_3, *E2M1[6:]],
    "one entry without its sign": [*E2M1[:9], 0.5, *E2M1[10:]],
    "two entries swapped": [*E2M1[:3], E2M1[4], E2M1[3], *E2M1[5:]],
    "no subnormal": [0.0, 0.0, *E2M1[2:9], 0.0, *E2M1[10:]],
}
KINDS = {  # decode(codes [..., K/2], table of 16)
    "16, buffer": (lookup, True),
    "16, inline": (lambda q, t: lookup(q, torch.tensor(t.tolist())), False),
    "256": (lambda q, t: torch.stack((_of_bytes(t)[0][q.int()], _of_bytes(t)[1][q.int()]), -1).flatten(-2), False),
    "256 x 2": (lambda q, t: torch.stack(_of_bytes(t), -1)[q.int()].flatten(-2), False),
    "chain": (lambda q, t: _chain(torch.stack((q & 15, q >> 4), -1).flatten(-2), t.tolist()), False),
}


def _of_bytes(table):
    table = table.tolist()
    return torch.tensor([table[b & 15] for b in range(256)]), torch.tensor([table[b >> 4] for b in range(256)])


def _chain(codes, table):
    values = torch.zeros(codes.shape)
    for code, value in enumerate(table):
        values = torch.where(codes == code, value, values)
    return values


@pytest.mark.in_part(6)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG_TABLES)
def test_wrong_tables(name, kind, dtype):
    """In bf16 and fp16 most products round as those of the right table do: samples close to ties tell them apart."""
    decode, as_input = KINDS[kind]
    table, (q, s, g) = torch.tensor(WRONG_TABLES[name]), weight()
    if as_input:
        fn = lambda q, s, g, t: dequantise(q, s, g, dtype, lambda q: decode(q, t))  # noqa: E731
        assert refused(fn, q, s, g, table, tables=(3,))
    else:
        assert refused(lambda q, s, g: dequantise(q, s, g, dtype, lambda q: decode(q, table)), q, s, g)


def scale_by(change):
    """The block scales of a weight changed before use."""
    return lambda q, s, g: dequantise(q, change(s.float()), g)


def codes_by(change):
    return lambda q, s, g: dequantise(change(q), s, g)


def times(rule):
    """code, block scale and global scale put together otherwise."""
    return lambda q, s, g: rule(lookup(q), s.float().repeat_interleave(16, -1), g[:, None, None]).to(BF16)


SWAP = lambda q: (q >> 4) | (q << 4)  # noqa: E731
EXPERT, ROW = torch.arange(E)[:, None, None], torch.arange(N)[:, None]
ALMOST = {
    "scales of the next row": scale_by(lambda s: s.roll(1, 1)),
    "scales of the next expert": scale_by(lambda s: s.roll(1, 0)),
    "scales of one expert rolled": scale_by(lambda s: torch.cat((s[:3], s[3:4].roll(1, -1), s[4:]))),
    "scales of one row replaced": scale_by(lambda s: torch.where(ROW == 17, 1.0, s)),
    "scales in reverse": scale_by(lambda s: s.flip(-1)),
    "scales without sign": scale_by(torch.abs),
    "scales negated": scale_by(torch.neg),
    "scales of at least 2^-6": scale_by(lambda s: s.clamp(min=2.0**-6)),
    "scales of at most 256": scale_by(lambda s: s.clamp(max=256.0)),
    "scales of 0 taken for 1": scale_by(lambda s: torch.where(s == 0, 1.0, s)),
    "scales squared": scale_by(lambda s: s * s),
    "scales inverted": scale_by(lambda s: 1 / s),
    "twice the scales": scale_by(lambda s: s * 2),
    "nibbles of one expert swapped": codes_by(lambda q: torch.where(EXPERT == 5, SWAP(q), q)),
    "nibbles of odd rows swapped": codes_by(lambda q: torch.where(ROW % 2 == 1, SWAP(q), q)),
    "nibbles of one byte in eight swapped": codes_by(lambda q: torch.where(torch.arange(K // 2) % 8 == 0, SWAP(q), q)),
    "codes of odd rows negated": codes_by(lambda q: torch.where(ROW % 2 == 1, q ^ 0x88, q)),
    "codes of the next byte": codes_by(lambda q: q.roll(1, -1)),
    "scale added": times(lambda v, s, g: v + s * g),
    "global scale added": times(lambda v, s, g: v * s + g),
    "global scale on both": times(lambda v, s, g: v * g * (s * g)),
    "no block scale": times(lambda v, s, g: v * g + 0 * s),
    "one expert without global scale": times(lambda v, s, g: v * s * torch.where(EXPERT == 2, 1.0, g)),
    "one row of one expert": times(lambda v, s, g: v * s * g * torch.where((EXPERT == 5) & (ROW == 40), 1.5, 1.0)),
    "one column of every block": times(lambda v, s, g: v * s * g * torch.where(torch.arange(K) % 16 == 3, 0.5, 1.0)),
    "largest code clipped": times(lambda v, s, g: v.clamp(-4, 4) * s * g),
    "weight clipped": times(lambda v, s, g: (v * s * g).clamp(-100, 100)),
    "small weights dropped": times(lambda v, s, g: torch.where((v * s * g).abs() < 2.0**-8, 0.0, v * s * g)),
    "through float8": times(lambda v, s, g: (v * s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * g),
}


@pytest.mark.in_part(2)
@pytest.mark.parametrize("name", ALMOST)
def test_almost(name):
    assert refused(ALMOST[name], *weight())


SAME = {  # not spelled as usual, and the same all the same
    "-0 is 0": lambda q, s, g: dequantise(
        q, s, g, decode=lambda q: lookup(q, torch.tensor([*E2M1[:8], 0.0, *E2M1[9:]]))
    ),
    "NaN is 0": lambda q, s, g: dequantise(q, s.float().nan_to_num(), g),
    "scales clamped to their range": scale_by(lambda s: s.clamp(-448, 448)),
    "swapped twice": codes_by(lambda q: SWAP(SWAP(q))),
    "global scale squared beforehand": lambda q, s, g: dequantise(q, s, g * g),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same(name):
    accepted(SAME[name], *weight())


def test_one_byte_decoded_otherwise():
    """A table of 256 pairs with one entry wrong: every byte must have been tried in both places."""
    pairs = torch.tensor([[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)])
    pairs[0xA7, 1] = 1.5
    q, s, g = weight()
    assert refused(lambda q, s, g: dequantise(q, s, g, decode=lambda q: pairs.clone()[q.long()].flatten(-2)), q, s, g)


ROWS = 200_000
SPECIAL = {
    "scaled": lambda w, r: torch.cat((w[:r], w[r : r + 1] * 1.5, w[r + 1 :])),
    "by index": lambda w, r: torch.where(torch.arange(ROWS)[:, None] == r, w * 1.5, w),
    "at the end": lambda w, r: torch.where(torch.arange(ROWS)[:, None] >= ROWS - 1, w * 1.5, w),
}


@pytest.mark.in_part(2)
@pytest.mark.parametrize("row", [0, 17, 4095, 123_457, ROWS - 1])
@pytest.mark.parametrize("how", ["scaled", "by index", "select_scatter", "assigned"])
def test_one_special_row_among_many(row, how):
    """12,000 random samples meet a given one of 200,000 rows with a chance of six percent."""
    q, s = packed(ROWS, K, device="meta")

    def fn(q, s, g):
        w = dequantise(q, s, g)
        if how in SPECIAL:
            return SPECIAL[how](w, row)
        if how == "select_scatter":
            return torch.select_scatter(w, w[row] * 1.5, 0, row)
        w[row : row + 1] = 0.25
        return w

    assert f"row {row}" in refused(fn, q, s, torch.tensor(0.5, device="meta"))


def test_one_special_element_among_many():
    """An edge within what lies behind another edge."""
    q, s = packed(ROWS, K, device="meta")

    def fn(q, s, g):
        w = dequantise(q, s, g)
        return torch.select_scatter(w, torch.slice_scatter(w[17], w[17, 99:100] * 1.5, 0, 99, 100), 0, 17)

    assert refused(fn, q, s, torch.tensor(0.5, device="meta"))


def test_special_column_is_named():
    q, s = packed(ROWS, K, device="meta")

    def fn(q, s, g):
        w = dequantise(q, s, g)
        w[:, 77] = w[:, 77] * 2
        return w

    assert "k = 77 differs" in refused(fn, q, s, torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.flip(1),
        lambda w: w.roll(1, 1),
        lambda w: torch.nn.functional.pad(w, (0, 0, 0, 8)),
        lambda w: w[:, torch.arange(N).clamp(max=N - 2)],
        lambda w: w.tril(),
    ],
)
def test_rows_out_of_place(change):
    """Layouts that no axis describes: refused, never silently taken for the plain one."""
    assert refused(lambda q, s, g: change(dequantise(q, s, g)), *weight())


def test_codes_and_scales_of_different_experts():
    q, s, g = weight()
    fn = lambda q, s, g, i, j: dequantise(q[i], s[j], g[i])  # noqa: E731
    ids = torch.randint(0, E, (2, 5))
    assert "different indices" in refused(fn, q, s, g, ids[0], ids[1])


def test_one_special_expert():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q, s, torch.where(torch.arange(E) == 3, g * 2, g))  # noqa: E731
    assert "dim 0 at 3" in refused(fn, q, s, g)


def test_planar_packing():
    q, s = packed(N, K)
    fn = lambda q, s: by_blocks(torch.cat((lookup(q)[:, 0::2], lookup(q)[:, 1::2]), -1), s.float())  # noqa: E731
    assert "planar packing" in refused(fn, q, s)


def test_rounding_in_another_dtype():
    q, s, g = weight()
    odd = lambda v, s, g: (v * (s * g).to(torch.float8_e5m2).float()).to(BF16)  # noqa: E731
    assert "no known rounding" in refused(scaled(odd), q, s, g)


def test_rounding_by_truncation():
    """One unit in the last place of bf16, always the same way, is within every tolerance."""
    q, s, g = weight()
    cut = lambda v, s, g: ((v * (s * g)).view(torch.int32) & -65536).view(FP32).to(BF16)  # noqa: E731
    assert "no known rounding" in refused(scaled(cut), q, s, g)


def test_scale_of_the_next_block():
    q, _ = packed(N, K)
    fn = lambda q, s: by_blocks(lookup(q), s[:, 1:].float()).to(BF16)  # noqa: E731
    assert "K // 16 +1" in refused(fn, q, packed(N, K + 16)[1])


def test_added_zero_point():
    q, s, g = weight()
    fn = lambda q, s, g, z: dequantise(q, s, g) + z[:, :, None]  # noqa: E731
    assert "depends on more" in refused(fn, q, s, g, torch.rand(E, N).to(BF16))


def test_scale_of_columns():
    """A factor that depends on K belongs to x, be it computed with the global scale or not."""
    q, s, g = weight()
    fn = lambda q, s, g, h: dequantise(q, s, g) * h  # noqa: E731
    assert "depends on more" in refused(fn, q, s, g, torch.rand(K).to(BF16))
    fn = lambda q, s, g, h: (lookup(q) * s.float().repeat_interleave(16, -1) * (g[:, None] * h)[:, None]).to(BF16)  # noqa: E731
    assert refused(fn, q, s, g, torch.rand(K))


def test_two_packed_tensors():
    q, s, g = weight()
    fn = lambda a, b, s, g: dequantise(torch.cat((a, b), 1), torch.cat((s, s), 1), g)  # noqa: E731
    assert refused(fn, q, q, s, g)


def test_merged_k():
    q, s, g = weight()
    fn = lambda q, s, g: dequantise(q, s, g).transpose(0, 1).reshape(N, -1)  # noqa: E731
    assert "K is merged" in refused(fn, q, s, g)


def test_part_of_k():
    q, s = packed(N, 2 * K)
    assert "part of" in refused(lambda q, s, g: dequantise(q, s, g)[:, :K], q, s, torch.tensor(0.5))


def test_op_that_cannot_be_sampled():
    q, s, g = weight()
    assert "cumsum" in refused(lambda q, s, g: dequantise(q, s, g) + q.float().cumsum(-1).repeat(1, 1, 2), q, s, g)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, b: x.float() / 255.0,
        lambda x, b: torch.where(x > 3, b, 0.0),
        lambda x, b: x.to(torch.int8).float() * b[:, :1],
    ],
)
def test_bytes_that_are_not_packed(fn):
    assert recognise(fn, torch.randint(0, 256, (N, K), dtype=torch.uint8), torch.rand(N, K))[0] is None


def test_embedding_of_int32_tokens():
    """Token numbers are int32 leaves in the cone of the first activations."""
    fn = lambda ids, w: torch.nn.functional.embedding(ids, w)  # noqa: E731
    assert recognise(fn, torch.randint(0, 50, (4, 6), dtype=torch.int32), torch.rand(50, K))[0] is None


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 2, 32), (2, 16, 64)])
def test_bytes_of_images(shape):
    """Nothing takes codes out of these bytes, though some shapes have them read at k // 2 or k % (size / 2)."""
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert recognise(lambda im: (im.float() / 255).flatten(1), image)[0] is None
    assert recognise(lambda im: im.float().repeat_interleave(2, -1).flatten(1), image)[0] is None


@pytest.mark.parametrize("join", [torch.stack, torch.cat])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_that_are_put_together_after_they_were_dequantised(join, count):
    parts = [part for _ in range(count) for part in packed(N, K)]

    def fn(*parts):
        return join([by_blocks(lookup(parts[2 * e]), parts[2 * e + 1].float()).to(BF16) for e in range(count)])

    assert f"{count} packed weights are put together after they were dequantised" in refused(fn, *parts)
