"""Products with an NVFP4Weight: each spelling that models use equals the product with the dense weight, packed.

Edges: the weight on either side, K and rows contracted, experts as batch, summed or side by side, chosen experts of
two dims, more than three dims, broadcast, alpha and beta, one activation scale an expert, gradients.
"""

import pytest
import torch
from test_tensor import LAYOUTS, E, K, N, make_weight

import fx_nvfp4
from fx_nvfp4 import format as nvfp4

T, A = 3, 2
IDS = torch.tensor([[3, 0], [1, 1], [-1, 2]])
OFFS = torch.tensor([1, 1, 4, 6], dtype=torch.int32)


def einsum(spec):
    return lambda x, w: torch.einsum(spec, x, w)


# name -> (product of x and the weight, shape of x, dims that products contract: K or the rows N)
PRODUCTS = {
    "x @ w.mT": (lambda x, w: x @ w.mT, (T, K)),
    "x @ w.mT, batches": (lambda x, w: x @ w.mT, (E, T, K)),
    "x @ w.mT, four dims": (lambda x, w: x @ w.mT, (2, E, T, K)),
    "x @ w.mT, one row": (lambda x, w: x @ w.mT, (K,)),
    "x @ chosen, four dims": (lambda x, w: x[:, None, None] @ w[IDS].mT, (T, K)),
    "w @ x": (lambda x, w: w @ x, (E, K, T)),
    "w @ x, broadcast": (lambda x, w: w @ x, (K, T)),
    "w @ x, one column": (lambda x, w: w @ x, (K,)),
    "w[1] @ x": (lambda x, w: w[1] @ x, (K,)),
    "chosen @ x": (lambda x, w: w[IDS[:, 0]] @ x.unsqueeze(-1), (T, K)),
    "row . x": (lambda x, w: w[1, 5].dot(x), (K,)),
    "x . row": (lambda x, w: torch.vdot(x, w[1][5]), (K,)),
    "x @ row": (lambda x, w: x @ w[2, 7], (T, K)),
    "addmm": (lambda x, w: torch.addmm(torch.ones(N), x, w[1].t(), alpha=2.0, beta=0.5), (T, K)),
    "addmm, weight first": (lambda x, w: torch.addmm(torch.ones(T), w[1], x, beta=3), (K, T)),
    "addmv": (lambda x, w: torch.addmv(torch.ones(N), w[1], x, alpha=0.5), (K,)),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.full((1, 1, N), float("nan")), x, w.mT, beta=0), (E, T, K)),
    "linear": (lambda x, w: torch.nn.functional.linear(x, w[2], torch.arange(N).float()), (2, T, K)),
    "linear, rows of up": (lambda x, w: torch.nn.functional.linear(x, w[2][N // 2 :]), (2, T, K)),
    "linear, all rows side by side": (lambda x, w: torch.nn.functional.linear(x, w.flatten(0, 1)), (2, T, K)),
    "loop": (lambda x, w: sum(x @ e.T for e in w), (T, K)),
    "split": (lambda x, w: x @ w[0].split([32, N - 32], dim=0)[1].T, (T, K)),
    "interleaved rows": (lambda x, w: x @ w[:, ::2].mT + x @ w.mT[..., 1::2], (E, T, K)),
    "stacked": (lambda x, w: x @ torch.stack([w[1], w[3]]).mT, (T, K)),
    "blocks of K": (lambda x, w: x[:, :32] @ w[1][:, :32].T + x[:, 32:] @ w[1, :, 32:].T, (T, K)),
    "experts in parallel": (einsum("tk,enk->ten"), (T, K)),
    "experts in parallel, first": (einsum("tk,enk->etn"), (T, K)),
    "experts in parallel, weight first": (lambda x, w: torch.einsum("enk,btk->bent", w, x), (2, T, K)),
    "expert batches": (einsum("ebk,enk->ebn"), (E, T, K)),
    "expert batches of groups": (einsum("gebk,enk->gebn"), (2, E, T, K)),
    "summed over experts": (einsum("tek,enk->tn"), (T, E, K)),
    "chosen": (lambda x, w: torch.einsum("tnk,tk->tn", w[IDS[:, 0]], x), (T, K)),
    "chosen slots": (lambda x, w: torch.einsum("tk,tank->tan", x, w[IDS]), (T, K)),
    "chosen slots, weight first": (lambda x, w: torch.einsum("tank,tk->tan", w[IDS], x), (T, K)),
    "chosen slots of their own": (lambda x, w: torch.einsum("tank,tak->tan", w[IDS], x), (T, A, K)),
    "chosen slots summed": (lambda x, w: torch.einsum("tank,tak->tn", w[IDS], x), (T, A, K)),
    "gate and up in groups": (lambda x, w: torch.einsum("tk,egnk->gten", x, w.view(E, 2, N // 2, K)), (T, K)),
    "bmm of chosen": (lambda x, w: torch.bmm(w[IDS.flatten()], x.repeat_interleave(A, 0)[..., None])[..., 0], (T, K)),
    "rows": (lambda x, w: x @ w, (E, T, N)),
    "rows of one": (lambda x, w: x @ w[1], (2, T, N)),
    "rows of one, linear": (lambda x, w: torch.nn.functional.linear(x, w[1].t()), (2, T, N)),
    "rows of chosen": (lambda x, w: torch.einsum("tnk,tn->tk", w[IDS[:, 0]], x), (T, N)),
    "rows summed over experts": (einsum("ten,enk->tk"), (T, E, N)),
    "rows of one, left": (lambda x, w: w[1].t() @ x, (N,)),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_product_means_the_same_in_every_mode(name, context, layout):
    product, shape = PRODUCTS[name]
    weight, x = layout(make_weight(dtype=torch.float32)), torch.randn(shape)
    with context():
        got = product(x, weight)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, product(x, weight.dequantize()), rtol=1e-4, atol=1e-4)


@pytest.mark.in_part(4)
@pytest.mark.parametrize("name", PRODUCTS)
def test_compiled_product_is_packed(name):
    product, shape = PRODUCTS[name]
    weight = torch.nn.Parameter(make_weight(dtype=torch.float32), requires_grad=False)
    x = torch.randn(shape, requires_grad="row" not in name or "rows" in name)
    torch._dynamo.reset()
    compiled = torch.compile(product, backend="nvfp4_emu", fullgraph=True, options={"codegen": False, "strict": True})
    got, want = compiled(x, weight), product(x, weight.dequantize())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if not x.requires_grad:
        return
    mine, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["x @ w.mT", "chosen slots", "experts in parallel", "expert batches of groups"])
def test_weights_stored_transposed_multiply_alike(name):
    product, shape = PRODUCTS[name]
    weight, x = make_weight(dtype=torch.float32), torch.randn(shape)
    stored = weight.replace(transposed=True)
    torch.testing.assert_close(product(x, stored.mT), product(x, weight), rtol=0, atol=0)


@pytest.mark.in_part(4)
@pytest.mark.parametrize(
    "name", ["chosen slots", "chosen slots of their own", "experts in parallel", "x @ w.mT, four dims"]
)
def test_any_number_of_tokens_is_one_graph(name):
    product, shape = PRODUCTS[name]
    product = product if "chosen" not in name else _with_ids(product)
    weight = torch.nn.Parameter(make_weight(dtype=torch.float32), requires_grad=False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("nvfp4_emu")
    compiled = torch.compile(product, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 9):
        x = torch.randn(tokens, *shape[1:])
        ids = torch.randint(E, (tokens, A))
        args = (x, weight, ids) if "chosen" in name else (x, weight)
        want = product(*(a.dequantize() if a is weight else a for a in args))
        torch.testing.assert_close(compiled(*args), want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def _with_ids(product):
    """The einsum of PRODUCTS with ids as an argument."""
    own = product is PRODUCTS["chosen slots of their own"][0]
    return lambda x, w, ids: torch.einsum("tank,tak->tan" if own else "tank,tk->tan", w[ids], x)


SCALES = torch.tensor([0.001, 0.002, 0.004, 0.0005], dtype=torch.float64)


def test_activations_are_rounded_with_each_experts_own_scale():
    weight = make_weight(dtype=torch.float32, activations="static", act_scale=SCALES)
    x, dense = torch.randn(T, K), weight.dequantize(torch.float32)
    for ids in (IDS, None):
        scale = SCALES if ids is None else SCALES[ids]
        rounded = nvfp4.fake_quantize(x[:, None].expand(T, scale.shape[-1], K).contiguous(), scale[..., None])
        chosen = dense.expand(T, E, N, K) if ids is None else dense[ids]
        want = torch.einsum("tak,tank->tan", rounded, chosen)
        got = torch.einsum("tk,enk->ten", x, weight) if ids is None else torch.einsum("tk,tank->tan", x, weight[ids])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [torch._grouped_mm, torch.nn.functional.grouped_mm])
def test_grouped_products(call):
    weight = make_weight()
    x = torch.randn(6, K).bfloat16()
    group = torch.searchsorted(OFFS.long(), torch.arange(6), right=True)
    want = torch.einsum("snk,sk->sn", weight.dequantize(torch.float32)[group], x.float())
    for out_dtype in (None, torch.bfloat16):
        got = call(x, weight.transpose(-2, -1), offs=OFFS, out_dtype=out_dtype)
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0.02)
    y = torch.randn(6, N).bfloat16()
    want = torch.einsum("snk,sn->sk", weight.dequantize(torch.float32)[group], y.float())
    torch.testing.assert_close(call(y, weight, offs=OFFS).float(), want, rtol=2**-7, atol=0.1)
    batches = torch.randn(E, 3, K).bfloat16()
    torch.testing.assert_close(call(batches, weight.mT), torch.bmm(batches, weight.mT), rtol=0, atol=0)


def test_grouped_product_with_a_bias_is_not_silently_without():
    offs = torch.tensor([1, 1, 3, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="Bias"):
        torch._grouped_mm(torch.randn(5, K).bfloat16(), make_weight().mT, offs=offs, bias=torch.ones(E, N).bfloat16())


def test_a_product_of_two_packed_weights_takes_dense_ones_and_is_reported():
    weight = torch.nn.Parameter(make_weight((N, K), dtype=torch.float32), requires_grad=False)
    report = fx_nvfp4.explain(lambda: weight @ weight.t())
    assert len(report.refused) == 2
    dense = weight.dequantize()
    torch.testing.assert_close(weight @ weight.t(), dense @ dense.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", [einsum("nk,nk->nk"), einsum("tk,nk->t")])
def test_einsums_that_are_no_product_are_refused_with_advice(product):
    with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
        product(torch.randn(N, K), make_weight((N, K)))


def test_a_product_that_contracts_rows_is_reported_as_what_it_is():
    weight = torch.nn.Parameter(make_weight((N, K), dtype=torch.float32), requires_grad=False)
    report = fx_nvfp4.explain(lambda x: x @ weight, torch.randn(3, N))
    assert [m.op for m in report.matched] == ["input_grad"]
    assert not report.refused
