"""Tile sizes and launch parameters of the kernels on tiled weights."""

from dataclasses import dataclass

import torch
import triton
from packaging import version


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
    registers: int | None = None
    prefetched: int = 512

    @property
    def bodies(self) -> int:
        return self.largest.bit_length() - self.smallest.bit_length() + 1

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        meta = {
            "ROWS": self.rows,
            "SMALLEST": self.smallest,
            "BODIES": self.bodies,
            "BLOCK_K": self.block_k,
            "STAGES": self.num_stages,
            "AT_ONCE": self.at_once,
            "num_warps": self.num_warps,
        }
        return meta if self.registers is None else {**meta, "maxnreg": self.registers}


def needs_wait(config: TileConfig) -> bool:
    """Whether the loop must wait for the matrix units itself.

    With a step of 64 and 64 tokens or more, Triton 3.6 leaves a wgmma in flight across the loop edge while its left
    operand's registers are written anew; results are wrong and change from run to run.
    """
    return config.block_k < 128 and config.largest >= 64 and version.parse(triton.__version__) < version.parse("3.7")


@dataclass(frozen=True)
class TileConfigs:
    """How a whole block runs: direct, every slot by itself, or slots sorted into tiles of up.largest tokens."""

    up: TileConfig
    down: TileConfig
    direct: bool = False


def choose(tokens: int, top: int, experts: int) -> TileConfigs:
    """For a routed block."""
    if tokens == 1:
        few = TileConfig(32, 8, 8, 256, num_warps=2, num_stages=4)
        return TileConfigs(few, few, direct=True)
    config = by_load(tokens * top / experts)
    return TileConfigs(config, config)


def by_load(each: float, hip: bool | None = None) -> TileConfig:
    """For experts that are expected to see so many slots each. Measured on an H100 with Triton 3.6."""
    if hip is None:
        hip = torch.version.hip is not None
    if hip:
        # 64 KB of shared memory, and nothing measured.
        return TileConfig(128, 16, 16 if each <= 5 else 32 if each <= 24 else 64, 64, num_warps=4, num_stages=2)
    if each <= 5:
        return TileConfig(128, 16, 16, 128, num_warps=4, num_stages=4)
    if each <= 24:
        return TileConfig(128, 16, 32, 128, num_warps=4, num_stages=4)
    if each <= 48:
        return TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3, at_once=8)
    return TileConfig(128, 16, 128, 64, num_warps=4, num_stages=3, at_once=8)
