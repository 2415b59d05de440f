"""The rounding that `recognise_weight` finds in a weight's values, and the direction of its global scale."""

import pytest
from recognition import BF16, accepted, scaled, weight
from spellings import by_repeating, lookup, per_matrix

ROUNDINGS = {
    "bf16((v * s) * g)": lambda v, s, g: ((v * s) * g).to(BF16),
    "bf16(v * (s * g))": lambda v, s, g: (v * (s * g)).to(BF16),
    "fp32(v * (s * g))": lambda v, s, g: v * (s * g),
    "fp32((v * s) * g)": lambda v, s, g: (v * s) * g,
    "fp32((v * g) * s)": lambda v, s, g: (v * g) * s,
    "bf16(v * bf16(s * g))": lambda v, s, g: v.to(BF16) * (s * g).to(BF16),
    "bf16((v * s) * bf16(g))": lambda v, s, g: (v * s).to(BF16) * g.to(BF16),
    "bf16(bf16(v * bf16(g)) * s)": lambda v, s, g: v.to(BF16) * g.to(BF16) * s.to(BF16),
    "fp16(v * fp16(s * g))": lambda v, s, g: v.half() * (s * g).half(),
    "fp16(v * fp16(s * fp16(g)))": lambda v, s, g: v.half() * (s.half() * g.half()),
    "bf16(fp16((v * s) * g))": lambda v, s, g: ((v * s) * g).half().to(BF16),
    "bf16(v * (s / g))": lambda v, s, g: (v * (s / g)).to(BF16),
    "bf16((v * s) / g)": lambda v, s, g: (v * s / g).to(BF16),
    "fp16((v * s) / g)": lambda v, s, g: (v * s / g).half(),
    "bf16((v * s) / bf16(g))": lambda v, s, g: (v * s).to(BF16) / g.to(BF16),
    "bf16((v * s) * fp32(1 / g))": lambda v, s, g: (v * s * (1 / g)).to(BF16),
    "fp32(v * (s * fp32(1 / g)))": lambda v, s, g: v * (s * (1 / g)),
    "bf16((v * s) * bf16(1 / g))": lambda v, s, g: (v * s).to(BF16) * (1 / g).to(BF16),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_is_told_apart(name):
    """The formula that is named must be the one spelled, not one that differs once in 30,000 elements."""
    found, _ = accepted(scaled(ROUNDINGS[name]), *weight())
    assert found.formula == name
    assert found.global_op == ("divide" if "/" in name else "multiply")


def test_rounding_of_a_global_scale_in_float64():
    q, s, g = weight()
    fn = lambda q, s, g: by_repeating(lookup(q).double(), s.double() * per_matrix(g)).float()  # noqa: E731
    assert accepted(fn, q, s, g.double())[0].formula == "fp32((v * s) * g) in fp64"
