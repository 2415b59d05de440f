"""Operands that lie oddly in memory, odd sizes, numbers that are not finite, and ids that name no expert.

By every body that runs on a CPU, C++ and plain; on a GPU by the kernels. Each op is compared with itself on contiguous
operands, bit for bit, or with a dense product in float64.
"""

import pytest
import torch
from test_compile_features import compiled
from test_tensor import make_weight

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4
from fx_nvfp4.dialects import DIALECTS

E, N, K, S = 5, 32, 80, 8
op = torch.ops.fx_nvfp4
IDS = torch.tensor([0, 4, 1, 1, 4, -1, 0, 2])
STATIC = torch.tensor([0.01, 0.02, 0.013, 0.03, 0.011], dtype=torch.float64)
SCALES = {"none": None, "static": STATIC[0], "per expert": STATIC}
OPS = ("linear", "batched", "indexed", "grouped", "moe", "input_grad")


@pytest.fixture(params=["c++", "plain"])
def where(request, monkeypatch, device):
    """The device, with the body chosen that runs on a CPU."""
    if device == "cuda" and request.param == "plain":
        pytest.skip("a GPU has one body")
    monkeypatch.setenv("FX_NVFP4_CPU", request.param)
    return device


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Call:
    """Operands of one op for S tokens; run() calls it, each of them first put through `change`."""

    def __init__(self, name, mode="none", n=N, k=K, dtype=torch.float32, device="cpu"):
        self.name, self.mode, self.dtype, self.device = name, mode, dtype, device
        self.weight, self.up, self.gate = (make_weight((E, n, k), seed=s) for s in range(3))
        self.down = make_weight((E, 16, n), seed=3) if n % 16 == 0 else None
        self.x = numbers(E, S, k) if name == "batched" else numbers(S, n if name == "input_grad" else k)
        self.x = self.x.to(dtype)
        self.ids, self.offs = IDS.clone(), torch.tensor([2, 2, 3, 7, 8])
        self.slots, self.shares = torch.stack((IDS, IDS.flip(0)), 1), numbers(S, 2, seed=5).abs()

    def run(self, change=lambda t: t, *, routing=lambda t: t):
        def put(t):
            return change(t.to(self.device))

        x, slots, ids, offs = put(self.x), *(routing(t.to(self.device)) for t in (self.slots, self.ids, self.offs))
        scale = SCALES[self.mode]
        scale = scale.to(self.device) if scale is not None else None
        kind = "none" if self.mode == "none" else "static"
        parts = [put(t) for t in packed(self.weight)]
        if self.name == "linear":
            one = scale if scale is None or not scale.dim() else scale[3]
            return op.linear(x, *(t[3] for t in parts), one, kind)
        if self.name == "moe":
            ups = [[put(t) for t in packed(w)] for w in (self.gate, self.up)]
            down = [put(t) for t in packed(self.down)]
            act = [None, None, None if scale is None else [scale, scale], scale, kind, kind]
            shares = put(self.shares)
            return op.moe(x, slots, shares, *map(list, zip(*ups, strict=True)), *down, "silu(g) * u", "separate", *act)
        if self.name == "input_grad":
            return op.input_grad(x, *parts, ids=ids)
        extra = {"indexed": (ids,), "grouped": (offs,)}.get(self.name, ())
        return getattr(op, self.name)(x, *parts, *extra, scale, kind)


def packed(w):
    return w.qdata, w.block_scale.view(torch.uint8), w.global_scale


# Memory


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t):
    """Behind three other elements, so that no address is aligned."""
    return torch.cat((t.new_zeros(3), t.reshape(-1)))[3:].view(t.shape)


def strided(t):
    wide = t.new_zeros(*(2 * n for n in t.shape))
    part = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return part.copy_(t)


MEMORY = {"transposed": transposed, "offset": offset, "strided": strided}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["none", "per expert"])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("change", MEMORY.values(), ids=MEMORY)
def test_operands_may_lie_anyhow(where, name, change, mode, dtype):
    call = Call(name, "none" if name == "input_grad" else mode, dtype=dtype, device=where)
    want = call.run()
    assert want.any()
    assert torch.equal(call.run(routing=change), want)
    if where == "cuda" and change is not offset:
        # A copy of the weights at each call would be a silent one of gigabytes: kernels refuse it, and say so.
        with pytest.raises(ValueError, match="contiguous last dimension"):
            call.run(change)
    else:
        assert torch.equal(call.run(change), want)


