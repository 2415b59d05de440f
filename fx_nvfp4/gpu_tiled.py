"""The ops on a GPU with tiled weights (fx_nvfp4/prepack.py). The host never waits.

A routed block is up to five launches: slots are sorted into tiles, rows of x are rounded and permuted, the up product
leaves h rounded and permuted for the down product, and the weighted sum follows. One or two tokens, and up to four that
hardly share experts, are not sorted; rows that need neither rounding nor another order do not enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning
from .activation import parse
from .block import Block, Projection
from .kernels import moe as moe_kernels
from .kernels.entry import enter
from .kernels.grouped import row_groups
from .kernels.tile_config import TileConfig, TileConfigs, by_load, fitted, for_rows, takes_pairs, target_of
from .kernels.tile_table import sort_into_tiles
from .kernels.tiled_down import down
from .kernels.tiled_operands import Routing, Rows, TiledOperand
from .kernels.tiled_up import up as up_product
from .layouts import is_tiled
from .prepack import TILE_ROWS
from .reference import Activations


@dataclass(frozen=True)
class Slots:
    """The routing table of a call."""

    ids: Tensor  # [T, A]
    weights: Tensor  # [T, A]
    experts: int

    @property
    def by_itself(self) -> Slots:
        """Each slot as a token of its own, for rows that are the slots'."""
        return Slots(self.ids.reshape(-1, 1), self.weights.reshape(-1, 1), self.experts)


def moe(x: Tensor, ids: Tensor, weights: Tensor, block: Block, configs: TileConfigs | None = None) -> Tensor:
    """As fx_nvfp4.block.moe; x is float16 or bfloat16."""
    if ids.numel() == 0:
        return x.new_zeros(x.shape[0], block.down.global_scale.shape[1], dtype=block.out_dtype)
    if configs is None:
        configs = tuning.configs_for(
            problem_of(x, ids, block), len(x), target_of(x), x.device, lambda c: moe(x, ids, weights, block, c)
        )
    y = products(x, ids, weights, block, configs)
    after = weights if block.weighted == "output" else None
    return moe_kernels.combine(y, ids, after, block.experts, block.out_dtype)


def products(x: Tensor, ids: Tensor, weights: Tensor, block: Block, configs: TileConfigs) -> Tensor:
    """The block without its weighted sum -> [T * A, H]; slots of nobody are not written."""
    slots = Slots(ids.contiguous(), weights, block.experts)
    routing = _route(slots, configs)
    permute = not configs.direct and _permutes(configs.up, x)
    apart = block.rows_apart
    entering = weights if block.weighted == "input" else None
    per_row = 1 if apart else ids.shape[1]
    gate, up, interleaved = _operands(block)
    down_act = block.down.act
    fused = down_act.mode == "none" or (down_act.mode == "static" and down_act.dialect == "hardware")
    h_scale = down_act.scale if fused and down_act.mode == "static" else None
    acts = [p.act for p in block.up]
    if all(act.scale is acts[0].scale for act in acts):
        rows = _enter(x, acts[0], slots, entering, apart, permute)
        text, permute_h = block.activation.to_triton(), fused and permute
        # What is not fused reads all rows of h, those of nobody too.
        h = up_product(rows, gate, up, interleaved, routing, per_row, text, h_scale, permute_h, configs.up, fused)
    else:
        # Rounded apart: each by itself, and the activation as plain operations.
        itself, parts, fused = parse("u").to_triton(), [], False
        for act, operand in zip(acts, (gate, up), strict=True):
            assert operand is not None
            rows = _enter(x, act, slots, entering, apart, permute)
            parts.append(
                up_product(rows, None, operand, False, routing, per_row, itself, None, False, configs.up, False)
            )
        h = block.activation.evaluate(*parts).to(x.dtype)
    inner = Rows(h, permute, h_scale) if fused else _enter(h, down_act, slots.by_itself, None, True, permute)
    return down(inner, _operand(block.down), routing, configs.down)


def problem_of(x: Tensor, ids: Tensor, block: Block) -> tuning.Problem:
    """What the block's configurations are tuned for."""
    modes = (f"{act.mode}{' by expert' if act.needs_experts else ''}" for act in (block.up[0].act, block.down.act))
    sizes = block.experts, ids.shape[1], block.up[0].k, block.down.k
    return tuning.Problem(*sizes, block.layout, str(x.dtype).removeprefix("torch."), ", ".join(modes))


def linear(
    x: Tensor, words: Tensor, scales: Tensor, global_scale: Tensor, act: Activations, config: TileConfig | None = None
) -> Tensor:
    """x [.., K] by one weight [N, K] -> [.., N]."""
    rows = x.reshape(-1, x.shape[-1])
    weight = TiledOperand(words.unsqueeze(0), scales.unsqueeze(0), global_scale.unsqueeze(0), None)
    config = config or fitted(for_rows(len(rows), weight.n, target_of(x)), x.shape[-1])
    # The activations' scale is one for all, so nobody asks whose rows they are.
    entered = _enter(rows, act, None, None, False, _permutes(config, x))
    return down(entered, weight, Routing(None, len(rows), len(rows)), config).view(*x.shape[:-1], weight.n)


