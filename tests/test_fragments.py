"""Decoding prepacked words in a kernel: the plain form against the twin in PyTorch, and which form a target takes."""

import pytest
import torch
import triton.language as tl
from test_prepack import weight

from fx_nvfp4.format import code_times_scale
from fx_nvfp4.kernels.fragments import decode_form, decode_tiles_kernel, prepacked_product_kernel
from fx_nvfp4.prepack import decode_tiles, permute_k, prepack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_form_decodes_every_code_and_scale_like_the_twin(dtype):
    words, scales = prepack(*weight(256, 64))
    out = torch.full((256, 64), float("nan"), dtype=dtype)
    name = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    decode_tiles_kernel[(1,)](words, scales.view(torch.uint16), out, 16, name, "plain")
    torch.testing.assert_close(out, decode_tiles(words, scales, dtype), rtol=0, atol=0, equal_nan=True)


FORMS = [
    (("cuda", 75), "plain"),
    (("cuda", 80), "sm80"),
    (("cuda", 89), "sm80"),
    (("cuda", 90), "sm90"),
    (("cuda", 120), "sm90"),
    (("hip", 942), "plain"),
    (("cuda", 90, True), "plain"),
]


@pytest.mark.parametrize(("target", "form"), FORMS)
def test_one_function_chooses_the_form(target, form):
    assert decode_form(*target) == form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_t", "block_k"), [(16, 128), (32, 64), (64, 128)])
def test_product_of_prepacked_weights(block_t, block_k, dtype):
    qdata, _ = weight(128, 256)
    block_scale = torch.rand(128, 16).add(0.5).to(torch.float8_e4m3fn)
    global_scale = torch.rand(128) + 0.5
    x = torch.randn(block_t + 3, 256).to(dtype)
    words, scales = prepack(qdata, block_scale)
    out = torch.full((block_t + 3, 128), float("nan"), dtype=dtype)
    prepacked_product_kernel[(2, 2)](
        *(out, permute_k(x).contiguous(), words, scales.view(torch.uint16), global_scale, len(x), 128, 256, "plain"),
        *(64, block_t, block_k),
    )
    expected = x.double() @ code_times_scale(qdata, block_scale).double().T * global_scale.double()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-2)
