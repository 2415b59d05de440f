"""The layer from exact products in float64, and the check of what is measured against it.

As in the ops, products are rounded to bf16, and so is h; activations that are quantised are so by the library's plain
reference. What is left between this and a right result is the order of fp32 sums, and one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.format import BLOCK, decode
from fx_nvfp4.reference import Activations

Call = tuple[Tensor, Tensor, Tensor]  # x bf16 [T, H], ids int64 [T, A], routing weights bf16 [T, A]
SAMPLED = 1024  # tokens that are compared, of those of a call


def decoded(w: NVFP4Weight, expert: int) -> Tensor:
    """Codes times block scales of one expert, float64 [N, K], by a table of all bytes: shares no code with kernels."""
    device = w.qdata.device
    pairs = decode(torch.arange(256, dtype=torch.uint8)).view(256, 2).double().to(device)
    codes = pairs[w.qdata[expert].long()].flatten(-2)
    scale = w.block_scale.view(torch.uint8)[expert].view(torch.float8_e4m3fn).double()
    return (codes.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


def product(x: Tensor, dense: Tensor, w: NVFP4Weight, expert: int) -> Tensor:
    """Rows x [M, K] times one decoded expert -> float64 [M, N], with x rounded as w's activations are."""
    operand, factor = Activations(w.activations, w.act_scale, w.dialect).of_expert(expert).enter(x)
    y = operand.double() @ dense.T * w.global_scale[expert].double()
    return y if factor is None else y * factor.double()


def exact(call: Call, gate_up: NVFP4Weight, down: NVFP4Weight, tokens: Tensor) -> Tensor:
    """The layer's result for some tokens of a call, float64 [len(tokens), H]."""
    x, ids, weights = (t[tokens] for t in call)
    out = torch.zeros(len(tokens), down.shape[1], dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        row, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = product(x[row], decoded(gate_up, e), gate_up, e).to(x.dtype).chunk(2, dim=-1)
        h = (F.silu(gate.float()) * up.float()).to(x.dtype)
        y = product(h, decoded(down, e), down, e).to(x.dtype)
        out.index_add_(0, row, y.double() * weights[row, slot, None].double())
    return out


def sample(tokens: int, device: torch.device) -> Tensor:
    """Which tokens are compared: all, or the first, the last and random ones between, in order."""
    if tokens <= SAMPLED:
        return torch.arange(tokens, device=device)
    generator = torch.Generator(device).manual_seed(tokens)
    inner = torch.randperm(tokens - 2, generator=generator, device=device)[: SAMPLED - 2] + 1
    ends = torch.tensor([0, tokens - 1], device=device)
    return torch.cat((inner, ends)).sort().values


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.double() - want).norm() / want.norm())


def checked(
    run: Callable[[], Tensor], want: Tensor, tokens: Tensor, bound: float, repeats: bool
) -> tuple[Tensor, float]:
    """(the result, its relative error), computed where memory held NaN before.

    Raises:
        AssertionError: the error is not below the bound, some output was not written, or, where ``repeats``, a second
            call gives other bits.
    """
    run()  # compiles, and takes the memory that is poisoned next
    poison(want.device)
    got = run()
    error = relative_error(got[tokens], want)
    assert error < bound, f"relative error {error:.2g}, allowed {bound:.2g}"
    assert got.isfinite().all(), "results that are not finite, as of memory that was not written"
    if repeats:
        poison(want.device)
        assert torch.equal(run(), got), "a second call gives other bits"
    return got, error


def poison(device: torch.device) -> None:
    """Fill all memory that the caching allocator holds and nobody uses with bytes that are NaN in every dtype.

    A CPU's allocator keeps no such memory.
    """
    if device.type != "cuda":
        return
    torch.cuda.synchronize()
    segments = [s for s in torch.cuda.memory_snapshot() if s.get("segment_pool_id", (0, 0)) == (0, 0)]
    free = [b["size"] for s in segments for b in s["blocks"] if b["state"] == "inactive"]
    # The largest first, so that none is cut for a smaller one.
    held = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sorted(free, reverse=True)]
    del held
