"""Ways in which models spell the dequantisation of NVFP4 weights, and a tracer that gives their ATen graphs.

Every spelling takes qdata uint8 [..., N, K/2], block_scale float8_e4m3fn [..., N, K/16] and a global scale that
broadcasts to [..., 1, 1] after `per_matrix`, and returns [..., N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
BLOCK = 16


@dataclass(frozen=True)
class Traced:
    """A traced function of tensors that returns one operand."""

    module: GraphModule
    operand: Node
    inputs: tuple[Node, ...]
    constants: Mapping[Node, Tensor]


def trace(
    fn: Callable[..., Tensor],
    *args: Tensor,
    tables: Sequence[int] = (),
    dynamic: Mapping[int, Sequence[int]] | None = None,
) -> Traced:
    """Traces `fn` as AOTAutograd does for Inductor; of the arguments numbered in `tables` values are known.

    `dynamic` gives, per argument, the dimensions whose sizes are symbols. Arguments may be on the meta device.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake = [_fake(mode, x, (dynamic or {}).get(i, ())) for i, x in enumerate(args)]
    with torch.no_grad():
        module = aot_export_joint_simple(
            lambda *a: (fn(*a),), fake, trace_joint=False, decompositions=select_decomp_table()
        )
    nodes = module.graph.nodes
    inputs = tuple(n for n in nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor))
    constants = {inputs[i]: args[i] for i in tables}
    constants.update({n: getattr(module, n.target) for n in nodes if n.op == "get_attr"})
    (operand,) = next(n for n in nodes if n.op == "output").args[0]
    return Traced(module, operand, inputs, constants)


def _fake(mode: FakeTensorMode, x: Tensor, symbolic: Sequence[int]) -> Tensor:
    if x.device.type == "meta":  # too large to hold: only its shape counts
        with mode:
            return torch.empty(x.shape, dtype=x.dtype)
    kinds = [DimDynamic.DYNAMIC if d in symbolic else DimDynamic.STATIC for d in range(x.dim())]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), static_shapes=False)


