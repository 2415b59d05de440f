"""Cones of ops above an operand: where they end, and which are equal.

Guarded here: operands whose cones have equal keys have equal results, so a model with 128 experts costs one of them.
"""

import pytest
import torch
from fx_nvfp4.passes.cone import Reach
from fx_nvfp4.passes.weights import cone_key, cone_nodes, recognise_weight
from recognition import BF16, FP16, K, N, recognise
from spellings import dequantise, packed, trace


def test_behind_a_matmul_is_another_cone():
    q, s = packed(K, K)
    fn = lambda x, q, s, g: torch.relu(x @ dequantise(q, s, g)) * 2  # noqa: E731
    assert recognise(fn, torch.rand(5, K).to(BF16), q, s, torch.tensor(0.5))[0] is None


def test_equal_cones_have_equal_keys():
    q, s = packed(N, K)
    a, b = (trace(dequantise, q, s, torch.tensor(0.5)) for _ in range(2))
    assert cone_key(a.operand) == cone_key(b.operand)
    (first, second) = (recognise_weight(t.operand, t.constants) for t in (a, b))
    twin = dict(zip(cone_nodes(a.operand), cone_nodes(b.operand), strict=True))
    nodes = ("operand", "qdata", "block_scale", "global_scale")
    assert [twin[getattr(first, n)] for n in nodes] == [getattr(second, n) for n in nodes]


@pytest.mark.parametrize(
    "other",
    [
        lambda q, s, g: dequantise(q, s, g, FP16),
        lambda q, s, g: dequantise(q, s, 1 / g),
        lambda q, s, g: dequantise(q[:-1], s[:-1], g),
        lambda q, s, g: dequantise(q, s, g)[:, 16:],
        lambda q, s, g: dequantise((q >> 4) | (q << 4), s, g),
    ],
)
def test_other_cones_have_other_keys(other):
    q, s = packed(N, K)
    mine, theirs = (trace(fn, q, s, torch.tensor(0.5)) for fn in (dequantise, other))
    assert cone_key(mine.operand) != cone_key(theirs.operand)


def test_what_follows_from_token_ids_is_not_looked_at():
    """All activations of a model do: the cone of a last layer's would hold everything before it."""
    words, ids = torch.zeros(N, K // 16, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    table, cosines = torch.rand(7, K), torch.rand(9, K)

    def hidden(ids, table, cosines):
        return table[ids] + cosines[(ids != 0).long().cumsum(-1)] * ids.unsqueeze(-1)

    def unpacked(words):
        return torch.stack([(words >> 4 * i) & 15 for i in range(16)], -1).flatten(-2).float()

    assert not Reach()(trace(hidden, ids, table, cosines).operand)
    assert Reach()(trace(unpacked, words).operand)
