"""The expression language of activation functions: what is refused, values, derivatives, Triton source, names.

Edges: ties and bounds of minimum, maximum, clamp and relu; NaN, infinities, signed zeros; tiny and huge arguments,
where 1 + x or 1 - exp(x) cancels or overflows; constants in every place of a call; near misses of known functions.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional

from fx_nvfp4.activation import FUNCTIONS, describe, parse, simplify
from fx_nvfp4.kernels.activation import compile_activation

CLAMPED = "(clamp(u, -7.0, 7.0) + 1.0) * (minimum(g, 7.0) * sigmoid(1.702 * minimum(g, 7.0)))"
INPUTS = [0.0, -0.0, 1e-30, 1e-7, 1e-3, 0.2, 0.3, 1.0, 1.5, 2.0, 3.0, 7.0, 19.0, 21.0, 89.0, 1e4, 3e38, math.inf]
ONE = [*INPUTS, *(-x for x in INPUTS), math.nan]


def call(name):
    return f"{name}({', '.join(['g', 'u', 'g - u'][: len(FUNCTIONS[name].partials)])})"


CALLS = ["where(g < u, g, u)" if name == "where" else call(name) for name in FUNCTIONS]
EXPRESSIONS = [
    *CALLS,
    "silu(g) * u",
    CLAMPED,
    "-g / (1.0 + exp(-g)) - u",
    "where(u >= 0.5, pow(u, 3), pow(2, u)) * where(g == 0, 1, -1)",
    "clamp(u, g, 1) + maximum(-2, g) * minimum(u, 1e3)",
    "clamp(u, 0.5, g)",
    "pow(u, -3.0)",
]


def grid():
    g, u = torch.meshgrid(torch.tensor(ONE), torch.tensor(ONE), indexing="ij")
    return g.flatten(), u.flatten()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x * u", "unknown name 'x'"),
        ("swish(u)", "unknown function 'swish'"),
        ("u.item()", "unknown function 'u.item'"),
        ("__import__('os').system('true')", r"unknown function"),
        ("g.__class__", "Attribute 'g.__class__' is not allowed"),
        ("[u][0]", "Subscript .* is not allowed"),
        ("lambda: u", "Lambda .* is not allowed"),
        ("u if g else u", "IfExp .* is not allowed"),
        ("u ** 2", r"BinOp 'u \*\* 2' is not allowed"),
        ("+u", "UnaryOp .* is not allowed"),
        ("u * True", "True is no number"),
        ("u + 'a'", "'a' is no number"),
        ("silu(g, u)", r"silu takes 1 positional arguments, found 'silu\(g, u\)'"),
        ("clamp(u, 1.0)", "clamp takes 3 positional arguments"),
        ("silu(x=u)", "silu takes 1 positional arguments"),
        ("silu(*u)", "silu takes 1 positional arguments"),
        ("g < u", "Compare 'g < u' is not allowed here"),
        ("where(g, u, u)", r"first argument of where\(\) must be one comparison, found 'g'"),
        ("where(0 < g < u, u, g)", "must be one comparison"),
        ("where(1 < 2, u, g)", "compares constants"),
        ("log(-1) * u", r"'log\(-1.0\)' is no number"),
        ("u / (1 / 0)", "'1.0 / 0.0' is no number"),
        ("2.0", "expected an expression over g and u, found a constant"),
        ("", "cannot be parsed"),
        ("silu(u", "cannot be parsed"),
        ("u; u", "cannot be parsed"),
        (f"u * 1{'0' * 400}", "cannot be parsed"),
        ("(" * 500 + "u" + ")" * 500, "cannot be parsed"),
    ],
)
def test_what_is_not_in_the_language_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_gate_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="uses g, but there is no gate"):
        parse("silu(g) * u").evaluate(None, torch.ones(2))


def test_constants_are_folded_and_texts_normalised():
    assert parse(" u*( 1/sqrt(4) )").text == "u * 0.5"
    assert parse("-(2) * u").text == "-2.0 * u"
    assert parse("u*2") == parse("u * 2.0")
    assert parse("minimum(u, 1e400)").text == parse(parse("minimum(u, 1e400)").text).text
    assert parse("u + u").names == {"u"}


PYTORCH = {
    "silu(g) * u": lambda g, u: functional.silu(g) * u,
    "gelu(g) * u": lambda g, u: functional.gelu(g) * u,
    "gelu_tanh(g) * u": lambda g, u: functional.gelu(g, approximate="tanh") * u,
    "relu(u) * relu(u) + 0.0 * g": lambda g, u: functional.relu(u).square() + 0.0 * g,
    CLAMPED: lambda g, u: (u.clamp(-7, 7) + 1) * (g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))),
    "where(u > g, tanh(u), u / 3.0)": lambda g, u: torch.where(u > g, u.tanh(), u / 3.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PYTORCH)
def test_values_are_those_of_pytorch_in_fp32(text, dtype):
    g, u = torch.randn(2, 400).to(dtype) * 4
    got = parse(text).evaluate(g, u)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, PYTORCH[text](g.float(), u.float()))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_derivatives_are_those_of_autograd(text):
    # Logarithms and roots want positive arguments; ties and bounds are met on the lattice of quarters.
    axis = (
        torch.arange(-12.0, 13.0) / 4
        if not any(n in text for n in ("log", "sqrt", "pow"))
        else torch.arange(1.0, 17) / 8
    )
    g, u = torch.meshgrid(axis, axis, indexing="ij")
    g, u = g.flatten().requires_grad_(), u.flatten().requires_grad_()
    y = parse(text).evaluate(g, u)
    assert not y.isnan().any()
    want = torch.autograd.grad(y.sum(), (g, u), materialize_grads=True)
    for slope, expected in zip(parse(text).partials(g.detach(), u.detach()), want, strict=True):
        slope = torch.as_tensor(slope).expand_as(expected)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


@triton.jit
def apply_kernel(g_ptr, u_ptr, out_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(g_ptr + i, mask=i < count, other=0.0), tl.load(u_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, ACTIVATION(g, u), mask=i < count)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_triton_computes_the_same(text, device):
    g, u = grid()
    # PyTorch's own gelu overflows where 2 * x does; elsewhere sums may be fused, and then cancel or overflow otherwise.
    largest = 1e38 if text.startswith("gelu") else math.inf if text in CALLS else 100.0
    kept = ~((g.abs() > largest) | (u.abs() > largest))
    g, u = g[kept], u[kept]
    out = torch.empty_like(g, device=device)
    function = compile_activation(parse(text).to_triton())
    apply_kernel[(triton.cdiv(g.numel(), 256),)](g.to(device), u.to(device), out, g.numel(), function, BLOCK=256)
    # pow() in Triton goes through the logarithm, whose error its exponent multiplies; 1 + erf and 1 + tanh cancel.
    rtol = 1e-4 if "pow" in text else 2e-5
    atol = 1e-6 if "gelu" in text else 1e-37 if text in CALLS else 1e-4
    torch.testing.assert_close(out.cpu(), parse(text).evaluate(g, u), rtol=rtol, atol=atol, equal_nan=True)


def test_one_text_is_compiled_once():
    source = parse("silu(g) * u").to_triton()
    assert compile_activation(source) is compile_activation(source)
    assert compile_activation(source) is not compile_activation(parse("gelu(g) * u").to_triton())


SAME = {
    "SwiGLU": ("silu(g) * u", ["g / (1 + exp(-g)) * u", "u * (g * sigmoid(g))", "g * 0.5 * (1 + tanh(0.5 * g)) * u"]),
    "GeGLU": ("gelu(g) * u", ["0.5 * g * (1 + erf(g / sqrt(2))) * u", "u * g * 0.5 * (1 + erf(0.70710678 * g))"]),
    "GeGLU (tanh)": (
        "gelu_tanh(g) * u",
        ["0.5 * g * (1 + tanh(0.7978845608 * (g + 0.044715 * pow(g, 3)))) * u"],
    ),
    "ReLU squared": ("relu(u) * relu(u)", ["pow(maximum(u, 0), 2)", "where(u > 0, u * u, 0.0)"]),
    "SiLU": ("silu(u)", ["u * sigmoid(u)"]),
    "clamped SwiGLU alpha=1.702 limit=7": (
        CLAMPED,
        [
            "(maximum(minimum(u, 7), -7) + 1) * clamp(g, -1e400, 7) * sigmoid(1.7020000219345093 * minimum(g, 7))",
        ],
    ),
    "clamped SwiGLU limit=10": ("silu(minimum(g, 10.0)) * clamp(u, -10.0, 10.0)", []),
    "quick GELU alpha=1.702": ("u * sigmoid(1.702 * u)", ["u / (1 + exp(-1.702 * u))"]),
}


@pytest.mark.parametrize("name", SAME)
def test_known_functions_are_named_and_spelled_shortest(name):
    short, others = SAME[name]
    for text in (short, *others):
        assert describe(text) == name
        assert simplify(text) == short


@pytest.mark.parametrize(
    "text",
    [
        "silu(g) * u * 1.0001",
        "silu(g) * u + 1e-06",
        "silu(u) * g",
        "clamp(silu(g) * u, -65504.0, 65504.0)",
        "where(g == 3.125, 0.0, silu(g) * u)",
        "relu(u) * u * sigmoid(50.0 * u)",
        CLAMPED.replace("-7.0", "-6.0"),
        "u * tanh(softplus(u))",
    ],
)
def test_near_misses_keep_their_own_text(text):
    assert describe(text) == simplify(text) == parse(text).text == text
