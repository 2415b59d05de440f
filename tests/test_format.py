"""The oracle against golden vectors made by the producers' own code and NVIDIA's conversions.

Edges: ties, neighbours of ties, zeros of both signs, subnormal and overflowing block scales, infinities, NaN,
magnitudes near fp32's underflow, K = 16, odd row counts, swizzles of partial tiles.
"""

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_nvfp4 import format as nvfp4
from fx_nvfp4.dialects import DIALECTS, encode_e2m1, encode_e4m3

CASES = [(d, t, i) for d in golden.PRODUCERS for t in golden.DTYPES for i in golden.GLOBAL_SCALES]
CASES = [c for c in CASES if golden.case(*c) is not None]


@pytest.mark.parametrize(("dialect", "dtype", "i"), CASES)
def test_quantize_gives_each_producers_scales_and_codes(dialect, dtype, i):
    x, scale, expected = golden.case(dialect, dtype, i)
    packed, block_scale = nvfp4.quantize(x, scale, dialect)
    # A NaN scale makes its block NaN whatever the codes, and either NaN byte says so.
    nan = block_scale.float().isnan()
    assert torch.equal(nan, expected["scale"].view(torch.float8_e4m3fn).float().isnan())
    assert torch.equal(block_scale.view(torch.uint8)[~nan], expected["scale"][~nan])
    blocks = nvfp4.unpack(packed).unflatten(-1, (-1, 16)), expected["codes"].unflatten(-1, (-1, 16))
    assert torch.equal(blocks[0][~nan], blocks[1][~nan])


@pytest.mark.parametrize(("dialect", "dtype", "i"), CASES)
def test_fake_quantize_gives_each_producers_values_to_the_sign_of_zero(dialect, dtype, i):
    x, scale, expected = golden.case(dialect, dtype, i)
    values = nvfp4.fake_quantize(x, scale, dialect)
    assert values.dtype == x.dtype
    assert golden.equal_with_signs(values, expected["qdq"].to(x.dtype))


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("i", golden.GLOBAL_SCALES)
def test_fake_quantize_gives_the_values_of_modelopts_kernel_for_finite_blocks(dtype, i):
    # Its file holds values alone; NaN was not run on a GPU, and zeros of blocks that vanish lose their sign.
    x, expected = golden.load("inputs")[f"x_{dtype}"], golden.load("modelopt_kernel")[f"{dtype}.gs{i}.qdq"]
    values = nvfp4.fake_quantize(x, 1.0 / golden.load("inputs")["gs"][i].double(), "modelopt-kernel")
    finite = x.isfinite().unflatten(-1, (-1, 16)).all(-1)
    blocks = (t.unflatten(-1, (-1, 16))[finite] for t in (values, expected))
    assert torch.equal(*blocks)


def test_a_float64_global_scale_recovers_the_divisor_that_a_float32_one_loses():
    divisor = golden.load("inputs")["gs"][1]
    assert 1.0 / (1.0 / divisor) != divisor, "the case that makes the difference"
    _, g = nvfp4.scale_pair(1.0 / divisor.double(), torch.device("cpu"))
    assert g == divisor


def test_e2m1_conversion_equals_cuda_headers_on_ties_nan_and_infinities():
    vectors = golden.load("conversions")
    assert torch.equal(encode_e2m1(vectors["e2m1.x"]), vectors["e2m1.code"])


def test_e4m3_conversion_equals_cuda_headers():
    vectors = golden.load("conversions")
    assert torch.equal(encode_e4m3(vectors["e4m3.x"]).view(torch.uint8), vectors["e4m3.byte"])


def test_code_times_scale_is_exact_in_bf16_and_fp16_for_every_code_and_scale():
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    exact = nvfp4.code_times_scale(nvfp4.pack(codes), scale, torch.float32)
    reference = torch.tensor(nvfp4.E2M1_VALUES).double() * scale.double()
    assert golden.equal_with_signs(exact.double(), reference)
    for dtype in (torch.bfloat16, torch.float16):
        assert golden.equal_with_signs(nvfp4.code_times_scale(nvfp4.pack(codes), scale, dtype).float(), exact)


