"""Tile sizes and launch parameters of the kernels on tiled weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Hopper has matrix units of its own kind, whose left operand may come from registers.
Target = Literal["hopper", "cuda", "hip"]


@dataclass(frozen=True)
class TileConfig:
    """Rows of the weight on M, tokens on N.

    A tile of tokens holds up to `largest`, one of 8, 16, 32, 48, 64, 96, 128, 192; the loop is compiled for several
    `sizes` from `smallest` on, and each tile takes the least that holds it.
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

    def __post_init__(self) -> None:
        if self.smallest not in self.sizes or self.largest not in self.sizes:
            raise ValueError(
                f"TileConfig: found tiles of {self.smallest} to {self.largest} tokens, expected of 8, 16, 32, 64, 128, "
                "and for the largest also of 48, 96 or 192"
            )

    @property
    def text(self) -> str:
        """For reports."""
        tokens = f"{self.smallest}..{self.largest}" if self.bodies > 1 else str(self.largest)
        tile = f"{self.rows} rows x {tokens} tokens, K step {self.block_k}"
        return f"{tile}, {self.num_warps} warps, {self.num_stages} stages"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens: powers of two, and what lies halfway between them from 48 on if `largest` does.

        24 is 16 and 8, for which Hopper's matrix units want different layouts of the weight.
        """
        halfway = self.largest % 3 == 0
        steps = (n for power in range(3, 8) for n in (2**power, 3 * 2**power // 2))
        return tuple(n for n in steps if self.smallest <= n <= self.largest and (n % 3 or (halfway and n >= 48)))

    @property
    def bodies(self) -> int:
        return len(self.sizes)

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "ROWS": self.rows,
            # A byte for each, the first lowest: generated code writes numbers, and no tuples.
            "SIZES": sum(size << 8 * body for body, size in enumerate(self.sizes)),
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


def needs_wait(config: TileConfig, target: Target) -> bool:
    """Whether the loop must wait for the matrix units itself, by an instruction that Hopper alone has.

    With a step of 64 and 64 tokens or more, Triton 3.6 leaves a wgmma in flight across the loop edge while its left
    operand's registers are written anew; results are wrong and change from run to run. Two products in one step are
    taken for as long.
    """
    long = config.largest % 3 == 0 or (config.block_k < 128 and config.largest >= 64)
    return target == "hopper" and long and _triton_version() < (3, 7)


def takes_pairs(config: TileConfig, target: Target, direct: bool) -> bool:
    """Whether lanes of the matrix units hold pairs of neighbours along K; else fours (fragments.decode_fragments).

    Rows in the order of prepack.permute_k are for pairs. Rows in their own order are read in either way, in fours with
    half as many loads. wgmma takes pairs, and so does mma.sync as Triton lays it out since 3.8.
    """
    if target == "hip":  # decoded weights change lanes either way
        return not direct
    wgmma = target == "hopper" and config.largest > 8
    return wgmma or _triton_version() >= (3, 8)


@dataclass(frozen=True)
class TileConfigs:
    """How a whole block runs: direct, every slot by itself, or slots sorted into tiles of `largest` tokens, of both."""

    up: TileConfig
    down: TileConfig
    direct: bool = False

    @property
    def text(self) -> str:
        """For reports."""
        both = self.up.text if self.up == self.down else f"up {self.up.text}; down {self.down.text}"
        return f"{both}, each slot by itself" if self.direct else both


class BlockSizes(NamedTuple):
    """Of a routed block: hidden is K of its up product, inner that of its down product."""

    experts: int
    top: int
    hidden: int
    inner: int
    gated: bool
    rounds: bool = False  # activations to NVFP4, of either product

    @property
    def up_rows(self) -> int:
        """Of one expert's weight, or of both its weights."""
        return self.inner * (2 if self.gated else 1)

    def load(self, tokens: int) -> float:
        """Slots that an expert is expected to have."""
        return tokens * self.top / self.experts

    def experts_hit(self, tokens: int) -> float:
        """Experts that are expected to have any."""
        return self.experts * (1 - (1 - 1 / self.experts) ** (tokens * self.top))


def target_of(tensor: Tensor) -> Target:
    """The kind of GPU that a tensor is on; for the interpreter any will do."""
    return target_of_device(tensor.device.index or 0) if tensor.is_cuda else "hopper"