def packed(*shape: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """qdata and block scales, random, of a weight [..., N, K]."""
    *lead, k = shape
    if device == "meta":
        q = torch.empty(*lead, k // 2, dtype=torch.uint8, device=device)
        return q, torch.empty(*lead, k // BLOCK, dtype=torch.float8_e4m3fn, device=device)
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(*lead, k // BLOCK, generator=g) * 8 + 0.25
    return torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, generator=g), scale.to(torch.float8_e4m3fn)


def per_matrix(g: Tensor) -> Tensor:
    """A global scale [] or [1] as it is, one per expert [E] as [E, 1, 1]."""
    return g if g.numel() == 1 or g.dim() != 1 else g[:, None, None]


# Codes -> values, [..., N, K/2] -> [..., N, K] in float32


def _both(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack((low, high), -1).flatten(-2)


def lookup(q: Tensor, table: Tensor | None = None) -> Tensor:
    table = torch.tensor(E2M1) if table is None else table
    return _both(table[(q & 15).long()], table[(q >> 4).long()])


def lookup_of_eight(q: Tensor) -> Tensor:
    table = torch.tensor(E2M1[:8])
    codes = _both(q & 15, q >> 4)
    sign = torch.where((codes & 8).bool(), -1.0, 1.0)
    return table[(codes & 7).long()] * sign


def lookup_of_bytes(q: Tensor, table: Tensor | None = None) -> Tensor:
    if table is None:
        table = torch.tensor([[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)])
    return table[q.long()].flatten(-2)


def embedding(q: Tensor) -> Tensor:
    pairs = torch.tensor([[E2M1[b & 15], E2M1[b >> 4]] for b in range(256)])
    return torch.nn.functional.embedding(q.int(), pairs).flatten(-2)


def two_lookups_of_bytes(q: Tensor) -> Tensor:
    low = torch.tensor([E2M1[b & 15] for b in range(256)])
    high = torch.tensor([E2M1[b >> 4] for b in range(256)])
    return _both(low[q.int()], high[q.int()])


def index_select(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).int()
    return torch.index_select(torch.tensor(E2M1), 0, codes.flatten()).view(codes.shape)


def gather(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).long()
    return torch.gather(torch.tensor(E2M1), 0, codes.flatten()).view(codes.shape)


def arithmetic(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).int()
    sign, exponent, mantissa = 1.0 - 2.0 * (codes >> 3), (codes >> 1) & 3, codes & 1
    normal = (1.0 + 0.5 * mantissa) * torch.exp2((exponent - 1).float())
    return sign * torch.where(exponent == 0, 0.5 * mantissa, normal)


def float_bits(q: Tensor) -> Tensor:
    """Sign, exponent and mantissa moved to their places in float32, the bias corrected by a factor."""
    codes = _both(q & 15, q >> 4).int()
    bits = ((codes & 8) << 28) | ((codes & 7) << 22)
    return bits.view(torch.float32) * 2.0**126


def bfloat16_bits(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).to(torch.int16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)
    return bits.view(torch.bfloat16).float() * 2.0**126


def float8_bits(q: Tensor) -> Tensor:
    """The bits of a code are those of a float8_e4m3fn 64 times smaller."""
    codes = _both(q & 15, q >> 4)
    bits = ((codes & 8) << 4) | ((codes & 7) << 2)
    return bits.view(torch.float8_e4m3fn).float() * 64


def float16_bits(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).to(torch.int16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    return bits.view(torch.float16).float() * 2.0**14


def where_chain(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4)
    values = torch.zeros(codes.shape, dtype=torch.float32)
    for code, value in enumerate(E2M1):
        values = torch.where(codes == code, value, values)
    return values


def masked_fill(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4)
    values = torch.zeros(codes.shape, dtype=torch.float32)
    for code, value in enumerate(E2M1):
        values[codes == code] = value
    return values


def where_by_bit(q: Tensor) -> Tensor:
    """Each bit of a code chooses between two values."""
    codes = _both(q & 15, q >> 4)
    low, middle, high = ((codes & bit) != 0 for bit in (1, 2, 4))
    small = torch.where(middle, torch.where(low, 1.5, 1.0), torch.where(low, 0.5, 0.0))
    large = torch.where(middle, torch.where(low, 6.0, 4.0), torch.where(low, 3.0, 2.0))
    magnitude = torch.where(high, large, small)
    return torch.where(codes > 7, -magnitude, magnitude)


def one_hot(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4)
    hot = codes[..., None] == torch.arange(16, dtype=torch.uint8)
    return (hot * torch.tensor(E2M1)).sum(-1)


def one_hot_function(q: Tensor) -> Tensor:
    codes = _both(q & 15, q >> 4).long()
    return (torch.nn.functional.one_hot(codes, 16) * torch.tensor(E2M1)).sum(-1)


def slice_assign(q: Tensor) -> Tensor:
    table = torch.tensor(E2M1)
    values = torch.empty(*q.shape[:-1], q.shape[-1] * 2)
    values[..., 0::2] = table[(q & 15).int()]
    values[..., 1::2] = table[(q >> 4).int()]
    return values


def empty_then_flat(q: Tensor) -> Tensor:
    """Both halves of a byte written into a buffer of codes, which are then looked up."""
    codes = torch.empty(*q.shape, 2, dtype=torch.uint8)
    codes[..., 0] = q & 0xF
    codes[..., 1] = q >> 4
    return torch.tensor(E2M1)[codes.view(*q.shape[:-1], -1).long()]


def interleave(q: Tensor) -> Tensor:
    shift = torch.arange(q.shape[-1] * 2, dtype=torch.int32) % 2 * 4
    codes = (q.repeat_interleave(2, -1).int() >> shift) & 15
    return torch.tensor(E2M1)[codes]


def shift_by_vector(q: Tensor) -> Tensor:
    codes = (q[..., None].int() >> torch.tensor([0, 4], dtype=torch.int32)) & 15
    return torch.tensor(E2M1)[codes].flatten(-2)


def divide_and_remainder(q: Tensor) -> Tensor:
    table = torch.tensor(E2M1)
    low, high = torch.remainder(q.int(), 16), torch.div(q.int(), 16, rounding_mode="floor")
    return torch.cat((table[low].unsqueeze(-1), table[high].unsqueeze(-1)), -1).reshape(*q.shape[:-1], -1)


def doubled_integers(q: Tensor) -> Tensor:
    """A table of twice the values in int8, as integer kernels hold it."""
    table = torch.tensor([int(2 * v) for v in E2M1], dtype=torch.int8)
    return _both(table[(q & 15).long()], table[(q >> 4).long()]).float() * 0.5


def int8_bytes(q: Tensor) -> Tensor:
    """From bytes seen as int8, whose shift to the right keeps the sign."""
    signed = q.view(torch.int8)
    table = torch.tensor(E2M1)
    return _both(table[(signed & 15).long()], table[((signed >> 4) & 15).long()])


DECODERS = {
    f.__name__: f
    for f in (
        *(lookup, lookup_of_eight, lookup_of_bytes, embedding, two_lookups_of_bytes, index_select, gather, arithmetic),
        *(float_bits, bfloat16_bits, float16_bits, float8_bits, where_chain, where_by_bit, masked_fill, one_hot),
        *(one_hot_function, slice_assign, interleave, shift_by_vector, divide_and_remainder, doubled_integers),
        *(int8_bytes, empty_then_flat),
    )
}


# Scaling, values [..., N, K] -> weights


def by_blocks(v: Tensor, scale: Tensor) -> Tensor:
    return (v.unflatten(-1, (-1, BLOCK)) * scale[..., None]).flatten(-2)


def by_repeating(v: Tensor, scale: Tensor) -> Tensor:
    return v * scale.repeat_interleave(BLOCK, -1)


def dequantise(q: Tensor, s: Tensor, g: Tensor, dtype: torch.dtype = torch.bfloat16, decode: Any = lookup) -> Tensor:
    """The plain way: fp32 throughout, the global scale folded into the block scales, one rounding."""
    return by_blocks(decode(q), s.float() * per_matrix(g)).to(dtype)
