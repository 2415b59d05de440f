"""Expert weights for the zoo: the same numbers, packed and dequantised in every way that its tables name.

A packing says how codes are stored and decoded (`spellings.DECODERS`), how scales are, and in which order the three are
multiplied; or that the weight is a packed tensor. NEAR_MISSES are no NVFP4, and must be left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from spellings import DECODERS, E2M1, by_blocks, by_repeating, lookup
from torch import Tensor, nn

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4 import format as nvfp4


@dataclass(frozen=True)
class Packing:
    """How a weight is held and, unless it is a packed tensor, spelled.

    codes: what the bytes are stored as; "high" has the high nibble first.
    scales: "e4m3", "bytes" or "swizzled" (128 x 4 tiles).
    order: a name of ORDERS.
    decode: codes in uint8 [.., K/2], low nibble first -> values in fp32 [.., K].
    tensor: "" or the activations of an NVFP4Weight: "none", "static" or "dynamic".
    """

    decode: Callable[[Tensor], Tensor] = lookup
    codes: str = "uint8"
    scales: str = "e4m3"
    order: str = "folded"
    tensor: str = ""


# values v in fp32 [.., N, K], block scales s [.., N, K/16], global scale g [.., 1, 1] -> weights in dtype
ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]] = {
    "folded": lambda v, s, g, dtype: by_blocks(v, s.float() * g).to(dtype),
    "repeated": lambda v, s, g, dtype: by_repeating(v, s.float() * g).to(dtype),
    "global last": lambda v, s, g, dtype: (by_blocks(v, s.float()) * g).to(dtype),
    "global first": lambda v, s, g, dtype: by_blocks(v * g, s.float()).to(dtype),
    "in the dtype": lambda v, s, g, dtype: by_blocks(v.to(dtype), s.to(dtype)) * g.to(dtype),
    "scale rounded": lambda v, s, g, dtype: by_blocks(v.to(dtype), (s.float() * g).to(dtype)),
    "in float16": lambda v, s, g, dtype: (by_blocks(v.half(), s.half()).float() * g).to(dtype),
    "divided": lambda v, s, g, dtype: by_blocks(v, s.float() / g).to(dtype),
    "divided last": lambda v, s, g, dtype: (by_blocks(v, s.float()) / g).to(dtype),
    "reciprocal": lambda v, s, g, dtype: by_blocks(v, s.float() * (1 / g)).to(dtype),
    "no global": lambda v, s, g, dtype: by_blocks(v, s.float()).to(dtype),
}
_DIVIDED = ("divided", "divided last", "reciprocal")

PACKINGS: dict[str, Packing] = {
    **{name: Packing(decode) for name, decode in DECODERS.items()},
    **{name: Packing(order=name) for name in ORDERS if name != "folded"},
    **{f"codes in {name}": Packing(codes=name) for name in ("high", "int8", "int32", "float4")},
    **{f"scales {name}": Packing(scales=name) for name in ("bytes", "swizzled")},
    **{
        f"packed tensor {name}": Packing(tensor=mode)
        for name, mode in (("W4A16", "none"), ("W4A4 static", "static"), ("W4A4 dynamic", "dynamic"))
    },
}

_OFF = [*E2M1[:5], 3.03, *E2M1[6:]]
_NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
_NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def _integers(q: Tensor) -> Tensor:
    codes = torch.stack((q & 15, q >> 4), -1).flatten(-2).float()
    return torch.where(codes > 7, codes - 16, codes)


# name -> (packing, part of the reason that the report must give)
NEAR_MISSES: dict[str, tuple[Packing, str]] = {
    "MXFP4": (Packing(scales="e8m0"), "block of 32"),
    "block of 32": (Packing(scales="block of 32"), "block of 32"),
    "int4": (Packing(_integers), "int4"),
    "NF4": (Packing(lambda q: lookup(q, torch.tensor(_NF4))), "NF4"),
    "changed table": (Packing(lambda q: lookup(q, torch.tensor(_OFF))), "table entry 5 is 3.03"),
    "sign flipped": (Packing(lambda q: lookup(q ^ 0x88)), "offset by 8"),
}


class Weight(nn.Module):
    """Expert weights [E, N, K] or one weight [N, K].

    Args:
        dense: float32 values, to be rounded to what the packing holds.
        packing: how they are held.
        dtype: of what the model computes with.
        stored: "rows" shows [.., N, K]; "transposed" shows [.., K, N]; "columns" as well, and packs along dim -2.
        gather: "packed" chooses experts among codes and scales, "dequantised" among the dense weights.
    """

    def __init__(
        self, dense: Tensor, packing: Packing, dtype: torch.dtype, stored: str = "rows", gather: str = "packed"
    ) -> None:
        super().__init__()
        self.packing, self.dtype, self.stored, self.gather = packing, dtype, stored, gather
        self.n, self.k = dense.shape[-2:]
        if packing.tensor:
            scale = torch.tensor(0.01, dtype=torch.float64) if packing.tensor == "static" else None
            w = NVFP4Weight.from_dense(dense.to(dtype), activations=packing.tensor, act_scale=scale)
            w = w if stored == "rows" else w.replace(transposed=True)
            self.packed = nn.Parameter(w, requires_grad=False)
            return
        for name, value in zip(("q", "s", "g"), _pack(dense, packing), strict=True):
            value = value.mT.contiguous() if stored == "columns" and value.dim() >= 2 else value
            self.register_buffer(name, value)

    def all(self) -> Tensor:
        """As the model sees it: [.., N, K], or [.., K, N] where it is stored so."""
        if self.packing.tensor:
            return self.packed
        return self._shown(self.q, self.s, self.g, self.dtype)

    def chosen(self, ids: Tensor) -> Tensor:
        """Weights of experts ids [..]: [.., N, K] or [.., K, N]."""
        if self.packing.tensor:
            return self.packed[ids]
        if self.gather == "packed":
            q = self.q.view(torch.uint8) if self.q.dtype == _F4 else self.q  # PyTorch cannot index float4
            return self._shown(q[ids], self.s[ids], self.g[ids], self.dtype)
        return self.all()[ids]

    def nk(self, ids: Tensor | None = None) -> Tensor:
        """[.., N, K], however it is stored."""
        w = self.all() if ids is None else self.chosen(ids)
        return w if self.stored == "rows" else w.transpose(-2, -1)

    def kn(self, ids: Tensor | None = None) -> Tensor:
        """[.., K, N], as products x @ w take it."""
        w = self.all() if ids is None else self.chosen(ids)
        return w.transpose(-2, -1) if self.stored == "rows" else w

    def truth(self) -> Tensor:
        """The values in float32, [.., N, K]."""
        if self.packing.tensor:
            w = self.packed.dequantize(torch.float32)
        else:
            w = self._shown(self.q, self.s, self.g, torch.float32)
        return w if self.stored == "rows" else w.transpose(-2, -1)

    def _shown(self, q: Tensor, s: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        if self.stored == "columns":
            q, s = q.transpose(-2, -1), s.transpose(-2, -1)
        s = self._scales(s)
        q = _bytes(q, self.packing.codes)
        g = g[..., None, None]
        w = ORDERS[self.packing.order](self.packing.decode(q), s, g, dtype)
        return w if self.stored == "rows" else w.transpose(-2, -1)

    def _scales(self, s: Tensor) -> Tensor:
        form = self.packing.scales
        if form == "e8m0":
            return torch.exp2(s.float() - 127).repeat_interleave(2, -1)
        if form == "block of 32":
            return s.float().repeat_interleave(2, -1)
        if form == "swizzled":
            s = _unswizzled(s, self.n, self.k // nvfp4.BLOCK)
        return s if form == "e4m3" else s.view(torch.float8_e4m3fn)


def _pack(dense: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and global scale [..] (one per matrix) as they are stored."""
    g = dense.abs().amax(dim=(-2, -1)) / nvfp4.TWO_LEVEL_MAX
    if packing.order == "no global":
        g = torch.ones_like(g)
    q, s = nvfp4.quantize(dense, g[..., None, None])
    g = 1 / g if packing.order in _DIVIDED else g
    if packing.scales == "e8m0":
        exponents = dense.unflatten(-1, (-1, 32)).abs().amax(-1).clamp(min=1e-6).log2().floor() + 127 - 2
        s, g = exponents.to(torch.uint8), torch.ones_like(g)
    if packing.scales == "block of 32":
        s = s[..., ::2].contiguous()
    if packing.scales == "bytes":
        s = s.view(torch.uint8)
    if packing.scales == "swizzled":
        s = _swizzled(s)
    return _stored(q, packing.codes), s, g