@cache
def target_of_device(device: int) -> Target:
    """The kind of a GPU by its number."""
    if torch.version.hip is not None:
        return "hip"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"


def choose(tokens: int, sizes: BlockSizes, target: Target) -> TileConfigs:
    """For a routed block."""
    load = sizes.load(tokens)
    # Sorting takes two launches more, and saves reading an expert again: mostly from the cache, if it is read.
    if tokens <= 2 or (tokens <= 4 and load <= 0.25):
        up, down = _direct(tokens, sizes, target)
        return TileConfigs(fitted(up, sizes.hidden), down, direct=True)
    of_load = _of_load(load, target)

    def of(rows: int) -> TileConfig:
        def programs(c: TileConfig) -> float:
            return sizes.experts_hit(tokens) * math.ceil(load / c.largest) * math.ceil(rows / c.rows)

        few, more = of_load.few
        return of_load.config if programs(of_load.config) > _FILLING else few if programs(few) <= _AT_ONCE else more

    return TileConfigs(fitted(of(sizes.up_rows), sizes.hidden), fitted(of(sizes.hidden), sizes.inner))


def _direct(tokens: int, sizes: BlockSizes, target: Target) -> tuple[TileConfig, TileConfig]:
    """(up, down) where every slot is by itself.

    A product's programs start while those of the one before still run, on whichever multiprocessor has room: few and
    wide ones come to be unevenly spread. The limits are those that fit what was measured of one token.
    """
    few = _FEW_TOKENS[target]

    def programs(rows: int, config: TileConfig) -> int:
        return tokens * sizes.top * math.ceil(rows / config.rows)

    wide = programs(sizes.hidden, few.down)
    if sizes.inner >= 4096 and wide <= _FILLING:
        return few.up, few.long
    if tokens > 1:
        return few.up, few.down
    if not sizes.rounds:
        return few.up, few.narrow if wide > _AT_ONCE else few.down
    just_fit = _AT_ONCE < programs(sizes.up_rows, few.up) <= 2 * _AT_ONCE
    down = few.long if programs(sizes.hidden, few.long) <= 2 * _AT_ONCE else few.narrow
    return few.narrow if just_fit else few.up, down