def test_dequantize_rounds_the_exact_product_once():
    codes = torch.arange(16, dtype=torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(1)
    for s2 in (1 / 137.3, 0.000207, 3.0):
        s2 = torch.tensor(s2)
        exact = torch.tensor(nvfp4.E2M1_VALUES).double() * scale.double() * s2.double()
        for dtype in (torch.bfloat16, torch.float16):
            # scale * s2 is rounded to fp32 first, so a double rounding may differ where fp32 sits on a tie.
            got = nvfp4.dequantize(nvfp4.pack(codes), scale, s2, dtype)
            once = exact.float().to(dtype)
            assert (got == once).float().mean() > 0.999
            torch.testing.assert_close(got, once, rtol=2**-7, atol=0)


def test_low_nibble_is_the_even_element():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)


@pytest.mark.parametrize("i", range(4))
def test_swizzle_equals_golden_tiles_and_inverts(i):
    vectors = golden.load("swizzle")
    linear, tiles = vectors[f"swizzle{i}.linear"], vectors[f"swizzle{i}.swizzled"]
    assert torch.equal(nvfp4.swizzle(linear), tiles)
    assert torch.equal(nvfp4.unswizzle(tiles, *linear.shape), linear)


def test_global_scale_after_the_sum_gives_blackwells_output_and_vllms_way_does_not():
    g = golden.load("gemm")
    a = nvfp4.code_times_scale(nvfp4.pack(g["gemm.a_codes"]), g["gemm.a_scale"].view(torch.float8_e4m3fn))
    w = nvfp4.code_times_scale(nvfp4.pack(g["gemm.w_codes"]), g["gemm.w_scale"].view(torch.float8_e4m3fn))
    out = ((a @ w.T) * (g["gemm.a_s2"] * g["gemm.w_s2"])).bfloat16()
    assert torch.equal(out, g["gemm.out_hw_bf16"])
    assert (g["gemm.out_vllm_emulation_bf16"] == out).float().mean() < 0.6


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    blocks=st.integers(1, 4),
    dialect=st.sampled_from(sorted(DIALECTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_quantising_twice_changes_nothing(rows, blocks, dialect, dtype, seed):
    x = torch.randn(rows, blocks * 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scale = 2.0**-9  # a power of two, so that dequantised values are exact
    once = nvfp4.fake_quantize(x, scale, dialect)
    assert torch.equal(nvfp4.fake_quantize(once, scale, dialect).abs(), once.abs())
    if rows:
        assert (once.float() - x.float()).abs().max() <= x.float().abs().max() / 6 * 1.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nvfp4.quantize(torch.ones(2, 24), 1.0), r"multiple.*float32 \[2, 24\]"),
        (lambda: nvfp4.quantize(torch.ones(2, 16, dtype=torch.int32), 1.0), r"floating-point.*int32"),
        (lambda: nvfp4.quantize(torch.ones(2, 16), 1.0, "cuda"), r"unknown NVFP4 dialect 'cuda'; use one of"),
        (lambda: nvfp4.pack(torch.ones(2, 3, dtype=torch.uint8)), r"even last dim, got uint8 \[2, 3\]"),
        (lambda: nvfp4.pack(torch.ones(2, 4)), r"expected uint8 codes"),
        (lambda: nvfp4.unpack(torch.ones(2, 4)), r"expected uint8 bytes, got float32"),
        (
            lambda: nvfp4.dequantize(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1).to(torch.float8_e4m3fn)),
            r"codes: expected uint8, got int8 \[2, 8\]",
        ),
        (
            lambda: nvfp4.dequantize(torch.ones(2, 8, dtype=torch.uint8), torch.ones(2, 1)),
            r"block scales: expected float8_e4m3fn, got float32",
        ),
        (
            lambda: nvfp4.dequantize(
                torch.ones(2, 16, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.uint8).view(torch.float8_e4m3fn)
            ),
            r"need one scale per 16 elements, \[2, 2\], got \[2, 1\]; unswizzle",
        ),
        (lambda: nvfp4.unswizzle(torch.ones(100, dtype=torch.uint8), 128, 4), r"need 512 elements.*uint8 \[100\]"),
    ],
)
def test_bad_tensors_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scales_that_are_numbers_do_not_go_through_the_default_dtype():
    """Their fp32 reciprocals were those of rounded numbers; under a default of bfloat16, codes changed."""
    numbers = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            for number in numbers:
                got, want = (
                    nvfp4.scale_pair(number.item(), torch.device("cpu")),
                    nvfp4.scale_pair(number, number.device),
                )
                assert torch.equal(got[0], want[0])
                assert torch.equal(got[1], want[1])
        finally:
            torch.set_default_dtype(before)
