"""The ops: registration, the plain bodies against dense products in float64, and the device's own kernels.

Edges: no token, one token, experts without tokens, all tokens in one expert, rows of nobody, ids out of range,
gate and up rows with different global scales, per-expert, shared and dynamic activation scales, NaN in one token.
"""

import pytest
import torch

from fx_nvfp4 import format as nvfp4
from fx_nvfp4 import reference
from fx_nvfp4.reference import Activations

E, N, K = 5, 48, 80
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest output: one rounding to the dtype, and the order of an fp32 sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
op = torch.ops.fx_nvfp4


def make_weight(device, seed=0):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(E, N, K, generator=g)
    global_scale = torch.rand(E, N, generator=g) * 0.003 + 0.0005
    qdata, block_scale = nvfp4.quantize(dense, global_scale.unsqueeze(-1))
    return [t.to(device) for t in (qdata, block_scale.view(torch.uint8), global_scale)]


def make_x(*shape, device, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def dense(weight):
    qdata, block_scale, global_scale = (t.cpu() for t in weight)
    return (nvfp4.code_times_scale(qdata, block_scale.view(torch.float8_e4m3fn)).double()
            * global_scale.double().unsqueeze(-1))  # fmt: skip


def check(got, want, dtype):
    assert got.dtype == dtype
    assert got.shape == want.shape
    if want.numel():
        limit = TOLERANCE[dtype] * want.abs().max()
        assert (got.cpu().double() - want).abs().max() <= limit


ACTIVATIONS = {
    "none": (None, "none"),
    "static": (torch.tensor(0.0013, dtype=torch.float64), "static"),
    "per expert": (torch.tensor([0.0013, 0.0004, 0.002, 0.0008, 0.0011], dtype=torch.float64), "static"),
    "dynamic": (None, "dynamic"),
}


def entering(x, experts, activations):
    """The numbers that row s contributes in float64, by an explicit loop over experts."""
    scale, mode = activations
    x, out = x.cpu(), x.cpu().double()
    if mode == "none":
        return out
    for e in range(E):
        rows = experts == e
        if rows.any():
            s = x[rows].abs().amax().double() / nvfp4.TWO_LEVEL_MAX if mode == "dynamic" else scale.expand(E)[e]
            packed, block_scale = nvfp4.quantize(x[rows], s)
            out[rows] = nvfp4.code_times_scale(packed, block_scale).double() * s.float().double()
    return out


def routed(x, ids, weight, activations):
    inside = (ids >= 0) & (ids < E)
    y = torch.einsum("snk,sk->sn", dense(weight)[ids.clamp(0, E - 1)], entering(x, ids, activations))
    return y * inside.unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("ids", [[], [3], [2] * 7, [0, 4, 1, 1, 4, 4, 0, 2], [5, -1, 0, 3, 100]])
def test_indexed(device, dtype, activations, ids):
    weight, ids = make_weight(device), torch.tensor(ids, dtype=torch.int64)
    x = make_x(len(ids), K, device=device, dtype=dtype)
    scale = None if activations[0] is None else activations[0].to(device)
    got = op.indexed(x, *weight, ids.to(device), scale, activations[1])
    check(got, routed(x, ids, weight, activations), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("ends", [[0, 0, 0, 0, 0], [2, 2, 3, 9, 11], [0, 0, 40, 40, 40], [1, 2, 3, 4, 5]])
def test_grouped(device, dtype, activations, ends):
    weight, rows = make_weight(device), 11 if ends[-1] < 11 else ends[-1]
    x = make_x(rows, K, device=device, dtype=dtype)
    ids = torch.bucketize(torch.arange(rows), torch.tensor(ends), right=True)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    scale = None if activations[0] is None else activations[0].to(device)
    got = op.grouped(x, *weight, offs, scale, activations[1])
    check(got, routed(x, ids, weight, activations), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_batched(device, dtype, activations, rows):
    weight = make_weight(device)
    x = make_x(E, rows, K, device=device, dtype=dtype)
    ids = torch.arange(E).repeat_interleave(rows)
    scale = None if activations[0] is None else activations[0].to(device)
    got = op.batched(x, *weight, scale, activations[1])
    check(got, routed(x.reshape(-1, K), ids, weight, activations).view(E, rows, N), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)])
def test_linear(device, dtype, activations, shape):
    weight = [t[2] for t in make_weight(device)]
    x = make_x(*shape, K, device=device, dtype=dtype)
    scale = ACTIVATIONS[activations][0]
    got = op.linear(x, *weight, None if scale is None else scale.to(device), activations)
    rows = x.reshape(-1, K)
    want = entering(rows, torch.zeros(len(rows)), ACTIVATIONS[activations]) @ dense(weight).T
    check(got, want.view(*shape, N), dtype)


@pytest.mark.parametrize("dialect", ["vllm", "compressed-tensors", "modelopt", "torchao"])
def test_activations_follow_the_dialect_asked_for(device, dialect):
    weight = make_weight(device)
    # Blocks so small that the producers' smallest scales differ.
    x = make_x(6, K, device=device) * torch.tensor([1.0, 1e-3, 1e-4, 1e-5, 3.0, 0.0], device=device).unsqueeze(1)
    ids, scale = torch.tensor([0, 1, 2, 3, 4, 0]), ACTIVATIONS["per expert"][0]
    got = op.indexed(x, *weight, ids.to(device), scale.to(device), "static", dialect)
    packed, block_scale = nvfp4.quantize(x.cpu(), scale[ids, None], dialect)
    rounded = nvfp4.code_times_scale(packed, block_scale).double() * scale[ids, None].float()
    check(got, torch.einsum("snk,sk->sn", dense(weight)[ids], rounded), torch.float32)


def test_the_global_scale_enters_after_the_sum(device):
    # Folded into bf16 weights first, this one would change half of the outputs.
    weight = [t[0] for t in make_weight(device)]
    x = make_x(64, K, device=device, dtype=torch.bfloat16)
    exact = (x.cpu().double() @ dense(weight).T).float().bfloat16()
    assert (op.linear(x, *weight).cpu() == exact).float().mean() > 0.995


def test_nan_stays_in_its_token(device):
    weight = make_weight(device)
    x = make_x(6, K, device=device)
    x[2, 5] = float("nan")
    got = op.grouped(x, *weight, torch.tensor([2, 4, 4, 4, 6], device=device))
    assert got[2].isnan().all()
    assert not got[[0, 1, 3, 4, 5]].isnan().any()


def test_an_expert_without_tokens_is_never_dequantised(monkeypatch):
    seen = []
    monkeypatch.setenv("FX_NVFP4_CPU", "plain")  # test_cpu.py looks at the C++ body
    plain = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda x, q, *a: seen.append(q.data_ptr()) or plain(x, q, *a))
    qdata, *scales = make_weight("cpu")
    op.indexed(make_x(3, K, device="cpu"), qdata, *scales, torch.tensor([4, 1, 4]))
    assert seen == [qdata[1].data_ptr(), qdata[4].data_ptr()]


