"""Configurations of the tiled kernels that are worth timing, the likeliest first by a model of their cost."""

from __future__ import annotations

import itertools

from .tile_config import Target, TileConfig, by_load

# Bytes of shared memory of a multiprocessor, all of which one program may have: of an H100, of an RTX 3090, which has
# the least of its kind, and of an MI300.
_SHARED: dict[Target, int] = {"hopper": 227 << 10, "cuda": 99 << 10, "hip": 64 << 10}
_REGISTERS, _MOST_REGISTERS, _OTHER_REGISTERS = 1 << 16, 255, 48
# Instructions that a warp issues to decode a word of 32 lanes each, and cycles of a multiprocessor's matrix units for
# 16 x 8 x 16 multiply-adds.
_DECODE_ISSUES = 70
_MMA_CYCLES: dict[Target, float] = {"hopper": 0.5, "cuda": 2.0, "hip": 2.0}
_START_CYCLES = 3000  # before a program's first product, and after its last
_STEP_CYCLES = 200  # of a step along K: waiting for what is loaded, and for each other


def candidates(each: float, k: int, target: Target, most: int = 14) -> list[TileConfig]:
    """The default for experts of `each` slots, and of all others that fit the GPU those of the least modelled cost.

    One of each size: the model hardly tells apart how far they load ahead. Tiles for many more tokens are left out, as
    they run as smaller ones.
    """
    default = by_load(each, target)
    suited = (c for c in _all(target) if _fits(c, target) and (c.bodies == 1 or c.largest < 4 * each))
    others = sorted(suited, key=lambda c: cost(c, each, k, target))
    of_size: dict[tuple[int, int, int], TileConfig] = {}
    for config in (default, *others):
        of_size.setdefault((config.rows, config.largest, config.block_k), config)
    return list(of_size.values())[:most]


def _all(target: Target) -> list[TileConfig]:
    # No matrix instruction of AMD's has 8 columns.
    tokens = [*([] if target == "hip" else [(8, 8)]), (16, 16), (16, 32), (16, 64), (16, 96), (16, 128), (32, 128)]
    stages = (2,) if target == "hip" else (3, 4)
    space = itertools.product((64, 128, 256), tokens, (64, 128, 256), (4, 8), stages)
    return [
        TileConfig(rows, low, high, block_k, warps, ahead, at_once=1 if high < 64 else 8)
        for rows, (low, high), block_k, warps, ahead in space
        if rows >= 16 * warps  # each warp has rows of its own
    ]


def shared_bytes(config: TileConfig) -> int:
    """What the tiles that are loaded ahead take: words, scales and rows of x."""
    return config.num_stages * config.block_k * (config.rows // 2 + config.rows // 16 + 2 * config.largest)


def registers(config: TileConfig) -> int:
    """Of a thread, about: the sum, the decoded step of the weight and its words, and the rest."""
    elements = config.rows * config.largest + config.rows * config.block_k // 2 + config.rows * config.block_k // 8
    return elements // (32 * config.num_warps) + _OTHER_REGISTERS


def _fits(config: TileConfig, target: Target) -> bool:
    return shared_bytes(config) <= _SHARED[target] and registers(config) <= _MOST_REGISTERS


def cost(config: TileConfig, each: float, k: int, target: Target) -> float:
    """Modelled cycles of a multiprocessor for a row of the weight, of an expert with `each` slots.

    Decoding and multiplying overlap among the programs that a multiprocessor holds at once, and with one they do not.
    """
    full, rest = divmod(max(1.0, each), config.largest)
    bodies = [config.largest] * int(full)
    if rest:
        bodies.append(next(size for size in config.sizes if size >= rest))
    held = min(_SHARED[target] // shared_bytes(config), _REGISTERS // (registers(config) * 32 * config.num_warps), 16)
    decode = config.rows * k / 1024 * _DECODE_ISSUES / 4
    total = 0.0
    for tokens in bodies:
        multiply = config.rows / 16 * tokens / 8 * k / 16 * _MMA_CYCLES[target]
        together = max(decode, multiply) if held > 1 else decode + multiply
        total += together + (_START_CYCLES + _STEP_CYCLES * k / config.block_k) / max(1, held)
    return total / config.rows