def batched(x: Tensor, words: Tensor, scales: Tensor, global_scale: Tensor, act: Activations) -> Tensor:
    """x [E, M, K] by the weight of each expert -> [E, M, N]."""
    experts, rows, k = x.shape
    config = fitted(by_load(rows, target_of(x)), k)
    slots = None
    if act.needs_experts:
        ids = torch.arange(experts, device=x.device).repeat_interleave(rows).unsqueeze(1)
        slots = Slots(ids, ids, experts)
    entered = _enter(x.reshape(-1, k), act, slots, None, act.needs_experts, _permutes(config, x))
    y = down(entered, TiledOperand(words, scales, global_scale, None), Routing(None, experts * rows, rows), config)
    return y.view(experts, rows, y.shape[-1])


def indexed(x: Tensor, words: Tensor, scales: Tensor, global_scale: Tensor, ids: Tensor, act: Activations) -> Tensor:
    """Row s of x [S, K] by expert ids[s] -> [S, N]; rows of nobody come out as zeros."""
    weight = TiledOperand(words, scales, global_scale, None)
    slots = Slots(ids.unsqueeze(1), ids.unsqueeze(1), len(words))
    config = fitted(by_load(len(x) / len(words), target_of(x)), x.shape[-1])
    routing = Routing(sort_into_tiles(slots.ids, len(words), config.largest), len(x))
    entered = _enter(x, act, slots, None, act.needs_experts, _permutes(config, x))
    return down(entered, weight, routing, config, everyone=False)


def grouped(x: Tensor, words: Tensor, scales: Tensor, global_scale: Tensor, offs: Tensor, act: Activations) -> Tensor:
    """Rows of x [S, K] sorted by expert, expert e's ending at offs[e] -> [S, N]; rows past offs[-1] are zeros."""
    return indexed(x, words, scales, global_scale, row_groups(offs, len(x)), act)


def _route(slots: Slots, configs: TileConfigs) -> Routing:
    ids = slots.ids
    table = ids.reshape(-1) if configs.direct else sort_into_tiles(ids, slots.experts, configs.up.largest)
    return Routing(table, ids.numel())


def _permutes(config: TileConfig, x: Tensor) -> bool:
    """Whether rows are permuted for a product in tiles of tokens."""
    return takes_pairs(config, target_of(x), direct=False)


def _enter(
    x: Tensor, act: Activations, slots: Slots | None, weights: Tensor | None, apart: bool, permute: bool
) -> Rows:
    """Rows of x, or of the slots if apart, and the scale of the sum; exact where activations are quantised.

    Without slots one scale is for all rows, or found from them.
    """
    if act.mode == "none" and not permute and weights is None and not apart and x.is_contiguous():
        return Rows(x, False, None, last=False)
    static = act.mode == "static" and act.dialect == "hardware"
    if act.mode == "none" or static:
        scale = act.scale if static else None
        return Rows(_entered(x, slots, weights, scale, apart, permute), permute, scale)
    if apart and slots is not None:
        x = x if slots.ids.shape[1] == 1 else x.repeat_interleave(slots.ids.shape[1], dim=0)
        x = x if weights is None else (x.float() * weights.reshape(-1, 1).float()).to(x.dtype)
        slots = slots.by_itself
    group, experts = (slots.ids.reshape(-1), slots.experts) if apart and slots is not None else (None, 1)
    scale = act.scale_of_groups(x, group, experts)
    if act.dialect == "hardware":
        return Rows(_entered(x, slots, None, scale, apart, permute), permute, scale)
    return Rows(enter(act.enter_rows(x, group, experts)[0], permute=permute), permute, scale)


def _entered(
    x: Tensor, slots: Slots | None, weights: Tensor | None, scale: Tensor | None, apart: bool, permute: bool
) -> Tensor:
    ids, experts = (None, 1) if slots is None else (slots.ids, slots.experts)
    return enter(x, ids, experts, weights, scale, apart, permute)


def _operand(p: Projection, rows: slice | None = None, tiles: slice | None = None) -> TiledOperand:
    """The projection's rows, whose words are in those tiles; all of either by default."""
    rows, tiles = rows or slice(None), tiles or slice(None)
    bias = None if p.bias is None else p.bias[:, rows]
    return TiledOperand(p.qdata[:, tiles], p.block_scale[:, tiles], p.global_scale[:, rows], bias)


def _operands(block: Block) -> tuple[TiledOperand | None, TiledOperand, bool]:
    """(gate or None, up, whether their rows take turns in one weight)."""
    first = block.up[0]
    if block.layout == "plain":
        return None, _operand(first), False
    if block.layout == "separate":
        return _operand(first), _operand(block.up[1]), False
    if block.layout == "interleaved":
        return _operand(first, slice(0, None, 2)), _operand(first, slice(1, None, 2)), True
    n = first.global_scale.shape[1] // 2
    gate = _operand(first, slice(None, n), slice(None, n // 16))
    return gate, _operand(first, slice(n, None), slice(n // 16, None)), False


def serves(x: Tensor, qdata: Tensor) -> bool:
    """Whether the kernels multiply activations of this dtype by weights with these codes."""
    return is_tiled(qdata) and x.dtype in (torch.bfloat16, torch.float16)


def supports(x: Tensor, block: Block) -> bool:
    """Whether the kernels run a block: all its weights are in tiles, and gate and up are whole tiles of their own."""
    whole = block.layout != "concatenated" or block.up[0].n % (2 * TILE_ROWS) == 0
    return whole and all(serves(x, p.qdata) for p in (*block.up, block.down))