@pytest.mark.parametrize("name", OPS)
def test_expanded_operands(where, name):
    """One row for all tokens, and one id for all slots, without a copy: the moe op once read a copy that was gone."""
    call = Call(name, device=where)
    call.x[..., :, :] = call.x[..., :1, :]
    call.ids[:], call.slots[:], call.offs[:] = 3, 3, S

    def expanded(t):
        if t.shape == call.x.shape and t.dtype == call.x.dtype:
            return t[..., :1, :].expand(t.shape)
        return t

    want = call.run()
    assert torch.equal(call.run(expanded), want)
    assert torch.equal(call.run(routing=lambda t: t.flatten()[0].expand(t.shape)), want)


@pytest.mark.parametrize("prepack", [False, "always"])
@torch.no_grad()
def test_compiled_products_of_odd_inputs(prepack):
    """An input's strides are the graph's own: each way to lie compiles anew, and is right."""
    weight = make_weight((N, 64), dtype=torch.float32)
    model = torch.nn.Linear(64, N)
    model.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = numbers(S, 64)
    want = x @ weight.dequantize().T + model.bias
    run = compiled(model, prepack, codegen=True)
    for change in (lambda t: t, *MEMORY.values(), lambda t: t[:1].expand(t.shape)):
        odd = change(x)
        rows = slice(None) if torch.equal(odd, x) else torch.zeros(S, dtype=torch.long)
        torch.testing.assert_close(run(odd), want[rows], rtol=1e-5, atol=1e-5)


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (17, 16), (33, 48), (1, 80), (16, 16)])
@pytest.mark.parametrize("name", [n for n in OPS if n not in ("moe", "input_grad")])
def test_one_block_of_k_and_odd_rows(where, name, n, k, dtype):
    call = Call(name, n=n, k=k, dtype=dtype, device=where)
    w, x = call.weight.dequantize(torch.float32).double(), call.x.double()
    if name == "linear":
        want = x @ w[3].T
    elif name == "batched":
        want = x @ w.mT
    else:
        ids = IDS if name == "indexed" else torch.bucketize(torch.arange(S), call.offs, right=True)
        want = torch.einsum("sk,snk->sn", x, w[ids]) * (ids >= 0)[:, None]
    bound = (2e-6 if dtype == torch.float32 else 2**-8) * want.abs().max()
    assert (call.run().cpu().double() - want).abs().max() <= bound


def test_a_block_of_the_smallest_sizes(where):
    """K and I of one block of 16, which fills no tile of any kernel."""
    call = Call("moe", n=16, k=16, device=where)
    dense = [w.dequantize(torch.float32) for w in (call.gate, call.up, call.down)]
    want = torch.zeros(S, 16)
    for t in range(S):
        for e, share in zip(call.slots[t].tolist(), call.shares[t], strict=True):
            if e >= 0:
                gate, up, down = (w[e] for w in dense)
                want[t] += share * (down @ (torch.nn.functional.silu(gate @ call.x[t]) * (up @ call.x[t])))
    torch.testing.assert_close(call.run().cpu(), want, rtol=1e-4, atol=1e-4)


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", SCALES)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_finite_reaches_no_other_token(where, name, mode, value, dtype):
    """With activations left alone or rounded by static scales. A dynamic scale is that of all rows of an expert."""
    call = Call(name, "none" if name == "input_grad" else mode, dtype=dtype, device=where)
    want = call.run()
    call.x[..., 1, 5] = value
    call.x[..., 6, :] = value
    got = call.run()
    others = torch.tensor([0, 2, 3, 4, 5, 7], device=where)
    assert torch.equal(got[..., others, :], want[..., others, :])
    if mode == "none":
        assert not got[..., 6, :].isfinite().all(dim=-1).any()


# Ids


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("FX_NVFP4_DEBUG_IDS", "1")