def fitted(config: TileConfig, k: int) -> TileConfig:
    """The same with a step along K that k is a multiple of, or with a short one: what is beyond K counts as zeros.

    Shorter steps are loaded further ahead. The shortest pay for many tokens alone.
    """
    least = 64 if config.largest >= 64 else 128
    while k % config.block_k and config.block_k > least:
        stages = min(config.num_stages * 2, 8)
        config = dataclasses.replace(config, block_k=config.block_k // 2, num_stages=stages)
    return config


def by_load(each: float, target: Target) -> TileConfig:
    """For experts that are expected to see so many slots each."""
    return _of_load(each, target).config


def _of_load(each: float, target: Target) -> _Load:
    return next(choice for choice in _BY_LOAD[target] if each <= choice.most)


def for_rows(rows: int, n: int, target: Target) -> TileConfig:
    """For `rows` rows by one weight of n rows: as an expert's, unless that makes too few programs to fill a GPU."""

    def programs(config: TileConfig) -> int:
        return math.ceil(rows / config.largest) * math.ceil(n / config.rows)

    usual = by_load(rows, target)
    if programs(usual) >= _FILLING:
        return usual
    fewest, narrow, wide = ALONE[target]
    if rows <= fewest.largest:
        return fewest
    return narrow if programs(narrow) <= 2 * _FILLING else wide


def defaults(target: Target) -> list[TileConfigs]:
    """Pairs that hold all that is chosen without tuning, for each product."""
    one = _FEW_TOKENS[target]
    pairs = [*((one.up, down) for down in (one.down, one.narrow, one.long)), (one.narrow, one.narrow)]
    few = [TileConfigs(fitted(up, k), down, direct=True) for up, down in pairs for k in _ANY_K]
    alike = [fitted(c, k) for load in _BY_LOAD[target] for c in (load.config, *load.few) for k in _ANY_K]
    return list(dict.fromkeys([*few, *(TileConfigs(c, c) for c in (*alike, *ALONE[target]))]))


class _Few(NamedTuple):
    """What serves few tokens, each slot by itself."""

    up: TileConfig
    down: TileConfig
    narrow: TileConfig  # of either product
    long: TileConfig  # of a down product in few programs


class _Load(NamedTuple):
    """What serves experts with up to `most` slots each."""

    most: float
    config: TileConfig
    # Where that makes few programs: up to _AT_ONCE of these, and more.
    few: tuple[TileConfig, TileConfig]


def _same(most: float, config: TileConfig) -> _Load:
    return _Load(most, config, (config, config))


_ANY_K = (256, 128, 64)  # the largest power of two in K, of which the first stands for those above
_AT_ONCE = 396  # programs of 64 rows that an H100 holds at a time, four steps of 256 columns loaded ahead
_FILLING = 256  # programs; an H100 has 132 multiprocessors
_FEW_TOKENS: dict[Target, _Few] = {
    "hopper": _Few(
        up=TileConfig(64, 8, 8, 256, num_warps=4, num_stages=3),
        down=TileConfig(64, 8, 8, 256, num_warps=4, num_stages=3),
        narrow=TileConfig(32, 8, 8, 256, num_warps=2, num_stages=4),
        long=TileConfig(16, 8, 8, 512, num_warps=1, num_stages=3),
    ),
    "cuda": _Few(*(TileConfig(32, 8, 8, 128, num_warps=2, num_stages=4),) * 4),
    "hip": _Few(*(TileConfig(32, 16, 16, 64, num_warps=2, num_stages=2),) * 4),
}
# Hopper's are the fastest of those tried on an H100 and an H200 with Triton 3.6; nobody has timed the others, which are
# the largest that spill no registers.
_BY_LOAD: dict[Target, tuple[_Load, ...]] = {
    "hopper": (
        _Load(
            5,
            TileConfig(128, 8, 8, 128, num_warps=4, num_stages=4),
            (
                TileConfig(64, 8, 8, 256, num_warps=4, num_stages=3),
                TileConfig(128, 8, 8, 256, num_warps=8, num_stages=3),
            ),
        ),
        _Load(
            10,
            TileConfig(128, 16, 16, 128, num_warps=4, num_stages=4),
            (TileConfig(64, 16, 16, 128, num_warps=4, num_stages=4),) * 2,
        ),
        _Load(
            24,
            TileConfig(128, 16, 32, 128, num_warps=4, num_stages=4),
            (TileConfig(64, 16, 32, 128, num_warps=4, num_stages=4),) * 2,
        ),
        _same(48, TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3, at_once=8)),
        _same(80, TileConfig(128, 16, 96, 64, num_warps=4, num_stages=4, at_once=8)),
        _same(math.inf, TileConfig(128, 16, 128, 64, num_warps=4, num_stages=3, at_once=8)),
    ),
    "cuda": (
        _same(5, TileConfig(64, 8, 8, 128, num_warps=4, num_stages=3)),
        _same(24, TileConfig(64, 16, 32, 128, num_warps=4, num_stages=3)),
        _same(math.inf, TileConfig(64, 16, 64, 64, num_warps=4, num_stages=3, at_once=8)),
    ),
    "hip": (
        _same(5, TileConfig(64, 16, 16, 64, num_warps=4, num_stages=2)),
        _same(24, TileConfig(64, 16, 32, 64, num_warps=4, num_stages=2)),
        _same(math.inf, TileConfig(64, 16, 64, 64, num_warps=4, num_stages=2, at_once=8)),
    ),
}
# (for the fewest rows, for few, for more) programs of one weight alone. Hopper's last two are by `python
# benchmarks/bench_linear.py` on an H100, the others are not timed.
ALONE: dict[Target, tuple[TileConfig, TileConfig, TileConfig]] = {
    "hopper": (
        TileConfig(64, 8, 8, 256, num_warps=4, num_stages=3),
        TileConfig(64, 16, 16, 256, num_warps=4, num_stages=3),
        TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3, at_once=8),
    ),
    "cuda": (_BY_LOAD["cuda"][0].config, *(_BY_LOAD["cuda"][1].config,) * 2),
    "hip": (*(_BY_LOAD["hip"][0].config,) * 2, _BY_LOAD["hip"][1].config),
}
