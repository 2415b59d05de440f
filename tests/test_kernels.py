"""The Triton kernels against plain PyTorch, on a GPU or in Triton's interpreter.

Edges: K of one block and not a multiple of the tile; one output and odd N; no, one and many tokens; empty experts, all
tokens in one, rows of nobody; ids out of range; subnormal, NaN and negative scales; strided inputs; offsets past 2**31.

Most products are compared bit for bit: the operands are drawn so that every float32 sum is exact in any order, so the
result can differ only by a wrong operand, a scale applied in the wrong place, or a second rounding.
"""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fx_nvfp4 import format as oracle
from fx_nvfp4.kernels.batched import batched, linear
from fx_nvfp4.kernels.decode import fp32_to_e4m3, round_to_e2m1
from fx_nvfp4.kernels.dequantize import dequantize
from fx_nvfp4.kernels.fake_quantize import fake_quantize, fake_quantize_unscaled
from fx_nvfp4.kernels.grouped import grouped, row_groups
from fx_nvfp4.kernels.indexed import indexed

GOLDEN = Path(__file__).parent / "data" / "golden"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def e4m3_value(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if byte & 0x80 else value


def code_values(qdata: Tensor) -> Tensor:
    """Packed codes -> float64, the even element from the low nibble."""
    table = torch.tensor(E2M1 + [-v for v in E2M1], dtype=torch.float64, device=qdata.device)
    return table[torch.stack([qdata & 0xF, qdata >> 4], dim=-1).flatten(-2).long()]


def scale_values(block_scale: Tensor) -> Tensor:
    """Block scales -> float64, one per element."""
    table = torch.tensor([e4m3_value(b) for b in range(256)], dtype=torch.float64, device=block_scale.device)
    return table[block_scale.view(torch.uint8).long()].repeat_interleave(16, dim=-1)


class Weight(NamedTuple):
    qdata: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def expert(self, e: int) -> "Weight":
        return Weight(*(t[e] for t in self))


def make_weight(experts: int, n: int, k: int, device: str, lowest: int = 0x30, highest: int = 0x44) -> Weight:
    """Random codes; scale bytes from 0.5 to 1.5 unless told otherwise; global scales up to 16x apart between rows."""
    qdata = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(lowest, highest, (experts, n, k // 16), dtype=torch.uint8, device=device)
    global_scale = torch.rand(experts, n, device=device) * 0.015 + 0.001
    return Weight(qdata, scale.view(torch.float8_e4m3fn), global_scale)


def make_x(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Small integers: with make_weight's scales, sums of 2048 products need at most 23 bits."""
    return torch.randint(-4, 5, shape, device=device).to(dtype)


def reference(x: Tensor, weight: Weight, out_scale: Tensor | None = None) -> Tensor:
    """x [M, K] by one expert: the exact sum, rounded to float32, scaled once, rounded to x's dtype."""
    w = code_values(weight.qdata) * scale_values(weight.block_scale)
    scale = weight.global_scale if out_scale is None else weight.global_scale * out_scale
    return ((x.double() @ w.T).float() * scale).to(x.dtype)


def reference_rows(x: Tensor, weight: Weight, ids: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """Row s by expert ids[s], 0 where there is none."""
    out = torch.zeros(x.shape[0], weight.qdata.shape[1], dtype=x.dtype, device=x.device)
    for e in range(weight.qdata.shape[0]):
        scale = out_scale if out_scale is None or out_scale.ndim == 0 else out_scale[e]
        out[ids == e] = reference(x[ids == e], weight.expert(e), scale)
    return out


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equality that tells -0 from +0."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.contiguous().view(bits) != expected.contiguous().view(bits)).nonzero()
    where = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), f"{len(wrong)} of {actual.numel()}, first at {where}: {actual[where]} != {expected[where]}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@each_dtype
def test_dequantize_is_exact_for_every_byte_under_every_scale(dtype: torch.dtype, device: str) -> None:
    """Subnormal and negative scales, both NaN bytes, nibble order: all 256 x 512 values."""
    qdata = torch.arange(256, dtype=torch.uint8, device=device).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 32)
    expected = code_values(qdata) * scale_values(scale)
    actual = dequantize(qdata, scale.view(torch.float8_e4m3fn), None, dtype)
    nan = expected.isnan()
    assert nan.sum() == 2 * 512
    assert actual[nan].isnan().all()
    assert_same_bits(actual[~nan], expected.to(dtype)[~nan])


@each_dtype
def test_dequantize_multiplies_the_scales_first(dtype: torch.dtype, device: str) -> None:
    """code * (scale * global) differs from (code * scale) * global in the last bit of float32."""
    weight = make_weight(3, 5, 272, device, lowest=0x01, highest=0x7F)
    scale = scale_values(weight.block_scale).float() * weight.global_scale[..., None]
    assert_same_bits(dequantize(*weight, dtype), (code_values(weight.qdata).float() * scale).to(dtype))


@triton.jit
def convert_kernel(x_ptr, e4m3_ptr, e2m1_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    tl.store(e4m3_ptr + i, fp32_to_e4m3(x), mask=i < count)
    tl.store(e2m1_ptr + i, round_to_e2m1(x), mask=i < count)


@pytest.mark.parametrize("name", ["e4m3.byte", "e2m1.code"])
def test_conversions_are_those_of_cuda(name: str, device: str) -> None:
    """Ties and their neighbours, saturation, infinities, NaN, signed zeros, subnormals, as in the CUDA headers."""
    golden = load_file(GOLDEN / "conversions.safetensors", device=device)
    x, expected = golden[name.split(".")[0] + ".x"], golden[name]
    e4m3, e2m1 = torch.empty_like(expected), torch.empty_like(x)
    convert_kernel[(triton.cdiv(x.numel(), 256),)](x, e4m3, e2m1, x.numel(), BLOCK=256)
    if name == "e4m3.byte":
        assert torch.equal(e4m3, expected)
    else:
        assert_same_bits(e2m1, code_values(expected)[..., ::2].float().view_as(x))


@pytest.mark.parametrize("scale_index", range(5))
@pytest.mark.parametrize("name", DTYPES)
def test_fake_quantize_is_the_hardware_rule(name: str, scale_index: int, device: str) -> None:
    """Golden vectors: ties, subnormal and overflowing scales, NaN, infinities, zero blocks and their signs."""
    inputs = load_file(GOLDEN / "inputs.safetensors", device=device)
    hw = load_file(GOLDEN / "hw.safetensors", device=device)
    x, key = inputs[f"x_{name}"], f"{name}.gs{scale_index}"
    act_scale = inputs["gs"][scale_index].double().reciprocal()
    assert_same_bits(fake_quantize(x, act_scale), hw[f"{key}.qdq"].to(x.dtype))
    codes = hw[f"{key}.codes"]
    unscaled = code_values(codes[:, ::2] | codes[:, 1::2] << 4) * scale_values(hw[f"{key}.scale"])
    assert_same_bits(fake_quantize_unscaled(x, act_scale), unscaled.to(x.dtype))


@settings(max_examples=100, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16),
    tied=st.booleans(),
    scale=st.floats(2.0**-30, 2.0**10),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_fake_quantize_never_differs_from_the_oracle(bits: list[int], tied: bool, scale: float, dtype) -> None:
    """Any bit patterns, NaN and subnormals among them, or numbers half way between codes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    if tied:
        ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
        x = ties[torch.tensor(bits) % 9] * torch.where(torch.tensor(bits) % 2 == 0, 1.0, -1.0) * scale
    x, act_scale = x.to(dtype)[None].to(device), torch.tensor(scale, dtype=torch.float64, device=device)
    assert_same_bits(fake_quantize(x, act_scale), oracle.fake_quantize(x, act_scale))


@each_dtype
def test_fake_quantize_takes_the_scale_of_each_group(dtype: torch.dtype, device: str) -> None:
    """Scales per expert: by a group per row, and by the first dimension; rows of no group are 0."""
    x = torch.randn(3, 50, 96, device=device).to(dtype)
    act_scale = torch.tensor([0.001, 0.02, 0.0004], dtype=torch.float64, device=device)
    expected = torch.stack([fake_quantize(x[e], act_scale[e]) for e in range(3)])
    assert not torch.equal(expected[0], fake_quantize(x[0], act_scale[1]))
    assert_same_bits(fake_quantize(x, act_scale), expected)
    group = torch.arange(3, device=device).repeat(50, 1)
    assert_same_bits(fake_quantize(x.transpose(0, 1), act_scale, group), expected.transpose(0, 1))
    nobody = fake_quantize(x[0], act_scale, torch.tensor([3, -1], device=device).repeat(25))
    assert_same_bits(nobody.abs(), torch.zeros_like(nobody))


@pytest.mark.parametrize("rows", [0, 2])
def test_fake_quantize_of_zeros_or_nothing(rows: int, device: str) -> None:
    """The dynamic scale of zeros is 0: its inverse is infinite, and 0 * inf must not come out as NaN or 6."""
    x = torch.zeros(rows, 32, dtype=torch.bfloat16, device=device)
    assert_same_bits(fake_quantize(x, torch.zeros((), dtype=torch.float64, device=device)), x)


def out_scales(experts: int, device: str) -> list[Tensor | None]:
    return [None, torch.tensor(0.37, device=device), torch.rand(experts, device=device) + 0.1]


@pytest.mark.in_part(2)
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(0, 48, 80), (1, 1, 16), (5, 48, 80), (20, 33, 144), (70, 65, 256)])
def test_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    weight = make_weight(1, n, k, device).expert(0)
    x = make_x(m, k, dtype=dtype, device=device)
    assert_same_bits(linear(x, *weight), reference(x, weight))
    scale = torch.tensor(0.37, device=device)
    assert_same_bits(linear(x.view(1, m, k), *weight, scale), reference(x, weight, scale).view(1, m, n))


@pytest.mark.in_part(2)
@each_dtype
@pytest.mark.parametrize("m", [0, 1, 40])
def test_batched(m: int, dtype: torch.dtype, device: str) -> None:
    weight = make_weight(4, 48, 144, device)
    x = make_x(4, m, 144, dtype=dtype, device=device)
    for scale in out_scales(4, device):
        per_expert = [None if scale is None else scale.expand(4)[e] for e in range(4)]
        expected = torch.stack([reference(x[e], weight.expert(e), per_expert[e]) for e in range(4)])
        assert_same_bits(batched(x, *weight, scale), expected)


IDS = {"mixed": [3, 0, 3, 1, 0], "out_of_range": [-1, 2, 4, 0, 1 << 20], "one_row": [1], "none": []}


@pytest.mark.in_part(3)
@each_dtype
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_indexed(ids: list[int], dtype: torch.dtype, device: str) -> None:
    """Ids out of range, sentinels of expert parallelism, must neither be read nor leave memory unwritten."""
    weight = make_weight(4, 33, 272, device)
    x = make_x(len(ids), 272, dtype=dtype, device=device)
    for index_dtype in (torch.int32, torch.int64):
        index = torch.tensor(ids, dtype=index_dtype, device=device)
        for scale in out_scales(4, device):
            assert_same_bits(indexed(x, *weight, index, scale), reference_rows(x, weight, index, scale))


OFFS = {
    "empty_groups": (20, [0, 7, 7, 20]),
    "all_in_the_last": (20, [0, 0, 0, 20]),
    "all_in_the_first": (20, [20, 20, 20, 20]),
    "rows_of_nobody": (20, [3, 3, 9, 11]),
    "only_nobody": (20, [0, 0, 0, 0]),
    "a_tile_for_each_and_nobody": (5, [1, 2, 3, 4]),
    "several_tiles": (150, [1, 90, 90, 140]),
    "one_row": (1, [0, 0, 1, 1]),
    "no_rows": (0, [0, 0, 0, 0]),
}


@pytest.mark.in_part(5)
@each_dtype
@pytest.mark.parametrize(("s", "offs"), OFFS.values(), ids=OFFS.keys())
def test_grouped(s: int, offs: list[int], dtype: torch.dtype, device: str) -> None:
    weight = make_weight(4, 48, 80, device)
    x = make_x(s, 80, dtype=dtype, device=device)
    scales = out_scales(4, device)
    for index_dtype, some in ((torch.int32, scales[:2]), (torch.int64, scales[2:])):
        ends = torch.tensor(offs, dtype=index_dtype, device=device)
        group = row_groups(ends, s)
        assert group.tolist() == [sum(end <= row for end in offs) for row in range(s)]
        for scale in some:
            assert_same_bits(grouped(x, *weight, ends, scale), reference_rows(x, weight, group, scale))


def test_grouped_with_wrong_offsets_stays_inside(device: str) -> None:
    """An end beyond the rows would otherwise read and write past x and the output."""
    weight = make_weight(2, 16, 32, device)
    x = make_x(20, 32, dtype=torch.float16, device=device)
    wrong, right = (torch.tensor([4, last], device=device) for last in (1000, 20))
    assert_same_bits(grouped(x, *weight, wrong), grouped(x, *weight, right))


@pytest.mark.in_part(3)
@each_dtype
def test_any_scale_and_any_input(dtype: torch.dtype, device: str) -> None:
    """Subnormal to largest scales under normal x, against the error that float32 sums may have: TF32 exceeds it."""
    weight = make_weight(2, 48, 144, device, lowest=0x01, highest=0x7F)
    x = torch.randn(2, 20, 144, device=device).to(dtype)
    rows, ids = x.reshape(40, 144), torch.arange(2, device=device).repeat_interleave(20)
    w = code_values(weight.qdata) * scale_values(weight.block_scale) * weight.global_scale.double()[..., None]
    exact = x.double() @ w.transpose(1, 2)
    bound = x.double().abs() @ w.abs().transpose(1, 2) * 144 * 2.0**-23 + exact.abs() * torch.finfo(dtype).eps / 2
    for y in (
        batched(x, *weight),
        indexed(rows, *weight, ids).view(2, 20, 48),
        grouped(rows, *weight, torch.tensor([20, 40], device=device)).view(2, 20, 48),
    ):
        assert ((y.double() - exact).abs() <= bound).all()


def test_quantised_activations_enter_unscaled(device: str) -> None:
    """W4A4 with a scale per expert: code * block_scale into the product, the scale onto the sum."""
    weight = make_weight(3, 32, 64, device)
    x = make_x(3, 6, 64, dtype=torch.bfloat16, device=device)
    act_scale = torch.tensor([2.0**-9, 0.003, 0.011], dtype=torch.float64, device=device)
    operand = fake_quantize_unscaled(x, act_scale)
    expected = torch.stack([reference(operand[e], weight.expert(e), act_scale[e].float()) for e in range(3)])
    assert_same_bits(batched(operand, *weight, act_scale.float()), expected)


def test_strided_operands(device: str) -> None:
    """Rows, experts and outputs cut from larger tensors, and x transposed."""
    weight = make_weight(6, 64, 96, device)
    cut = Weight(*(t.view(torch.uint8)[1::2, 10:50] for t in weight[:2]), weight.global_scale[1::2, 10:50])
    whole = Weight(*(t.contiguous() for t in cut))
    x = make_x(96, 14, dtype=torch.float16, device=device).T[::2]
    wide = make_x(7, 200, dtype=torch.float16, device=device)[:, 30:126]
    ids = torch.tensor([2, 0, 0, 1, 2, 2, 1, 0] * 2, device=device)[1::2][:7]
    for rows in (x, wide):
        assert_same_bits(indexed(rows, *cut, ids), reference_rows(rows, whole, ids))
        offs = torch.tensor([2, 2, 7], device=device)
        assert_same_bits(grouped(rows, *cut, offs), reference_rows(rows, whole, row_groups(offs, 7)))
        assert_same_bits(batched(rows.expand(3, 7, 96), *cut)[2], reference(rows, whole.expert(2)))


def test_nan_scale_shows(device: str) -> None:
    """A NaN block scale is a broken checkpoint: its row must not come out as numbers, nor may it touch others."""
    weight = make_weight(1, 4, 32, device).expert(0)
    weight.block_scale.view(torch.uint8)[1, 0] = 0x7F
    y = linear(torch.ones(2, 32, dtype=torch.float16, device=device), *weight)
    assert y.isnan().tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(4, 48)}),
        ("x", {"x": torch.zeros(4, 32, dtype=torch.float64)}),
        ("qdata", {"qdata": torch.zeros(2, 8, 16)}),
        ("qdata", {"qdata": torch.zeros(2, 16, 8, dtype=torch.uint8).transpose(1, 2)[..., :12]}),
        ("block_scale", {"block_scale": torch.zeros(2, 8, 1, dtype=torch.uint8)}),
        ("global_scale", {"global_scale": torch.ones(2)}),
        ("block_scale", {"block_scale": torch.zeros(2, 2, 8, dtype=torch.uint8).transpose(1, 2)}),
        ("offs", {"offs": torch.tensor([4])}),
        ("out_scale", {"out_scale": torch.ones(3)}),
        ("out_scale", {"out_scale": torch.ones((), dtype=torch.float64)}),
    ],
)
def test_operands_that_do_not_fit_are_named(name: str, change: dict[str, Tensor]) -> None:
    """A kernel would read outside the tensors instead."""
    weight = make_weight(2, 8, 32, "cpu")
    arguments = {"x": torch.zeros(4, 32), **weight._asdict(), "offs": torch.tensor([2, 4]), **change}
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        grouped(**arguments)


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("tokens", [100, 400, 1500, 6000])
def test_every_tile_twice_at_size(tokens: int, dtype: torch.dtype) -> None:
    """Several tiles per expert, for each tile height: a race in the software pipeline makes runs differ."""
    weight = make_weight(16, 1536, 2048, "cuda")
    x = make_x(tokens, 2048, dtype=dtype, device="cuda")
    ids = torch.randint(0, 16, (tokens,), device="cuda").sort().values
    offs = torch.bincount(ids, minlength=16).cumsum(0)
    first = grouped(x, *weight, offs)
    assert_same_bits(grouped(x, *weight, offs), first)
    assert_same_bits(first, reference_rows(x, weight, ids))
    per_expert = x[: tokens // 16 * 16].view(16, -1, 2048)
    first = batched(per_expert, *weight)
    assert_same_bits(batched(per_expert, *weight), first)
    assert_same_bits(first[15], reference(per_expert[15], weight.expert(15)))
    assert_same_bits(indexed(x[:64], *weight, ids[:64]), reference_rows(x[:64], weight, ids[:64]))


@pytest.mark.gpu
def test_experts_beyond_32_bit_offsets() -> None:
    """3.8e9 bytes of codes: offsets to the last experts overflow 32 bits."""
    weight = make_weight(256, 4096, 7168, "cuda")
    ids = torch.tensor([0, 140, 146, 147, 254, 255], device="cuda")
    # Integers of at most 1 keep sums of 7168 products exact.
    x = torch.randint(-1, 2, (len(ids), 7168), device="cuda").to(torch.bfloat16)
    expected = torch.cat([reference(x[i, None], weight.expert(e)) for i, e in enumerate(ids.tolist())])
    assert_same_bits(indexed(x, *weight, ids), expected)
    offs = torch.bincount(ids, minlength=256).cumsum(0)
    assert_same_bits(grouped(x, *weight, offs), expected)
    assert_same_bits(batched(x[-1].expand(256, 1, 7168), *weight)[255], expected[-1:])


@pytest.mark.gpu
def test_grouped_under_a_cuda_graph() -> None:
    """The launch may not depend on the offsets' values: replaying with others must give their result."""
    weight = make_weight(8, 256, 512, "cuda")
    x = make_x(96, 512, dtype=torch.bfloat16, device="cuda")
    offs = torch.full((8,), 96, device="cuda")
    act_scale = torch.rand(8, dtype=torch.float64, device="cuda") * 0.01 + 0.001

    def run() -> Tensor:
        operand = fake_quantize_unscaled(x, act_scale, row_groups(offs, 96))
        return grouped(operand, *weight, offs, act_scale.float())

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for ends in ([0, 10, 10, 40, 41, 90, 90, 90], [96, 96, 96, 96, 96, 96, 96, 96]):
        offs.copy_(torch.tensor(ends))
        graph.replay()
        assert_same_bits(replayed, run())
        assert replayed[: ends[-1]].any(dim=1).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launch_follows_the_tensors_device() -> None:
    weight = make_weight(2, 64, 64, "cuda:1")
    x = make_x(8, 64, dtype=torch.bfloat16, device="cuda:1")
    ids = torch.tensor([0, 1] * 4, device="cuda:1")
    with torch.cuda.device(0):
        assert_same_bits(indexed(x, *weight, ids), reference_rows(x, weight, ids))
