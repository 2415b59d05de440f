"""Golden vectors through the ops: every dialect by every body, where activations are rounded before a product or in it.

Bodies: plain PyTorch, C++, Triton kernels, and those on weights in tiles; native on a GPU, interpreted without one. The
weights are identities, so that the results are the rounded activations themselves, in whichever place a body rounds
them: as it gathers rows, or after the activation function of a block.
"""

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fx_nvfp4 import cpu, ops
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.kernels.entry import enter
from fx_nvfp4.kernels.fake_quantize import fake_quantize_unscaled
from fx_nvfp4.prepack import prepack
from fx_nvfp4.reference import Activations

pytestmark = pytest.mark.usefixtures("one_thread")
K = 64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CASES = [(d, t, i) for d in golden.PRODUCERS for t in golden.DTYPES for i in golden.GLOBAL_SCALES]
CASES = [c for c in CASES if golden.case(*c) is not None]
op = torch.ops.fx_nvfp4


@pytest.fixture(params=["plain", "c++", "kernels", "tiles"])
def body(request, device, monkeypatch):
    """(name, the device to run on)."""
    if request.param in ("plain", "c++"):
        monkeypatch.setenv("FX_NVFP4_CPU", request.param)
        return request.param, "cpu"
    if device == "cpu":
        monkeypatch.setattr(ops, "uses_kernels", lambda tensor: True)
    return request.param, device


def identity(body: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """One packed weight [K, K] that changes nothing."""
    qdata = nvfp4.pack(torch.eye(K, dtype=torch.uint8) * 2)
    scale = torch.ones(K, K // 16).to(torch.float8_e4m3fn)
    qdata, scale = prepack(qdata, scale) if body == "tiles" else (qdata, scale)
    return qdata.to(device), scale.to(device), torch.ones(K, device=device)


def wanted(dialect: str, dtype: str, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, global scale, code * block scale * global scale rounded once) of the rows that are numbers."""
    x, scale, expected = golden.case(dialect, dtype, i)
    block_scale = expected["scale"].view(torch.float8_e4m3fn).float()
    numbers = x.isfinite().all(1) & (expected["codes"] < 16).all(1) & block_scale.isfinite().all(1)
    values = nvfp4.code_times_scale(
        nvfp4.pack(expected["codes"][numbers]), block_scale[numbers].to(torch.float8_e4m3fn)
    )
    return x[numbers], scale, (values * scale.float()).to(x.dtype)


def skip_unless_served(body: str, dtype: str) -> None:
    if body == "tiles" and dtype == "f32":
        pytest.skip("fp32 has no kernels on tiles: the weight is unpacked")


@pytest.mark.parametrize(("dialect", "dtype", "i"), CASES)
def test_fake_quantize_gives_each_producers_values(dialect, dtype, i, body):
    if body[0] == "tiles":
        pytest.skip("no weight, no tiles")
    x, scale, expected = golden.case(dialect, dtype, i)
    values = op.fake_quantize(x.to(body[1]), scale.to(body[1]), dialect).cpu()
    assert golden.equal_with_signs(values, expected["qdq"].to(x.dtype))


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("i", golden.GLOBAL_SCALES)
def test_fake_quantize_gives_the_values_of_modelopts_kernel_for_finite_blocks(dtype, i, body):
    if body[0] == "tiles":
        pytest.skip("no weight, no tiles")
    x, scale, _ = golden.case("hardware", dtype, i)
    expected = golden.load("modelopt_kernel")[f"{dtype}.gs{i}.qdq"]
    values = op.fake_quantize(x.to(body[1]), scale.to(body[1]), "modelopt-kernel").cpu()
    finite = x.isfinite().unflatten(-1, (-1, 16)).all(-1)
    assert torch.equal(*(t.unflatten(-1, (-1, 16))[finite] for t in (values, expected)))


@pytest.mark.in_part(8)
@pytest.mark.parametrize(("dialect", "dtype", "i"), CASES)
def test_products_round_activations_to_each_producers_codes(dialect, dtype, i, body):
    name, device = body
    skip_unless_served(name, dtype)
    x, scale, want = wanted(dialect, dtype, i)
    assert len(x) > 40
    got = op.linear(x.to(device), *identity(name, device), scale.to(device), "static", dialect)
    assert torch.equal(got.cpu(), want)


@pytest.mark.in_part(16)
@pytest.mark.parametrize("product", ["first", "second"])
@pytest.mark.parametrize(("dialect", "dtype", "i"), [c for c in CASES if c[0] == "hardware" or c[2] == 2])
def test_blocks_round_before_either_product_to_each_producers_codes(dialect, dtype, i, product, body):
    name, device = body
    skip_unless_served(name, dtype)
    x, scale, want = wanted(dialect, dtype, i)
    scales = [scale.to(device), None] if product == "first" else [None, scale.to(device)]
    modes = ["none" if s is None else "static" for s in scales]
    one = [t.unsqueeze(0) for t in identity(name, device)]
    ids = torch.zeros(len(x), 1, dtype=torch.int64, device=device)
    up_scale = None if scales[0] is None else [scales[0]]
    given = ([t] for t in one)
    got = op.moe(
        x.to(device), ids, torch.ones(len(x), 1, device=device), *given, *one, "u", "plain",
        None, None, up_scale, scales[1], *modes, dialect,
    )  # fmt: skip
    assert torch.equal(got.cpu(), want)


# No input on which they differ


def by_cpp(x: Tensor, act: Activations) -> Tensor:
    return cpu._enter(x, act, None, 1)[0]


def by_kernel(x: Tensor, act: Activations) -> Tensor:
    return fake_quantize_unscaled(x, act.scale)


def by_entry(x: Tensor, act: Activations) -> Tensor:
    return enter(x, act_scale=act.scale, permute=False)


@pytest.mark.parametrize("rounded", [by_cpp, by_kernel, by_entry])
@settings(max_examples=100, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=K, max_size=K),
    tied=st.booleans(),
    scale=st.floats(2.0**-30, 2.0**10),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_no_body_ever_differs_from_the_oracle(rounded, bits, tied, scale, dtype):
    """Any bit patterns, NaN and subnormals among them, or numbers half way between codes."""
    device = "cuda" if torch.cuda.is_available() and rounded is not by_cpp else "cpu"
    if rounded is by_entry and dtype == torch.float32:
        dtype = torch.float16
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    if dtype != torch.float32 and not tied:
        x = torch.tensor(bits, dtype=torch.int64).to(torch.int16).view(dtype)
    if tied:
        ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
        x = ties[torch.tensor(bits) % 9] * torch.where(torch.tensor(bits) % 2 == 0, 1.0, -1.0) * scale
    act = Activations("static", torch.tensor(scale, dtype=torch.float64, device=device), "hardware")
    x = x.to(dtype)[None].to(device)
    assert golden.equal_with_signs(rounded(x, act), act.enter_rows(x, None, 1)[0])
