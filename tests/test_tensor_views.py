"""Views of an NVFP4Weight: what they show is what the same view of the dense weight shows, and nothing is unpacked.

Edges: chosen experts split and merged again, rows sliced with a step and split into groups, repeated dims, dims of
size 1, weights stored transposed, activation scales that follow their experts, negative and repeated ids.
"""

import pytest
import torch
from test_tensor import LAYOUTS, E, K, N, make_weight

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.layouts import is_tiled

IDS = torch.tensor([[3, 0, 1], [1, -1, 3]])

VIEWS = {
    "one expert": lambda w: w[2],
    "last expert": lambda w: w[-1],
    "expert by tensor": lambda w: w[torch.tensor(1)],
    "some experts": lambda w: w[1:3],
    "every second expert": lambda w: w[::2],
    "chosen": lambda w: w[IDS[0]],
    "chosen in two dims": lambda w: w[IDS],
    "chosen twice": lambda w: w[IDS][torch.tensor([1, 1])],
    "chosen, then one slot": lambda w: w[IDS][:, 1],
    "chosen, then one token and slot": lambda w: w[IDS][0][2],
    "chosen by mask": lambda w: w[torch.tensor([True, False, True, True])],
    "chosen by index_select": lambda w: w.index_select(0, IDS[0]),
    "chosen in two split dims": lambda w: w.view(2, 2, N, K)[torch.tensor([1, 0]), torch.tensor([0, -1])],
    "chosen along one of two dims": lambda w: w.view(2, 2, N, K)[:, torch.tensor([1, 1, 0])],
    "chosen, flattened, split": lambda w: w[IDS].flatten(0, 1).unflatten(0, (2, 3)),
    "rows of up": lambda w: w[:, N // 2 :],
    "rows of a chunk": lambda w: w.chunk(2, dim=1)[1],
    "rows of a split": lambda w: w.split([32, N - 32], dim=1)[1],
    "rows of an uneven split": lambda w: w.tensor_split(5, dim=1)[1],
    "rows narrowed": lambda w: w.narrow(1, 8, 16),
    "every second row": lambda w: w[:, 1::2],
    "rows gathered": lambda w: w[:, torch.tensor([5, 0, 0, -1])],
    "rows gathered by index_select": lambda w: w.index_select(1, torch.tensor([5, 0, 0])),
    "one row": lambda w: w[:, -3],
    "rows of chosen experts": lambda w: w[IDS][..., : N // 2, :],
    "rows in groups": lambda w: w.view(E, 2, N // 2, K),
    "rows in groups, one of them": lambda w: w.unflatten(1, (2, -1))[:, 1],
    "rows in pairs": lambda w: w.view(E, N // 2, 2, K)[:, :, 0],
    "rows of chosen experts in groups": lambda w: w[IDS].unflatten(2, (2, -1))[:, :, 1],
    "experts unbound": lambda w: w.unbind()[3],
    "blocks of K": lambda w: w[..., 16:48],
    "blocks of K split": lambda w: w.chunk(2, dim=-1)[1],
    "transposed": lambda w: w.transpose(1, 2),
    "mT and rows": lambda w: w.mT[..., ::2],
    "adjoint": lambda w: w.adjoint(),
    "any order": lambda w: w.permute(2, 0, 1),
    "moved": lambda w: w.movedim(0, -1),
    "T of one": lambda w: w[0].T,
    "t of one": lambda w: w[0].t().t(),
    "merged rows of all": lambda w: w.view(E * N, K),
    "merged rows of all, split again": lambda w: w.reshape(-1, K).view(E, N, K),
    "merged rows of some": lambda w: w[:, ::2].reshape(-1, K),
    "merged K of all": lambda w: w.permute(1, 0, 2).reshape(N, E * K),
    "merged and split otherwise": lambda w: w.view(E * N, K).view(2, E * N // 2, K),
    "flat": lambda w: w.flatten(),
    "unsqueezed": lambda w: w.unsqueeze(1).unsqueeze(-1),
    "unsqueezed and squeezed": lambda w: w[:, None, None].squeeze(1).squeeze(),
    "one expert kept as a dim": lambda w: w[1:2].squeeze(0),
    "one expert kept, viewed away": lambda w: w[1:2].view(N, K),
    "repeated": lambda w: w.expand(3, E, N, K),
    "one weight repeated": lambda w: w[1].expand(3, N, K),
    "repeated and merged": lambda w: w.unsqueeze(1).expand(-1, 3, -1, -1).reshape(3 * E, N, K),
    "expanded to itself": lambda w: w.expand(-1, -1, -1),
    "detached clone": lambda w: w.mT.detach().clone(),
    "contiguous": lambda w: w.permute(1, 0, 2).contiguous(),
    "stacked": lambda w: torch.stack([w[1], w[0], w[3]]),
    "stacked in the middle": lambda w: torch.stack([w[1].t(), w[0].t()], dim=1),
    "experts joined": lambda w: torch.cat([w[2:], w[:1]]),
    "rows joined": lambda w: torch.cat([w[:, 64:], w[:, :32]], dim=1),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_view_shows_what_the_dense_view_shows(name, context, layout):
    weight = layout(make_weight(dtype=torch.float32))
    dense = weight.dequantize()
    with context():
        view = VIEWS[name](weight)
        assert type(view) is NVFP4Weight
        assert view.shape == VIEWS[name](dense).shape
        assert torch.equal(view.dequantize(), VIEWS[name](dense))


@pytest.mark.parametrize("name", ["any order", "chosen in two dims", "rows in groups", "merged K of all", "repeated"])
def test_views_of_weights_stored_transposed(name):
    weight = make_weight(dtype=torch.float32).replace(transposed=True)
    plain = {"any order": lambda w: w.permute(1, 2, 0), "rows in groups": lambda w: w.view(E, K, 2, N // 2)}
    plain |= {"merged K of all": lambda w: w.reshape(E * K, N), "repeated": lambda w: w.expand(3, E, K, N)}
    view = plain.get(name, VIEWS[name])
    assert torch.equal(view(weight).dequantize(), view(weight.dequantize()))


# What cuts through tiles; everything else keeps them.
CUT = {
    *("rows of an uneven split", "rows narrowed", "every second row", "rows gathered", "rows gathered by index_select"),
    *("one row", "rows in pairs", "blocks of K", "blocks of K split", "mT and rows", "merged rows of some"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_keep_tiles_that_they_do_not_cut(name):
    assert is_tiled(VIEWS[name](make_weight().tiled()).qdata) == (name not in CUT)


def test_whole_tiles_of_k_stay_tiles():
    weight = make_weight((N, 4 * K), dtype=torch.float32)
    view = weight.tiled()[:, K : 3 * K]
    assert is_tiled(view.qdata)
    assert torch.equal(view.dequantize(), weight.dequantize()[:, K : 3 * K])


def test_weights_of_both_layouts_are_joined():
    weight = make_weight(dtype=torch.float32)
    for dim in (0, 1):
        both = torch.cat([weight, weight.tiled()], dim=dim)
        assert torch.equal(both.dequantize(), torch.cat([weight.dequantize()] * 2, dim=dim))


SCALES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda w: w[1], torch.tensor(0.2)),
        (lambda w: w[1:3], torch.tensor([0.2, 0.3])),
        (lambda w: w.view(2, 2, N, K)[1], torch.tensor([0.3, 0.4])),
        (lambda w: w.unflatten(1, (2, -1))[:, 0], SCALES),
        (lambda w: w[torch.tensor([0, 1])].unflatten(1, (2, -1))[:, 0], SCALES.repeat_interleave(2)),
        (lambda w: torch.stack([w[3], w[0]]), torch.tensor([0.4, 0.1])),
        (lambda w: torch.cat([w[2:], w[:1]]), torch.tensor([0.3, 0.4, 0.1])),
        (lambda w: torch.stack([w, w]), torch.stack([SCALES, SCALES])),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_activation_scales_follow_their_experts(view, expected, layout):
    weight = layout(make_weight(activations="static", act_scale=SCALES))
    torch.testing.assert_close(view(weight).act_scale, expected.double())


def test_one_activation_scale_for_all_becomes_one_for_each_when_stacked():
    weights = [
        make_weight((N, K), activations="static", act_scale=torch.tensor(s, dtype=torch.float64)) for s in (0.5, 0.25)
    ]
    assert torch.stack(weights).act_scale.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("lead", [(0, 2), (3, 0), (0, 1)])
def test_no_tokens_have_views_and_products_too(lead):
    weight, ids, x = make_weight(dtype=torch.float32), torch.zeros(lead, dtype=torch.long), torch.randn(lead[0], K)
    for product in (
        lambda w: torch.einsum("tk,tank->tan", x, w[ids]),
        lambda w: torch.matmul(x[:, None, None], w[ids].mT),
        lambda w: torch.bmm(w[ids].flatten(0, 1), torch.randn(0, K, 1)),
    ):
        assert product(weight).shape == product(weight.dequantize()).shape


@pytest.mark.parametrize("shape", [(E, N // 2, K), (E * 2, N, K), (-1, 5), (N, K)])
def test_a_shape_of_another_size_is_refused_as_for_any_tensor(shape):
    with pytest.raises(RuntimeError, match=r"is invalid for an NVFP4Weight \[4, 96, 64\]"):
        make_weight().view(shape)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda w: w.view(E, N, 2, K // 2), r"splits K = 64"),
        (lambda w: w.view(3, -1), r"does not fall on dims of \[4, 96, 64\]"),
        (lambda w: w[..., ::2], r"K sliced 0:64:2, only whole blocks of 16"),
        (lambda w: w[..., 8:], r"K sliced 8:64:1, only whole blocks of 16"),
        (lambda w: w[..., 3], r"one element of K"),
        (lambda w: w[..., IDS], r"indexed along dims that are not experts"),
        (lambda w: w[:, IDS], r"only a list of rows"),
        (lambda w: w.view(E * N, K)[3:], r"along dim 0, which merges several; reshape after"),
        (lambda w: w.repeat(2, 1, 1), r"use expand"),
        (lambda w: w.gather(0, torch.zeros(1, N, K, dtype=torch.long)), r"choose experts by index, weight\[ids\]"),
        (lambda w: torch.nn.functional.embedding(IDS, w[0]), r"embedding.*keep it unpacked"),
        (lambda w: torch.cat([w, w], dim=2), r"joined along dim 2"),
        (lambda w: torch.cat([w, w.dequantize()]), r"joined with a dense tensor"),
        (lambda w: torch.cat([w, w.replace(dialect="vllm")]), r"another kind of packed weight.*vllm"),
        (lambda w: torch.stack([w, w[IDS[0]][:]]), r"another kind of packed weight|joined"),
    ],
)
def test_views_that_cannot_stay_packed_say_what_to_do(view, message):
    with pytest.raises(NotImplementedError, match=message):
        view(make_weight())


def test_rows_of_different_static_activations_are_not_joined():
    weight = make_weight(activations="static", act_scale=SCALES)
    with pytest.raises(NotImplementedError, match="rows without static activations"):
        torch.cat([weight, weight], dim=1)


@pytest.mark.parametrize("tile", [False, True])
def test_slices_of_nothing(tile):
    """Of tiles they raised."""
    weight = make_weight().tiled() if tile else make_weight()
    assert weight[..., 64:0].shape == (E, N, 0)
    assert weight[..., 64:64].shape == (E, N, 0)
    assert weight[:, 16:0].shape == (E, 0, K)
