"""Tile sizes and launch parameters of all kernels but the products on tiled weights, whose are in tile_config.py."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """Launch parameters of a tiled matrix product: tokens on M, output features on N."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def gemm_config(rows: int, dtype: torch.dtype, hip: bool | None = None, gated: bool = False) -> GemmConfig:
    """Choose by the number of rows of x that one expert is expected to see; gated: columns are of gate and up in turn.

    Shared memory stays within the 64 KB of gfx90a and gfx942, and within the 99 KB of sm_86, sm_89 and sm_120.
    """
    if hip is None:
        hip = torch.version.hip is not None
    # AMD GPUs have less shared memory to hold tiles that are loaded ahead.
    num_stages = 2 if hip else 3
    if dtype == torch.float32:
        # Without TF32, NVIDIA GPUs multiply float32 on the scalar units, with operands in registers: small tiles.
        return GemmConfig(16 if rows <= 16 else 32, 32, 32, num_warps=4, num_stages=num_stages)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    # A K step of 128, never less with 64 tokens or more: with a step of 64, Triton 3.6 leaves a wgmma whose left
    # operand is in registers in flight across the loop edge, and results are wrong and change from run to run.
    # With four warps the tile of 64 tokens spills on sm_80, and the gated one of 32 on gfx90a and gfx942.
    block_n = 32 if gated and hip and block_m == 32 else 64
    return GemmConfig(block_m, block_n, 128, num_warps=8 if block_m == 64 else 4, num_stages=num_stages)


def gradient_config(rows: int, hip: bool | None = None) -> GemmConfig:
    """For gradients of x, of which one expert is expected to see `rows` rows: BLOCK_N is the step, BLOCK_K on output.

    The largest tile of which no target spills registers.
    """
    if hip is None:
        hip = torch.version.hip is not None
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return GemmConfig(block_m, 64, 64, num_warps=8 if block_m == 64 else 4, num_stages=2 if hip else 3)


@dataclass(frozen=True)
class RowConfig:
    """Launch parameters of the kernels that handle one row of x, or no product at all."""

    block_n: int
    block_k: int
    num_warps: int

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {"BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "num_warps": self.num_warps}


INDEXED = RowConfig(block_n=16, block_k=256, num_warps=4)
DEQUANTIZE = RowConfig(block_n=16, block_k=256, num_warps=4)
# Blocks of 16 elements that one program of the activation kernel quantises.
FAKE_QUANTIZE_BLOCKS = 128
# Slots that one program of the routing kernels places, blocks of them that it counts at a time, and experts whose slots
# it compares with at a time.
ROUTING_BLOCK = 64
ROUTING_BLOCKS_PER_STEP = 64
ROUTING_GROUPS = 64
# Slots that the table kernels place at a time and count at a time, up to how many of them one launch sorts, and among
# how many programs more of them are shared.
TABLE_BLOCK = 64
TABLE_COUNTED = 256
TABLE_SLOTS_AT_ONCE = 4096
TABLE_BLOCKS_OF_MANY = 128
# Elements of a row that one program of the entry kernel rounds and permutes.
ENTRY_BLOCK = 2048
# Tokens from which on one program does so for all slots of a token.
ENTRY_TOKENS = 512
# Outputs of a token that one program of the combine kernel sums.
COMBINE_COLUMNS = 1024
