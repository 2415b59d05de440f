"""The moe op: plain body, C++ body and kernels (on a GPU, or in Triton's interpreter) against a loop over slots.

Operands are drawn so that sums are exact in any order, so a rounding point in the wrong place shows. Edges: no token,
one token, one slot, one expert, an expert twice in a row of ids, ids out of range, experts without slots, strided
operands, NaN in one token and in a slot of nobody, symbolic numbers of tokens, results that CUDA graphs replay.
"""

import itertools
import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fx_nvfp4
from fx_nvfp4 import format as nvfp4
from fx_nvfp4 import ops
from fx_nvfp4.activation import parse

E, K, INNER, H, T, A = 5, 48, 32, 80, 7, 3
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Exact in fp32 wherever gate and up are, so that what is quantised next is the same everywhere.
EXACT = {True: "relu(g) * u", False: "relu(u) * relu(u)"}
MODES = [("none", "none"), ("static", "static"), ("expert", "dynamic"), ("dynamic", "expert"), ("none", "static")]
CASES = list(
    itertools.product(
        ["concatenated", "interleaved", "separate", "plain"], ["output", "input"], [False, True], DTYPES, MODES
    )
)
op = torch.ops.fx_nvfp4.moe


@pytest.fixture(params=["plain", "c++", "kernels"])
def body(request, device, monkeypatch):
    """The device to run on; without a GPU, kernels are interpreted on the CPU."""
    if request.param != "kernels":
        monkeypatch.setenv("FX_NVFP4_CPU", request.param)
        return "cpu"
    if device == "cpu":
        monkeypatch.setattr(ops, "uses_kernels", lambda tensor: True)
    return device


