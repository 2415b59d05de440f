"""The Triton kernel of input_grad against plain PyTorch, on a GPU or in Triton's interpreter.

Edges: one row, odd N and N past a step; K past a tile; no rows; empty experts, rows of nobody, ids out of range; cut
operands; global scales that lie far apart, under which a rounded gradient would show; non-finite gradients.

Products are compared bit for bit where the operands make every float32 sum exact, and by the bound of the documented
rule elsewhere.
"""

import pytest
import torch
from test_kernels import IDS, OFFS, Weight, assert_same_bits, code_values, each_dtype, make_weight, make_x, scale_values
from torch import Tensor

from fx_nvfp4 import reference as plain
from fx_nvfp4.kernels import input_grad
from fx_nvfp4.kernels.grouped import row_groups


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_weight(experts: int, n: int, k: int, device: str) -> Weight:
    """Global scales that are powers of two keep every product and sum exact."""
    qdata, block_scale, global_scale = make_weight(experts, n, k, device)
    return Weight(qdata, block_scale, 2.0 ** torch.randint(-3, 2, global_scale.shape, device=device).float())


def reference(grad: Tensor, weight: Weight) -> Tensor:
    """grad [M, N] by one expert: the exact sum rounded once."""
    w = code_values(weight.qdata) * scale_values(weight.block_scale) * weight.global_scale.double()[:, None]
    return (grad.double() @ w).to(grad.dtype)


def reference_rows(grad: Tensor, weight: Weight, ids: Tensor) -> Tensor:
    out = torch.zeros(grad.shape[0], weight.qdata.shape[2] * 2, dtype=grad.dtype, device=grad.device)
    for e in range(weight.qdata.shape[0]):
        out[ids == e] = reference(grad[ids == e], weight.expert(e))
    return out


@pytest.mark.in_part(2)
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(0, 48, 80), (1, 1, 16), (5, 65, 80), (20, 33, 144), (70, 130, 272)])
def test_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    weight = exact_weight(1, n, k, device).expert(0)
    grad = make_x(m, n, dtype=dtype, device=device)
    # As numbers: a sum of padding zeros and one negative zero is a zero of either sign.
    assert torch.equal(input_grad.linear(grad, *weight), reference(grad, weight))
    assert torch.equal(input_grad.linear(grad.view(1, m, n), *weight), reference(grad, weight).view(1, m, k))


@each_dtype
@pytest.mark.parametrize("m", [0, 1, 20])
def test_batched(m: int, dtype: torch.dtype, device: str) -> None:
    weight = exact_weight(3, 72, 48, device)
    grad = make_x(3, m, 72, dtype=dtype, device=device)
    expected = torch.stack([reference(grad[e], weight.expert(e)) for e in range(3)])
    assert_same_bits(input_grad.batched(grad, *weight), expected)


@pytest.mark.in_part(3)
@each_dtype
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_indexed(ids: list[int], dtype: torch.dtype, device: str) -> None:
    """Ids out of range, sentinels of expert parallelism, must neither be read nor leave memory unwritten."""
    weight = exact_weight(4, 72, 144, device)
    grad = make_x(len(ids), 72, dtype=dtype, device=device)
    for index_dtype in (torch.int32, torch.int64):
        index = torch.tensor(ids, dtype=index_dtype, device=device)
        assert_same_bits(input_grad.indexed(grad, *weight, index), reference_rows(grad, weight, index))


@pytest.mark.in_part(4)
@each_dtype
@pytest.mark.parametrize(("s", "offs"), OFFS.values(), ids=OFFS.keys())
def test_grouped(s: int, offs: list[int], dtype: torch.dtype, device: str) -> None:
    weight = exact_weight(4, 72, 48, device)
    grad = make_x(s, 72, dtype=dtype, device=device)
    for index_dtype in (torch.int32, torch.int64):
        ends = torch.tensor(offs, dtype=index_dtype, device=device)
        assert_same_bits(input_grad.grouped(grad, *weight, ends), reference_rows(grad, weight, row_groups(ends, s)))


def test_strided_operands(device: str) -> None:
    """Rows and experts cut from larger tensors, and gradients transposed or expanded, as sums give them."""
    weight = exact_weight(6, 64, 96, device)
    cut = Weight(*(t.view(torch.uint8)[1::2, 10:50] for t in weight[:2]), weight.global_scale[1::2, 10:50])
    whole = Weight(*(t.contiguous() for t in cut))
    ids = torch.tensor([2, 0, 0, 1, 2, 2, 1, 0] * 2, device=device)[1::2][:7]
    transposed = make_x(40, 14, dtype=torch.float16, device=device).T[::2]
    wide = make_x(7, 200, dtype=torch.float16, device=device)[:, 30:70]
    expanded = make_x(1, 40, dtype=torch.float16, device=device).expand(7, 40)
    for grad in (transposed, wide, expanded):
        assert_same_bits(input_grad.indexed(grad, *cut, ids), reference_rows(grad, whole, ids))
        assert_same_bits(input_grad.batched(grad.expand(3, 7, 40), *cut)[2], reference(grad, whole.expert(2)))


