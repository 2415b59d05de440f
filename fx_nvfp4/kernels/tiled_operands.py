"""What the products on tiled weights take: weights, rows and tiles, checked, and the constants of their launches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fragments import form_of
from .launch import dependent_launch
from .operands import require
from .sizes import cdiv, next_power_of_2
from .tile_config import TileConfig, needs_wait, takes_pairs, target_of


class TiledOperand(NamedTuple):
    """Tiled weights of E experts, or a view of some of their tiles of rows; see fx_nvfp4/prepack.py.

    Interleaved gate and up share words and scales, and each has its own global_scale and bias.
    """

    words: Tensor  # int32 [E, tiles of rows, K/64, 32, 4]
    scales: Tensor  # uint8 [E, tiles of rows, K/64, 32, 2]
    global_scale: Tensor  # float32 [E, N]
    bias: Tensor | None  # [E, N]

    @property
    def k(self) -> int:
        return self.words.shape[2] * 64

    @property
    def n(self) -> int:
        return self.global_scale.shape[1]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.words, self.scales.view(torch.uint16), self.global_scale, self.bias

    def strides(self) -> tuple[int, ...]:
        bias = (0, 0) if self.bias is None else self.bias.stride()
        return self.words.stride(0), *self.global_scale.stride(), *bias

    def check(self, x: Tensor, rows_of_output: int = 1) -> None:
        """Raise ValueError unless the kernels can read it, and x with it."""
        words, scales, global_scale, bias = self
        experts, tiles, chunks = words.shape[:3]
        rows = (experts, tiles * 16 // rows_of_output)
        fits = (
            (words.dtype, scales.dtype, global_scale.dtype) == (torch.int32, torch.uint8, torch.float32)
            and words.shape[3:] == (32, 4)
            and scales.shape == (experts, tiles, chunks, 32, 2)
            # Whole tiles, one after the other, and one stride over experts for both.
            and words.stride()[1:] == (chunks * 128, 128, 4, 1)
            and scales.stride()[1:] == (chunks * 64, 64, 2, 1)
            and (experts == 1 or scales.stride(0) * 2 == words.stride(0))
            and global_scale.shape == rows
            and (bias is None or bias.shape == rows)
            and x.dtype in (torch.bfloat16, torch.float16)
            and x.is_contiguous()
            and x.shape[-1] == chunks * 64
            and len({t.device for t in (x, words, scales, global_scale)}) == 1
        )
        if not fits:
            tensors = {"x": x, "words": words, "scales": scales, "global_scale": global_scale, "bias": bias}
            raise ValueError(
                "tiled weight: expected x [.., K], contiguous, float16 or bfloat16; words int32 [E, N/16, K/64, 32, 4] "
                "and scales uint8 [.., 32, 2], contiguous but for E; global_scale float32 and bias [E, N] with N = "
                f"{rows[1]}; found {', '.join(f'{n} {_describe(t)}' for n, t in tensors.items())}"
            )


def _describe(t: Tensor | None) -> str:
    return "None" if t is None else f"{t.dtype} {list(t.shape)} with strides {t.stride()} on {t.device}"


class Routing(NamedTuple):
    """Which slots each tile holds."""

    # Of sort_into_tiles, or the ids of the slots, each of which is then a tile; None: as many of each expert in turn.
    table: Tensor | None
    slots: int
    batch: int = 0  # without a table: slots of each expert

    @property
    def direct(self) -> bool:
        return self.table is not None and self.table.ndim == 1

    def tiles(self, largest: int) -> int:
        """How many there are, of up to `largest` slots each."""
        if self.table is not None:
            return len(self.table)
        return self.slots // self.batch * cdiv(self.batch, largest)


class Rows(NamedTuple):
    """The input of a product: rows [.., K], whether entry.enter has permuted them, and their scale."""

    x: Tensor
    permuted: bool
    scale: Tensor | None  # float64 [] or [E], multiplied into the sum
    # Whether a kernel of ours that waited for the routing, too, wrote them, and was launched last.
    last: bool = True


def stride(scale: Tensor | None) -> int:
    return scale.stride(0) if scale is not None and scale.ndim else 0


def constants(rows: Rows, routing: Routing, config: TileConfig) -> dict[str, Any]:
    form, target = form_of(rows.x), target_of(rows.x)
    pairs = takes_pairs(config, target, routing.direct)
    require(pairs or not rows.permuted, "rows", rows.permuted, "columns in their own order for this configuration")
    return {
        "ORDER": "permuted" if rows.permuted else "pairs" if pairs else "fours",
        "DIRECT": routing.direct,
        "FORM": form,
        "MASKED": rows.x.shape[-1] % config.block_k != 0,
        "WAIT": form == "sm90" and needs_wait(config, target),
        "PREFETCHED": min(config.prefetched, next_power_of_2(rows.x.shape[-1] + 1) // 2),
        **config.meta(),
        **dependent_launch(rows.x),
    }
