"""Tile sizes and launch parameters of the kernels on tiled weights."""

import math
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal

import torch
from torch import Tensor

# Hopper has matrix units of its own kind, whose left operand may come from registers.
Target = Literal["hopper", "cuda", "hip"]


@dataclass(frozen=True)
class TileConfig:
    """Rows of the weight on M, tokens on N.

    A tile of tokens holds up to `largest`; the loop is compiled for smallest, twice that, ..., largest tokens, and each
    tile takes the smallest that holds it.
    at_once: tiles of tokens whose programs take turns.
    prefetched: columns that a program asks for before its inputs are ready, a power of two.
    """

    rows: int
    smallest: int
    largest: int
    block_k: int
    num_warps: int
    num_stages: int
    at_once: int = 1
    prefetched: int = 512

    @property
    def text(self) -> str:
        """For reports."""
        tokens = f"{self.smallest}..{self.largest}" if self.bodies > 1 else str(self.largest)
        tile = f"{self.rows} rows x {tokens} tokens, K step {self.block_k}"
        return f"{tile}, {self.num_warps} warps, {self.num_stages} stages"

    @property
    def bodies(self) -> int:
        return self.largest.bit_length() - self.smallest.bit_length() + 1

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "ROWS": self.rows,
            "SMALLEST": self.smallest,
            "BODIES": self.bodies,
            "BLOCK_K": self.block_k,
            "STAGES": self.num_stages,
            "AT_ONCE": self.at_once,
            "num_warps": self.num_warps,
        }


@cache
def _triton_version() -> tuple[int, ...]:
    """Without importing it, as it is not needed on a CPU."""
    return tuple(map(int, metadata.version("triton").split(".")[:2]))


def needs_wait(config: TileConfig) -> bool:
    """Whether the loop must wait for the matrix units itself.

    With a step of 64 and 64 tokens or more, Triton 3.6 leaves a wgmma in flight across the loop edge while its left
    operand's registers are written anew; results are wrong and change from run to run.
    """
    return config.block_k < 128 and config.largest >= 64 and _triton_version() < (3, 7)


@dataclass(frozen=True)
class TileConfigs:
    """How a whole block runs: direct, every slot by itself, or slots sorted into tiles of up.largest tokens."""

    up: TileConfig
    down: TileConfig
    direct: bool = False


def target_of(tensor: Tensor) -> Target:
    """The kind of GPU that a tensor is on; for the interpreter any will do."""
    return target_of_device(tensor.device.index or 0) if tensor.is_cuda else "hopper"


@cache
def target_of_device(device: int) -> Target:
    """The kind of a GPU by its number."""
    if torch.version.hip is not None:
        return "hip"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"


def choose(tokens: int, top: int, experts: int, target: Target) -> TileConfigs:
    """For a routed block."""
    if tokens <= 2:  # sorting costs more than reading an expert twice
        return TileConfigs(_FEW_TOKENS[target], _FEW_TOKENS[target], direct=True)
    config = by_load(tokens * top / experts, target)
    return TileConfigs(config, config)


def by_load(each: float, target: Target) -> TileConfig:
    """For experts that are expected to see so many slots each."""
    return next(config for most, config in _BY_LOAD[target] if each <= most)


def for_rows(rows: int, n: int, target: Target) -> TileConfig:
    """For `rows` rows by one weight of n rows: as an expert's, unless that makes too few programs to fill a GPU."""

    def programs(config: TileConfig) -> int:
        return math.ceil(rows / config.largest) * math.ceil(n / config.rows)

    usual = by_load(rows, target)
    if programs(usual) >= _FILLING:
        return usual
    narrow, wide = ALONE[target]
    return narrow if programs(narrow) <= 2 * _FILLING else wide


_FILLING = 256  # programs; an H100 has 132 multiprocessors
_FEW_TOKENS = {
    "hopper": TileConfig(32, 8, 8, 256, num_warps=2, num_stages=4),
    "cuda": TileConfig(32, 8, 8, 256, num_warps=2, num_stages=3),
    "hip": TileConfig(32, 16, 16, 64, num_warps=2, num_stages=2),
}
# Slots of an expert up to which a configuration is taken. Hopper's are the fastest of those tried on an H100 with
# Triton 3.6; nobody has timed the others, which are the largest that spill no registers.
_BY_LOAD: dict[Target, tuple[tuple[float, TileConfig], ...]] = {
    "hopper": (
        (5, TileConfig(128, 16, 16, 128, num_warps=4, num_stages=4)),
        (24, TileConfig(128, 16, 32, 128, num_warps=4, num_stages=4)),
        (48, TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3, at_once=8)),
        (96, TileConfig(128, 16, 64, 64, num_warps=4, num_stages=4, at_once=8)),
        (math.inf, TileConfig(128, 16, 128, 64, num_warps=4, num_stages=3, at_once=8)),
    ),
    "cuda": (
        (5, TileConfig(64, 16, 16, 128, num_warps=4, num_stages=3)),
        (24, TileConfig(64, 16, 32, 128, num_warps=4, num_stages=3)),
        (math.inf, TileConfig(64, 16, 64, 64, num_warps=4, num_stages=3, at_once=8)),
    ),
    "hip": (
        (5, TileConfig(64, 16, 16, 64, num_warps=4, num_stages=2)),
        (24, TileConfig(64, 16, 32, 64, num_warps=4, num_stages=2)),
        (math.inf, TileConfig(64, 16, 64, 64, num_warps=4, num_stages=2, at_once=8)),
    ),
}
# (for few, for more) programs of one weight alone. Hopper's are by `python benchmarks/bench_linear.py` on an H100, the
# others are not timed.
ALONE: dict[Target, tuple[TileConfig, TileConfig]] = {
    "hopper": (
        TileConfig(64, 16, 16, 256, num_warps=4, num_stages=3),
        TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3, at_once=8),
    ),
    "cuda": (_BY_LOAD["cuda"][0][1], _BY_LOAD["cuda"][1][1]),
    "hip": (_BY_LOAD["hip"][0][1], _BY_LOAD["hip"][1][1]),
}
