"""The routing kernels and the combine kernel, on a GPU or in Triton's interpreter, against plain PyTorch.

Edges: no slot, one, a block less or more one, several steps of the counting loop; one expert and many; experts without
slots; ids out of range on both sides and beyond 32 bits; top-k that is no power of two.
"""

import pytest
import torch

from fx_nvfp4.kernels.config import ROUTING_BLOCK, ROUTING_BLOCKS_PER_STEP
from fx_nvfp4.kernels.moe import combine
from fx_nvfp4.kernels.routing import sort_slots

STEP = ROUTING_BLOCK * ROUTING_BLOCKS_PER_STEP


def expected(ids, experts):
    flat = ids.flatten()
    order = [s for e in range(experts) for s in (flat == e).nonzero().flatten().tolist()]
    return order, torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts).cumsum(0).tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top", "experts"),
    [(0, 4, 3), (1, 1, 1), (1, 8, 300), (ROUTING_BLOCK - 1, 1, 5), (ROUTING_BLOCK, 1, 5), (43, 3, 4), (100, 8, 17)],
)
def test_slots_are_sorted_stably(tokens, top, experts, dtype, device):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 2, (tokens, top), generator=generator).to(dtype)
    order, offs = sort_slots(ids.to(device), experts)
    want_order, want_offs = expected(ids, experts)
    assert offs.tolist() == want_offs
    assert order[: len(want_order)].tolist() == want_order


def test_more_slots_than_one_step_counts(device):
    ids = torch.randint(-1, 3, (STEP + 300, 1), generator=torch.Generator().manual_seed(0))
    order, offs = sort_slots(ids.to(device), 3)
    want_order, want_offs = expected(ids, 3)
    assert offs.tolist() == want_offs
    assert order[: len(want_order)].tolist() == want_order


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 4096, 16384, 60000])
def test_many_slots(tokens):
    ids = torch.randint(-1, 257, (tokens, 8), device="cuda")
    order, offs = sort_slots(ids, 256)
    key = torch.where((ids >= 0) & (ids < 256), ids, 256).flatten()
    want = key.sort(stable=True).indices
    assert torch.equal(offs.long(), torch.bincount(key, minlength=257)[:256].cumsum(0))
    assert torch.equal(order[: int(offs[-1])].long(), want[: int(offs[-1])])


def test_ids_beyond_32_bits_are_nobodys(device):
    ids = torch.tensor([[1 << 32, 1], [-(1 << 40), (1 << 33) + 1]], device=device)
    order, offs = sort_slots(ids, 2)
    assert offs.tolist() == [0, 1]
    assert order[0] == 1


@pytest.mark.parametrize("ids", [torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.uint8)])
def test_ids_of_another_dtype_are_named(ids):
    with pytest.raises(ValueError, match=r"ids: expected int32 or int64, found torch\."):
        sort_slots(ids, 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("top", "outputs"), [(1, 5), (3, 64), (6, 1030), (8, 512), (33, 300)])
def test_combine_sums_the_slots_of_somebody(top, outputs, weighted, device):
    generator = torch.Generator().manual_seed(top)
    ids = torch.randint(-1, 5, (4, top), generator=generator)
    weights = torch.rand(4, top, generator=generator)
    y = torch.randn(4 * top, outputs, generator=generator)
    somebody = (ids >= 0) & (ids < 4)
    y[~somebody.flatten()] = float("nan")  # what memory held before
    got = combine(y.to(device), ids.to(device), weights.to(device) if weighted else None, 4)
    factor = weights if weighted else torch.ones_like(weights)
    want = (y.nan_to_num().view(4, top, outputs).double() * (factor * somebody)[..., None]).sum(1)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-5)