def _stored(q: Tensor, codes: str) -> Tensor:
    if codes == "high":
        return (q >> 4) | (q << 4)
    return q.view({"uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "float4": _F4}[codes])


def _bytes(q: Tensor, codes: str) -> Tensor:
    """Stored codes as bytes with the low nibble first, as models spell it."""
    if codes == "high":
        return (q >> 4) | (q << 4)
    return q if codes == "uint8" else q.view(torch.uint8)


_F4 = torch.float4_e2m1fn_x2


def _swizzled(s: Tensor) -> Tensor:
    """[.., N, K/16] -> bytes [.., rows, columns] of whole 128 x 4 tiles, as checkpoints for Blackwell hold them."""
    lead = s.shape[:-2]
    tall, wide = -(-s.shape[-2] // 128), -(-s.shape[-1] // 4)
    tiles = [nvfp4.swizzle(x).view(torch.uint8) for x in s.reshape(-1, *s.shape[-2:])]
    return torch.stack(tiles).view(*lead, tall * 128, wide * 4)


def _unswizzled(s: Tensor, rows: int, columns: int) -> Tensor:
    tall, wide = s.shape[-2] // 128, s.shape[-1] // 4
    tiles = s.reshape(*s.shape[:-2], tall, wide, 32, 4, 4).transpose(-4, -2)  # tall, 4, 32, wide, 4
    return tiles.reshape(*s.shape[:-2], tall * 128, wide * 4)[..., :rows, :columns]