@pytest.mark.parametrize("dialect", ["hardware", "torchao"])
def test_fake_quantize_is_the_oracle(device, dialect):
    x, scale = make_x(7, K, device=device, dtype=torch.bfloat16), torch.tensor(0.002, dtype=torch.float64)
    got = op.fake_quantize(x, scale.to(device), dialect)
    assert torch.equal(got.cpu(), nvfp4.fake_quantize(x.cpu(), scale, dialect))


def test_dequantize_is_the_oracle(device):
    qdata, block_scale, global_scale = make_weight(device)
    got = op.dequantize(qdata, block_scale, global_scale, torch.bfloat16)
    scales = block_scale.cpu().view(torch.float8_e4m3fn), global_scale.cpu().unsqueeze(-1)
    assert torch.equal(got.cpu(), nvfp4.dequantize(qdata.cpu(), *scales, torch.bfloat16))


@pytest.mark.parametrize("name", ["linear", "batched", "indexed", "grouped"])
def test_gradients_of_x_are_those_of_the_dense_product(device, name):
    weight = [t[0] for t in make_weight(device)] if name == "linear" else make_weight(device)
    shape = (E, 3, K) if name == "batched" else (9, K)
    x = make_x(*shape, device=device).requires_grad_()
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 4, 4, 4], device=device)
    offs = torch.tensor([2, 3, 6, 6, 9], device=device)
    extra = {"indexed": (ids,), "grouped": (offs,)}.get(name, ())
    y = getattr(op, name)(x, *weight, *extra)
    out = torch.randn(y.shape, device=device)
    (grad,) = torch.autograd.grad(y, x, out)
    w = dense(weight).float().to(device)
    w = w if name == "linear" else w if name == "batched" else w[ids]
    want = {"linear": "sn,nk->sk", "batched": "esn,enk->esk"}.get(name, "sn,snk->sk")
    torch.testing.assert_close(grad, torch.einsum(want, out, w), rtol=1e-4, atol=1e-4)


def cases(device):
    weight, x = make_weight(device), make_x(9, K, device=device)
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 4, 4, 4], device=device)
    scale = torch.rand(E, dtype=torch.float64, device=device) * 0.01
    return {
        "linear": (x.clone().requires_grad_(), *(t[0] for t in weight)),
        "batched": (make_x(E, 3, K, device=device).requires_grad_(), *weight, scale, "static"),
        "indexed": (x, *weight, ids, None, "dynamic"),
        "grouped": (x, *weight, torch.tensor([2, 3, 6, 6, 9], device=device), scale, "static"),
        "fake_quantize": (x, scale[0]),
        "dequantize": (*weight, torch.bfloat16),
        "input_grad": (make_x(9, N, device=device), *weight, ids),
    }