@pytest.mark.in_part(3)
@each_dtype
def test_scales_far_apart_lose_no_bits(dtype: torch.dtype, device: str) -> None:
    """The rule: grad * global scale to 16 bits at least (24 for float32), sums in float32, one rounding.

    Scales of 24 bits and up to 2**20 apart. A gradient that is scaled and rounded to its own dtype, or float32 products
    in TF32, exceed the bound many times.
    """
    n, k = 200, 144
    weight = make_weight(2, n, k, device, lowest=0x01, highest=0x7F)
    weight.global_scale.copy_(torch.rand(2, n, device=device) * 2.0 ** torch.randint(-20, 1, (2, n), device=device))
    grad = torch.randn(40, n, device=device).to(dtype)
    ids = torch.arange(2, device=device).repeat_interleave(20)
    w = code_values(weight.qdata) * scale_values(weight.block_scale) * weight.global_scale.double()[..., None]
    exact = torch.cat([grad[:20].double() @ w[0], grad[20:].double() @ w[1]])
    terms = torch.cat([grad[:20].double().abs() @ w[0].abs(), grad[20:].double().abs() @ w[1].abs()])
    term_error = 2.0**-24 if dtype == torch.float32 else 2.0**-17
    bound = terms * (term_error + n * 2.0**-24) + exact.abs() * torch.finfo(dtype).eps / 2
    offs = torch.tensor([20, 40], device=device)
    twin = plain.input_grad(grad, *weight, None, offs)
    for dx in (input_grad.grouped(grad, *weight, offs), input_grad.indexed(grad, *weight, ids), twin):
        assert ((dx.double() - exact).abs() <= bound).all()


def test_small_gradients_of_float16_do_not_vanish(device: str) -> None:
    """Gradient times global scale lies below float16's range, and the result does not."""
    weight = exact_weight(1, 64, 48, device).expert(0)
    weight.global_scale.fill_(2.0**-20)
    grad = torch.full((4, 64), 2.0**-10, dtype=torch.float16, device=device)
    weight.qdata.fill_(0x77)
    weight.block_scale.view(torch.uint8).fill_(0x7E)
    assert_same_bits(input_grad.linear(grad, *weight), reference(grad, weight))
    assert input_grad.linear(grad, *weight).all()


def test_non_finite_gradients_show(device: str) -> None:
    weight = make_weight(1, 64, 48, device).expert(0)
    grad = make_x(3, 64, dtype=torch.bfloat16, device=device)
    grad[1, 5] = float("inf")
    dx = input_grad.linear(grad, *weight)
    assert dx[1].isnan().all()
    assert dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, w, o: (g[:, :-1], *w, o), r"grad: expected \[S, N\] with N = 64"),
        (lambda g, w, o: (g.double(), *w, o), r"grad: expected bfloat16, float16 or float32"),
        (lambda g, w, o: (g, *w, o[:1]), r"offs: expected shape \[2\]"),
    ],
)
def test_wrong_operands_are_named(change, message: str, device: str) -> None:
    weight = make_weight(2, 64, 48, device)
    grad, offs = make_x(3, 64, dtype=torch.bfloat16, device=device), torch.tensor([1, 3], device=device)
    with pytest.raises(ValueError, match=message):
        input_grad.grouped(*change(grad, weight, offs))


@pytest.mark.gpu
def test_a_replayed_cuda_graph_follows_the_offsets() -> None:
    """The launch may not depend on the offsets' values."""
    weight = make_weight(8, 256, 512, "cuda")
    grad = make_x(96, 256, dtype=torch.bfloat16, device="cuda")
    offs = torch.full((8,), 96, device="cuda")
    ids = torch.zeros(96, dtype=torch.int64, device="cuda")
    run = lambda: (input_grad.grouped(grad, *weight, offs), input_grad.indexed(grad, *weight, ids))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for ends in ([0, 10, 10, 40, 41, 90, 90, 90], [96, 96, 96, 96, 96, 96, 96, 96]):
        offs.copy_(torch.tensor(ends))
        ids.copy_(torch.randint(-1, 9, (96,)))
        graph.replay()
        for got, want in zip(replayed, run(), strict=True):
            assert_same_bits(got, want)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("tokens", [1, 200, 4096])
def test_large_gradients_agree_with_the_reference(tokens: int, dtype: torch.dtype) -> None:
    weight = exact_weight(16, 1536, 2048, "cuda")
    grad = make_x(tokens, 1536, dtype=dtype, device="cuda")
    ids = torch.randint(0, 16, (tokens,), device="cuda").sort().values
    expected = reference_rows(grad, weight, ids)
    offs = torch.bincount(ids, minlength=16).cumsum(0)
    assert_same_bits(input_grad.grouped(grad, *weight, offs), expected)
    assert_same_bits(input_grad.indexed(grad, *weight, ids), expected)
