"""The prepacked layout: the same bits in the same number of bytes, and decoded exactly."""

import pytest
import torch

from fx_nvfp4.format import BLOCK, code_times_scale
from fx_nvfp4.prepack import DECODED_FACTOR, decode_tiles, permute_k, prepack, supports, unpack_tiles

NOT_NEGATIVE = [byte for byte in range(256) if byte < 0x81 or byte == 0xFF]


def weight(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code and every scale that is not negative, NaN and both zeros included."""
    *batch, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, (*batch, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.tensor(NOT_NEGATIVE, dtype=torch.uint8)
    index = torch.randint(0, len(scales), (*batch, n, k // BLOCK), generator=generator)
    return qdata, scales[index].view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(16, 64), (3, 32, 192), (2, 1, 48, 128)])
def test_round_trip_keeps_every_bit_and_adds_none(shape):
    qdata, block_scale = weight(*shape)
    words, scales = prepack(qdata, block_scale)
    assert words.numel() * 4 == qdata.numel()
    assert scales.numel() == block_scale.numel()
    again, scale_again = unpack_tiles(words, scales)
    assert torch.equal(again, qdata)
    assert torch.equal(scale_again.view(torch.uint8), block_scale.view(torch.uint8))


def test_round_trip_of_every_scale():
    bytes_ = torch.tensor(NOT_NEGATIVE + [0] * (192 - len(NOT_NEGATIVE)), dtype=torch.uint8)
    block_scale = bytes_.view(16, 12).view(torch.float8_e4m3fn)
    _, again = unpack_tiles(*prepack(torch.zeros(16, 96, dtype=torch.uint8), block_scale))
    assert torch.equal(again.view(torch.uint8), block_scale.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_tiles_are_exact_products(dtype):
    qdata, block_scale = weight(128, 512, seed=1)
    expected = permute_k(code_times_scale(qdata, block_scale))
    found = decode_tiles(*prepack(qdata, block_scale), dtype).float() * DECODED_FACTOR
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "k"), [(8, 64), (24, 64), (16, 16), (16, 96), (0, 64)])
def test_sizes_that_fill_no_tile_are_refused_by_name(n, k):
    assert not supports(n, k)
    with pytest.raises(ValueError, match=r"experts\.w1 is \["):
        prepack(*weight(n, k), name="experts.w1")


@pytest.mark.parametrize("byte", [0x81, 0x87, 0x88, 0xC0, 0xFE])
def test_negative_scales_are_refused_by_name(byte):
    qdata, block_scale = weight(16, 64)
    block_scale.view(torch.uint8)[3, 2] = byte
    with pytest.raises(ValueError, match=r"experts\.w1 has a negative block scale"):
        prepack(qdata, block_scale, name="experts.w1")