@pytest.mark.parametrize("name", list(cases("cpu")))
def test_opcheck(device, name):
    torch.library.opcheck(getattr(op, name).default, cases(device)[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 64)}, r"indexed: x has K = 64, the packed weight K = 80"),
        ({0: torch.ones(3, K, dtype=torch.float64)}, r"indexed: x must be float32, bfloat16 or float16"),
        ({1: torch.ones(N, K // 2, dtype=torch.uint8), 2: torch.ones(N, K // 16, dtype=torch.uint8)}, r"expected 3-D"),
        ({3: torch.ones(E)}, r"indexed: global_scale must be float32 \[5, 48\], one per output row"),
        ({6: "int8"}, r"indexed: activations must be one of"),
        ({6: "static"}, r"static activations need a float64 act_scale of shape \[\[\], \[5\]\], got None"),
        ({5: torch.ones(3, dtype=torch.float64), 6: "static"}, r"got torch.float64 \[3\]"),
        ({6: "dynamic", 7: "mx"}, r"unknown NVFP4 dialect 'mx'"),
    ],
)
def test_bad_operands_are_named(change, message):
    args = [make_x(3, K, device="cpu"), *make_weight("cpu"), torch.tensor([0, 1, 2]), None, "none", "hardware"]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=message):
        op.indexed(*args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: op.batched(x.expand(2, 3, K), *w), r"batched: x must be \[5, M, K\].*got \[2, 3, 80\]"),
        (
            lambda x, w: op.indexed(x, *w, torch.tensor([0, 1])),
            r"ids must be int32 or int64 \[3\].*got torch.int64 \[2\]",
        ),
        (
            lambda x, w: op.grouped(x, *w, torch.tensor([1, 3])),
            r"offs must be int32 or int64 \[5\].*got torch.int64 \[2\]",
        ),
        (lambda x, w: op.indexed(x, *w, torch.ones(3)), r"ids must be int32 or int64 \[3\].*torch.float32"),
        (lambda x, w: op.fake_quantize(x, torch.ones(2, dtype=torch.float64)), r"one per row of a 2-D x \[3, 80\]"),
        (lambda x, w: op.fake_quantize(x, torch.ones(())), r"scale must be float64"),
    ],
)
def test_routing_that_does_not_fit_is_named(device, call, message):
    # On a GPU a wrong length would read outside the tensors.
    with pytest.raises(ValueError, match=message):
        call(make_x(3, K, device="cpu"), make_weight("cpu"))


def test_offsets_past_the_last_row_are_clamped(device):
    weight, x = make_weight(device), make_x(4, K, device=device)
    got = op.grouped(x, *weight, torch.tensor([2, 4, 9, 9, 9], device=device))
    want = op.grouped(x, *weight, torch.tensor([2, 4, 4, 4, 4], device=device))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dialect", ["hardware", "vllm"])
def test_zero_blocks_stay_zero_under_a_tiny_dynamic_scale(device, dialect):
    # The reciprocal of such a scale is infinite in fp32.
    x = torch.zeros(2, K, device=device)
    x[0, 0] = 5e-36
    got = op.linear(x, *(t[0] for t in make_weight(device)), None, "dynamic", dialect)
    assert not got.isnan().any()
    assert not got[1].any()


@pytest.mark.parametrize("dialect", ["hardware", "modelopt", "torchao", "compressed-tensors"])
def test_fake_quantize_returns_contiguous_rows_of_a_transposed_input(device, dialect):
    x = make_x(K, 6, device=device).t()
    torch.library.opcheck(
        op.fake_quantize.default, (x, torch.tensor(0.002, dtype=torch.float64, device=device), dialect)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dialect", ["hardware", "modelopt", "torchao", "compressed-tensors", "vllm"])
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_routed_products_are_captured_in_a_cuda_graph(dialect, activations):
    weight, x = make_weight("cuda"), make_x(9, K, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 4, 4, 4], device="cuda")
    offs = torch.tensor([2, 3, 6, 6, 9], device="cuda")
    scale = torch.rand(E, dtype=torch.float64, device="cuda") * 0.01 if activations == "static" else None

    def run():
        act = scale, activations, dialect
        return op.grouped(x, *weight, offs, *act), op.indexed(x, *weight, ids, *act)

    want = [y.clone() for y in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_activations_know_one_experts_scale():
    act = Activations("static", torch.tensor([1.0, 2.0], dtype=torch.float64), "hardware")
    assert act.of_expert(1).scale == 2.0