class Layer:
    """Operands of one block; .call() runs the op."""

    def __init__(self, layout="concatenated", weighted="output", bias=False, dtype=torch.float32,
                 modes=("none", "none"), experts=E, tokens=T, top=A, activation=None):  # fmt: skip
        self.g = torch.Generator().manual_seed(0)
        self.layout, self.weighted, self.modes, self.experts = layout, weighted, modes, experts
        gated = layout != "plain"
        self.activation = activation or EXACT[gated]
        shape = {"separate": (2, INNER), "plain": (1, INNER)}.get(layout, (1, 2 * INNER))
        self.ups = [self.weight(shape[1], K) for _ in range(shape[0])]
        self.down = self.weight(H, INNER)
        self.x = torch.randint(-4, 5, (tokens, K), generator=self.g).to(dtype)
        self.ids = torch.randint(0, experts, (tokens, top), generator=self.g)
        self.weights = torch.randint(1, 9, (tokens, top), generator=self.g).float() / 8
        self.up_bias = [self.biases(shape[1], dtype) for _ in self.ups] if bias else None
        self.down_bias = self.biases(H, torch.float32) if bias else None
        self.up_scale = [self.scale(modes[0], 0.003) for _ in self.ups]
        self.down_scale = self.scale(modes[1], 0.7)

    def weight(self, n, k):
        qdata = torch.randint(0, 256, (self.experts, n, k // 2), generator=self.g, dtype=torch.uint8)
        block_scale = torch.randint(0x30, 0x44, (self.experts, n, k // 16), generator=self.g, dtype=torch.uint8)
        return qdata, block_scale, torch.rand(self.experts, n, generator=self.g) * 0.015 + 0.001

    def biases(self, n, dtype):
        return torch.randn(self.experts, n, generator=self.g).to(dtype)

    def scale(self, mode, size):
        if mode in ("none", "dynamic"):
            return None
        shape = (self.experts,) if mode == "expert" else ()
        return torch.rand(shape, generator=self.g, dtype=torch.float64) * size + size / 4

    def operands(self, device="cpu"):
        """The arguments of the op."""
        modes = ["static" if mode == "expert" else mode for mode in self.modes]
        up_scale = None if self.up_scale[0] is None else self.up_scale
        moved = [
            self.x, self.ids, self.weights, *(list(parts) for parts in zip(*self.ups, strict=True)), *self.down,
            self.activation, self.layout, self.up_bias, self.down_bias, up_scale, self.down_scale,
            *modes, "hardware", self.weighted,
        ]  # fmt: skip
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tuple(moved))

    def call(self, device="cpu"):
        return op(*self.operands(device)).cpu()

    def expected(self):
        """(result, sum of the magnitudes of its terms) in float64, slot by slot."""
        total = torch.zeros(2, len(self.x), H, dtype=torch.float64)
        weights = self.weights.double().masked_fill((self.ids < 0) | (self.ids >= self.experts), 0)
        rows = self.x[:, None].expand(-1, self.ids.shape[1], -1)
        if self.weighted == "input":
            rows = (rows.float() * weights.float()[..., None]).to(self.x.dtype)
            weights = (weights != 0).double()
        halves = [self.product(rows, w, b, s, self.modes[0])
                  for w, b, s in zip(self.ups, self.up_bias or [None] * 2, self.up_scale, strict=False)]  # fmt: skip
        both = halves[0]
        gate, up = {
            "concatenated": lambda: both.split(INNER, dim=-1),
            "interleaved": lambda: (both[..., ::2], both[..., 1::2]),
            "separate": lambda: halves,
            "plain": lambda: (None, both),
        }[self.layout]()
        h = parse(self.activation).evaluate(gate, up).to(self.x.dtype)
        terms = self.product(h, self.down, self.down_bias, self.down_scale, self.modes[1]).double() * weights[..., None]
        total[0], total[1] = terms.sum(dim=1), terms.abs().sum(dim=1)
        return total

    def product(self, rows, weight, bias, scale, mode):
        """rows [T, A, K] by their slots' experts, rounded, and again with the bias; slots of nobody stay zero."""
        qdata, block_scale, global_scale = weight
        w = nvfp4.code_times_scale(qdata, block_scale.view(torch.float8_e4m3fn)).double()
        y = torch.zeros(*self.ids.shape, qdata.shape[1], dtype=rows.dtype)
        for t, a in itertools.product(*map(range, self.ids.shape)):
            e = int(self.ids[t, a])
            if not 0 <= e < self.experts:
                continue
            row, factor = rows[t, a].double(), global_scale[e]
            if mode != "none":
                s = scale if mode == "static" else scale[e] if mode == "expert" else (
                    rows[self.ids == e].abs().amax().double() / nvfp4.TWO_LEVEL_MAX)  # fmt: skip
                row = nvfp4.code_times_scale(*nvfp4.quantize(rows[t, a], s)).double()
                factor = factor * s.float()
            y[t, a] = ((w[e] @ row).float() * factor).to(rows.dtype)
            if bias is not None:
                y[t, a] = (y[t, a].float() + bias[e].float()).to(rows.dtype)
        return y

    def check(self, device):
        got, (want, magnitude) = self.call(device), self.expected()
        assert got.dtype == self.x.dtype
        assert got.shape == want.shape
        # One rounding of the result, and the order of the down product's sum in fp32, which is not quite exact.
        limit = torch.finfo(got.dtype).eps * magnitude + 1e-6 * (magnitude.amax() if len(want) else 0)
        assert ((got.double() - want).abs() <= limit).all()
        return got


def case_id(case):
    layout, weighted, bias, dtype, modes = case
    return f"{layout}-{weighted}-{'bias' if bias else 'nobias'}-{dtype}-{'+'.join(modes)}"


def build(case, **changes):
    layout, weighted, bias, dtype, modes = case
    return Layer(layout, weighted, bias, DTYPES[dtype], modes, **changes)


def with_strays(layer):
    layer.ids[0, 0], layer.ids[1, 1], layer.ids[2] = -1, layer.experts, torch.tensor([3, 3, 3])
    return layer


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_plain_body_is_the_loop(case):
    assert with_strays(build(case)).check("cpu").any()


@pytest.mark.in_part(6)
@pytest.mark.parametrize("case", random.Random(0).sample(CASES, 36), ids=case_id)
def test_kernels_are_the_loop(case, device, monkeypatch):
    monkeypatch.setattr(ops, "uses_kernels", lambda tensor: True)
    assert with_strays(build(case)).check(device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_case_on_the_gpu(case):
    assert with_strays(build(case)).check("cuda").any()


@pytest.mark.parametrize("activation", ["silu(g) * u", "gelu_tanh(g) * u", "(clamp(u, -7, 7) + 1) * minimum(g, 7)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_computed_in_fp32(body, activation, dtype):
    layer = Layer(bias=True, dtype=DTYPES[dtype], activation=activation)
    got, (want, magnitude) = layer.call(body), layer.expected()
    # An exponential that differs in its last bit may move h by one rounding.
    assert ((got.double() - want).abs() <= 4 * torch.finfo(got.dtype).eps * magnitude.amax()).all()


@pytest.mark.in_part(5)
@pytest.mark.parametrize("weighted", ["output", "input"])
@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once_to_the_dtype_asked_for(body, dtype, out_dtype, weighted):
    layer = Layer(weighted=weighted, dtype=DTYPES[dtype], modes=("static", "expert"))
    operands = layer.operands(body)
    sums = op(*operands, out_dtype=torch.float32).cpu()
    got = op(*operands, out_dtype=out_dtype).cpu()
    assert (sums.dtype, got.dtype) == (torch.float32, out_dtype)
    assert torch.equal(got, sums.to(out_dtype))
    assert torch.equal(layer.call(body), sums.to(layer.x.dtype))
    want, magnitude = layer.expected()
    assert ((sums.double() - want).abs() <= 1e-6 * magnitude.amax()).all()


def test_without_slots_the_result_has_the_dtype_asked_for(body):
    operands = Layer(dtype=torch.bfloat16, tokens=0).operands(body)
    assert op(*operands, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("modes", [("none", "none"), ("dynamic", "dynamic")])
def test_ids_out_of_range_contribute_nothing(body, index, modes):
    layer = Layer(modes=modes)
    layer.ids = torch.tensor([[0, -1, 9], [-1, 5, 1 << 30], [4, 4, 2], [2, 0, -7], [1, 3, 2], [5, 5, 5], [0, 0, 0]])
    layer.ids = layer.ids.to(index)
    got = layer.check(body)
    assert not got[[1, 5]].any()
    assert got[[0, 2, 3, 4, 6]].any(dim=1).all()


def test_ids_beyond_32_bits_are_out_of_range(body):
    layer = Layer()
    layer.ids[0] = torch.tensor([1 << 32, (1 << 40) + 1, -(1 << 32)])
    assert not layer.check(body)[0].any()


@pytest.mark.parametrize(
    "size",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"top": 1},
        {"top": 0},
        {"experts": 1},
        {"experts": 1, "top": 1, "tokens": 1},
        {"top": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", ["output", "input"])
def test_sizes(body, size, weighted):
    layer = Layer(weighted=weighted, modes=("dynamic", "static"), dtype=torch.float16, **size)
    got = layer.check(body)
    assert bool(got.any()) == bool(layer.ids.numel())


@pytest.mark.parametrize("weighted", ["output", "input"])
@pytest.mark.parametrize(("x", "weights"), [("bf16", torch.float32), ("f32", torch.bfloat16), ("f16", torch.float64)])
def test_routing_weights_of_another_dtype(body, x, weights, weighted):
    layer = Layer(dtype=DTYPES[x], weighted=weighted)
    layer.weights = layer.weights.to(weights)
    layer.check(body)


def test_rows_of_different_experts_are_scaled_apart_in_gate_and_up(body):
    layer = Layer("separate", modes=("expert", "none"))
    assert not torch.equal(layer.up_scale[0], layer.up_scale[1])
    layer.check(body)


def test_strided_operands(body):
    layer = Layer("interleaved", bias=True, dtype=torch.bfloat16)
    want = layer.call()

    def strided(t):
        wide = t.new_zeros(*(2 * n for n in t.shape[:-1]), t.shape[-1])
        wide[tuple(slice(0, n) for n in t.shape[:-1])] = t
        return wide[tuple(slice(0, n) for n in t.shape[:-1])]

    for name in ("x", "ids", "weights", "down_bias"):
        setattr(layer, name, getattr(layer, name).t().contiguous().t())
    layer.ups = [tuple(map(strided, up)) for up in layer.ups]
    layer.down = tuple(map(strided, layer.down))
    assert not layer.ups[0][0].is_contiguous()
    torch.testing.assert_close(layer.call(body), want)


def test_gate_and_up_may_lie_differently_in_memory(body):
    layer = Layer("separate", bias=True)
    want = layer.call()
    gate = layer.ups[0]
    layer.ups[0] = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in gate)
    assert layer.ups[0][0].stride() != layer.ups[1][0].stride()
    torch.testing.assert_close(layer.call(body), want)


@pytest.mark.parametrize("weighted", ["output", "input"])
def test_nan_stays_in_its_token(body, weighted):
    layer = Layer(weighted=weighted)
    want = layer.call()
    layer.x[2, 5] = float("nan")
    layer.weights[4, 0] = float("nan")
    layer.ids[5, 1], layer.weights[5, 1] = -1, float("nan")
    got = layer.call(body)
    assert got[[2, 4]].isnan().all()
    assert not got[[0, 1, 3, 5, 6]].isnan().any()
    torch.testing.assert_close(got[[0, 1, 3, 6]], want[[0, 1, 3, 6]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("modes", [("none", "none"), ("dynamic", "dynamic"), ("static", "expert")])
def test_slots_of_nobody_are_never_read(body, modes):
    """They are not written either, and hold what memory held before."""
    layer = with_strays(Layer(modes=modes))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        layer.check(body)
    finally:
        torch.use_deterministic_algorithms(before)


def dense_model(layer, x, weights):
    """The block on dequantised weights in differentiable PyTorch; quantised activations round as the identity."""
    inside = (layer.ids >= 0) & (layer.ids < E)
    ids = layer.ids.clamp(0, E - 1)

    def product(rows, weight, bias, scale, mode):
        if mode != "none":
            s = torch.as_tensor([scale[e] if mode == "expert" else scale for e in range(E)])[ids, None]
            rows = rows + (nvfp4.fake_quantize(rows.detach(), s) - rows.detach())
        w = nvfp4.dequantize(weight[0], weight[1].view(torch.float8_e4m3fn), weight[2][..., None])
        y = torch.einsum("tak,tank->tan", rows, w[ids])
        return y if bias is None else y + bias[ids]

    rows = x[:, None].expand(-1, A, -1)
    if layer.weighted == "input":
        rows = rows * weights[..., None]
    ups = [product(rows, w, b, s, layer.modes[0])
           for w, b, s in zip(layer.ups, layer.up_bias or [None] * 2, layer.up_scale, strict=False)]  # fmt: skip
    gate, up = (None, ups[0]) if layer.layout == "plain" else ups if len(ups) == 2 else (
        ups[0].chunk(2, -1) if layer.layout == "concatenated" else (ups[0][..., ::2], ups[0][..., 1::2]))  # fmt: skip
    y = product(
        parse(layer.activation).evaluate(gate, up), layer.down, layer.down_bias, layer.down_scale, layer.modes[1]
    )
    factor = weights if layer.weighted == "output" else torch.ones_like(weights)
    return (y * torch.where(inside, factor, 0.0)[..., None]).sum(dim=1)


def gradients(run, layer, device):
    x, weights = (t.to(device, copy=True).requires_grad_() for t in (layer.x, layer.weights))
    y = run(x, weights)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device)
    return [g.cpu() for g in torch.autograd.grad(y, (x, weights), grad)]


def replaced(layer, device):
    return lambda x, weights: op(x, layer.operands(device)[1], weights, *layer.operands(device)[3:])


@pytest.mark.parametrize("modes", [("none", "none"), ("static", "expert")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", ["output", "input"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "separate", "plain"])
def test_gradients_are_those_of_the_dense_block(layout, weighted, bias, modes, device):
    activation = "silu(g) * u" if layout != "plain" else "gelu(u)"
    layer = with_strays(Layer(layout, weighted, bias, modes=modes, activation=activation))
    got = gradients(replaced(layer, device), layer, device)
    want = gradients(lambda x, weights: dense_model(layer, x, weights), layer, "cpu")
    for g, w in zip(got, want, strict=True):
        assert w.any()
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradient_of_one_alone(wanted):
    layer = Layer()
    both = gradients(replaced(layer, "cpu"), layer, "cpu")
    x, weights = (t.clone().requires_grad_(w) for t, w in zip((layer.x, layer.weights), wanted, strict=True))
    y = replaced(layer, "cpu")(x, weights)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (got,) = torch.autograd.grad(y, [t for t, w in zip((x, weights), wanted, strict=True) if w], grad)
    assert torch.equal(got, both[0] if wanted[0] else both[1])


def test_changing_what_backward_needs_is_noticed():
    layer = Layer()
    x, weights = layer.x.requires_grad_(), layer.weights.clone()
    y = op(x, layer.ids, weights, *layer.operands()[3:])
    weights.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiled_training_is_the_same_for_any_number_of_tokens():
    frames = []

    def count(gm, example_inputs):
        frames.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    compiled = {}
    for tokens in (7, 3, 12):
        layer = Layer(bias=True, activation="silu(g) * u", tokens=tokens)
        rest = layer.operands()

        def block(x, ids, weights, up, scale, global_scale, *rest):
            return op(x, ids, weights, up, scale, global_scale, *rest)

        run = compiled.setdefault("block", torch.compile(block, backend=count, fullgraph=True, dynamic=True))
        got = gradients(lambda x, w, run=run, rest=rest: run(x, rest[1], w, *rest[3:]), layer, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(replaced(layer, "cpu"), layer, "cpu"), strict=True))
    assert len(frames) == 1


def test_compiled_gradients_of_transposed_operands():
    layer = Layer()
    x, ids, weights, *rest = layer.operands()
    x, weights = (t.t().contiguous().requires_grad_() for t in (x, weights))

    def block(x, weights):
        return op(x.t(), ids, weights.t(), *rest).sum()

    wanted = torch.autograd.grad(block(x, weights), (x, weights))
    got = torch.autograd.grad(torch.compile(block)(x, weights), (x, weights))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_with_symbolic_tokens_and_slots():
    layer = Layer(dtype=torch.bfloat16)
    x, ids, weights, *rest = layer.operands()
    trace = make_fx(
        lambda x, ids, weights: op(x, ids, weights, *rest), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    graph = trace(x, ids, weights)
    (node,) = graph.graph.find_nodes(op="call_function", target=op.default)
    rows, cols = node.meta["val"].shape
    assert isinstance(rows, torch.SymInt)
    assert cols == H
    assert node.meta["val"].dtype == torch.bfloat16


@pytest.mark.in_part(3)
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[-1], ("separate", "output", True, "f32", ("static", "expert"))], ids=case_id
)
def test_opcheck(case, device):
    layer = build(case)
    operands = layer.operands(device)
    x, ids, weights, *rest = operands
    torch.library.opcheck(op.default, (x.clone().requires_grad_(), ids, weights.clone().requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.fx_nvfp4.moe_backward.default, (op(*operands), *operands))
    torch.library.opcheck(torch.ops.fx_nvfp4.check_finite_block.default, operands, {"site": "here"})
    wide = {"out_dtype": torch.float32}
    torch.library.opcheck(op.default, (x.half().requires_grad_(), ids, weights.clone().requires_grad_(), *rest), wide)


def half(parts):
    return [t[:, : t.shape[1] // 2] for t in parts]


BAD = {
    "x": ({0: torch.ones(T, K, dtype=torch.float64)}, r"x must be float32, bfloat16 or float16 \[T, K\]"),
    "x 3-D": ({0: torch.ones(1, T, K)}, r"got torch.float32 \[1, 7, 48\]"),
    "K": ({0: torch.ones(T, 64)}, r"up weight 0: expected 5 experts .* and K = 64, got 5 experts and K = 48"),
    "ids dtype": ({1: torch.ones(T, A)}, r"ids must be int32 or int64 \[7, A\], got torch.float32"),
    "ids rows": ({1: torch.zeros(2, A, dtype=torch.int64)}, r"ids must be .* got torch.int64 \[2, 3\]"),
    "weights": ({2: torch.ones(T, 2)}, r"weights must be floating point \[7, 3\], one per id, got .* \[7, 2\]"),
    "integer weights": ({2: torch.ones(T, A, dtype=torch.int64)}, r"weights must be floating point"),
    "count": ({3: []}, r"layout 'concatenated' has 1 up weight\(s\): up_qdata must have as many tensors; got 0"),
    "two": ({10: "separate"}, r"layout 'separate' has 2 up weight\(s\): up_qdata must have as many tensors; got 1"),
    "biases": ({11: [torch.ones(E, 2 * INNER)] * 2}, r"up_bias must have as many tensors, or none; got 2"),
    "bias": (
        {11: [torch.ones(E, INNER)]},
        r"up weight 0: bias must be floating point \[5, 64\], got torch.float32 \[5, 32\]",
    ),
    "down bias": ({12: torch.ones(H)}, r"down weight: bias must be floating point \[5, 80\]"),
    "scales": ({15: "static"}, r"up_act_scale must have as many tensors; got 0"),
    "scale": ({16: "static"}, r"down weight: static activations need a float64 act_scale"),
    "mode": ({16: "int8"}, r"down weight: activations must be one of"),
    "dialect": ({15: "dynamic", 17: "mx"}, r"unknown NVFP4 dialect 'mx'"),
    "weighted": ({18: "both"}, r"weighted must be one of .*, got 'both'"),
    "out_dtype": ({19: torch.float64}, r"out_dtype must be None, float32, bfloat16 or float16, got torch.float64"),
    "layout": ({10: "stacked"}, r"layout must be one of .*, got 'stacked'"),
    "rows": ({10: "plain", 9: "relu(u)"}, r"layout 'plain' needs 32 rows for the down weight's K = 32, got 64"),
    "activation": ({9: "swish(g) * u"}, r"unknown function 'swish'"),
    "gate": ({10: "plain"}, r"uses the gate g, which layout 'plain' does not have"),
    "down": ({6: torch.zeros(E, H, 2, dtype=torch.float32)}, r"down weight: packed codes: expected uint8"),
    "global": ({8: torch.ones(E)}, r"down weight: global_scale must be float32 \[5, 80\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit_are_named(name):
    changes, message = BAD[name]
    operands = list(Layer().operands())
    for i, value in changes.items():
        operands[i : i + 1] = [value]
    with pytest.raises(ValueError, match=message):
        op(*operands)


def test_experts_of_another_number_are_named():
    operands = list(Layer().operands())
    operands[3:6] = [[t[0][:4]] for t in operands[3:6]]
    with pytest.raises(ValueError, match=r"up weight 0: expected 5 experts \(as the down weight has\).*got 4 experts"):
        op(*operands)


@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_autocast_does_not_round_the_products(autocast):
    layer = Layer()
    with torch.autocast("cpu", autocast):
        layer.check("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "modes", [("none", "none"), ("static", "static"), ("expert", "dynamic"), ("dynamic", "expert")]
)
@pytest.mark.parametrize("weighted", ["output", "input"])
def test_captured_in_a_cuda_graph_with_other_routings(modes, weighted):
    """Neither launch nor allocation may depend on the values of ids."""
    layer = Layer(weighted=weighted, modes=modes, bias=True, dtype=torch.bfloat16, tokens=200)
    operands = layer.operands("cuda")
    op(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(*operands)
    for ids in (torch.zeros_like(layer.ids), torch.randint(-1, E + 1, layer.ids.shape), torch.full_like(layer.ids, -1)):
        operands[1].copy_(ids)
        graph.replay()
        assert torch.equal(replayed, op(*operands))
        assert bool(replayed.any()) == bool((ids >= 0).any())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 100, 400, 3000])
def test_at_size_twice_and_against_the_grouped_ops(tokens):
    """Several tiles per expert, for each tile height: a race in the software pipeline makes runs differ."""
    torch.manual_seed(0)
    experts, k, inner, top = 32, 2048, 768, 8

    def weight(n, k):
        qdata = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
        block_scale = torch.randint(0x30, 0x44, (experts, n, k // 16), dtype=torch.uint8, device="cuda")
        return qdata, block_scale, torch.rand(experts, n, device="cuda") * 2e-3 + 1e-4

    up, down = weight(2 * inner, k), weight(k, inner)
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, device="cuda").topk(top).indices
    weights = torch.rand(tokens, top, device="cuda")
    operands = (x, ids, weights, *([t] for t in up), *down, "silu(g) * u", "concatenated")
    first = op(*operands)
    assert torch.equal(op(*operands), first)
    order = ids.flatten().argsort(stable=True)
    offs = torch.bincount(ids.flatten(), minlength=experts).cumsum(0)
    both = torch.ops.fx_nvfp4.grouped(x[order // top], *up, offs)
    h = (torch.nn.functional.silu(both[:, :inner].float()) * both[:, inner:].float()).bfloat16()
    y = torch.empty(tokens * top, k, device="cuda")
    y[order] = torch.ops.fx_nvfp4.grouped(h, *down, offs).float()
    want = (y.view(tokens, top, k) * weights[..., None]).sum(1)
    torch.testing.assert_close(first.float(), want, rtol=2e-2, atol=4e-3 * float(want.abs().max()))


def test_the_op_is_there_after_import():
    assert fx_nvfp4.moe.moe is not None
    assert "Tensor[] up_qdata" in str(op.default._schema)


def test_what_has_no_gradient_says_so():
    """Biases that were trained got none, in silence."""
    x, ids, weights, *rest = Layer(bias=True, dtype=torch.float32).operands()
    up_bias, down_bias = ([b.requires_grad_() for b in rest[8]], rest[9].requires_grad_())
    assert len(up_bias) == 1
    y = op(x.requires_grad_(), ids, weights, *rest)
    with pytest.raises(RuntimeError, match="no gradient for up_bias, down_bias: freeze"):
        y.sum().backward()
    rest[8], rest[9] = [b.detach() for b in up_bias], down_bias.detach()
    op(x, ids, weights, *rest).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("weighted", ["output", "input"])
def test_gradients_are_not_rounded_to_the_dtype_of_the_result(weighted):
    """Between the products they were, where out_dtype is shorter than x."""
    layer = Layer(weighted=weighted, dtype=torch.float32)

    def gradients(out_dtype):
        x, ids, weights, *rest = layer.operands()
        leaves = x.requires_grad_(), weights.float().requires_grad_()
        y = op(leaves[0], ids, leaves[1], *rest, out_dtype=out_dtype)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for got, want in zip(gradients(torch.bfloat16), gradients(None), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
