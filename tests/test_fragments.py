"""Decoding prepacked words in a kernel: the plain form against the twin in PyTorch, and which form a target takes."""

import pytest
import torch
import triton.language as tl
from test_prepack import weight

from fx_nvfp4.kernels.fragments import decode_form, decode_tiles_kernel
from fx_nvfp4.prepack import decode_tiles, prepack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_form_decodes_every_code_and_scale_like_the_twin(dtype, device):
    words, scales = prepack(*(t.to(device) for t in weight(256, 64)))
    out = torch.full((256, 64), float("nan"), dtype=dtype, device=device)
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