def routed(name, ids):
    """An op's result by other ids, and by those of them that name experts."""
    call, clean = Call(name), Call(name)
    ids = torch.tensor(ids)
    for c, chosen in ((call, ids), (clean, torch.where(ids < E, ids, -1))):
        c.ids, c.slots = chosen, torch.stack((chosen, chosen.flip(0)), 1)
    return call, clean


BEYOND = [0, 5, 1, 1 << 40, 4, -1, -(1 << 40), 2]


@pytest.mark.parametrize("name", ["indexed", "moe", "input_grad"])
def test_ids_that_name_no_expert_contribute_nothing(where, name):
    call, clean = routed(name, BEYOND)
    assert torch.equal(call.run(), clean.run())


@pytest.mark.parametrize("name", ["indexed", "moe"])
@pytest.mark.usefixtures("debug")
def test_the_debug_mode_names_ids_that_are_too_large(where, name):
    call, clean = routed(name, BEYOND)
    with pytest.raises(
        IndexError, match=rf"{name}: \d of \d+ expert ids are out of range, the first is 5 at \[1.*5 exp"
    ):
        call.run()
    clean.run()


@pytest.mark.parametrize(
    ("offs", "message"),
    [
        ([2, 2, 3, 7, 9], r"offset 9 at \[4\], after 7, for 8 rows"),
        ([2, 1, 3, 7, 8], r"offset 1 at \[1\], after 2"),
        ([-1, 2, 3, 7, 8], r"offset -1 at \[0\], after 0"),
    ],
)
@pytest.mark.usefixtures("debug")
def test_the_debug_mode_names_offsets_that_do_not_rise(where, offs, message):
    call = Call("grouped")
    call.run()
    call.offs = torch.tensor(offs)
    with pytest.raises(IndexError, match=message):
        call.run()


@pytest.mark.usefixtures("debug")
@torch.no_grad()
def test_the_debug_mode_reaches_compiled_models():
    weight = make_weight((E, N, 64), dtype=torch.float32)
    run = compiled(lambda x, ids: torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1))
    x, ids = numbers(4, 64), torch.tensor([0, 1, 4, -1])
    want = torch.einsum("sk,snk->sn", x, weight.dequantize()[ids])
    torch.testing.assert_close(run(x, ids), want, rtol=1e-5, atol=1e-4)
    with pytest.raises(IndexError, match=r"indexed: 1 of 4 expert ids .* the first is 5 at \[0\]"):
        run(x, ids + 5 * (ids == 0))


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("FX_NVFP4_DEBUG_IDS", "yes")
    with pytest.raises(ValueError, match='FX_NVFP4_DEBUG_IDS must be "0" or "1", got \'yes\''):
        Call("indexed").run()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_dynamic_scales_alone(value, device):
    """NaN made every other row of its expert zero, finite and plausible; infinity made them NaN."""
    weight = NVFP4Weight.from_dense(torch.randn(32, 64), "dynamic").to(device)
    x = torch.randn(4, 64, device=device) * 1e-3
    x[2, 7] = 1e-2  # the largest, with and without what is spoilt
    spoilt = x.clone()
    spoilt[0, 3] = value
    product = torch.nn.functional.linear
    assert torch.equal(product(spoilt, weight)[1:], product(x, weight)[1:])
    assert product(x, weight)[1:].abs().amax() > 0


@pytest.mark.parametrize("dialect", DIALECTS)
def test_values_too_small_for_a_dynamic_scale_are_zeros(dialect, device):
    """A scale that is 0 in fp32 gave NaN by two of the rules."""
    weight = NVFP4Weight.from_dense(torch.randn(32, 64), "dynamic", dialect=dialect).to(device)
    x = torch.randn(4, 64, device=device) * 1e-43
    x[0] = 0
    assert not torch.nn.functional.linear(x, weight).any()


def test_the_oracle_rounds_what_is_not_finite_block_by_block():
    """The rule behind the above: a block of 16 shares a scale, so what is not finite spoils no other block."""
    x = numbers(2, 48)
    want = nvfp4.fake_quantize(x, STATIC[0])
    x[0, 20] = float("nan")
    got = nvfp4.fake_quantize(x, STATIC[0])
    assert torch.equal(got[0, :16], want[0, :16])
    assert torch.equal(got[0, 32:], want[0, 32:])
    assert torch.equal(got[1], want[1])
