"""Which configuration the tiled kernels of a routed block run: measured ones, or the defaults.

A block is tuned for ranges of token counts apart. Results are kept in a JSON file for each GPU in Inductor's cache
folder, and chosen by the count of tokens at each call, without recompilation. Where nothing has been measured the
defaults of kernels/tile_config.py serve. After :func:`enable`, which ``mode="max-autotune"`` and the backend's option
``tune`` call, a block is measured at its first call in a range, on the weights and the routing that it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.tile_candidates import candidates
from .kernels.tile_config import BlockSizes, Target, TileConfig, TileConfigs, choose, fitted
from .lowering import compat

log = logging.getLogger("fx_nvfp4.tuning")

# Counts of tokens up to which one choice serves.
RANGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 62)
_COMPILERS = min(8, os.cpu_count() or 1)
_REPEATS = 12
_FLUSH_BYTES = 1 << 28  # beyond any cache


class Problem(NamedTuple):
    """What decides how fast a configuration is, besides the count of tokens."""

    experts: int
    top: int
    hidden: int
    inner: int
    layout: str
    dtype: str
    activations: str  # how the inputs of both products are rounded

    @property
    def key(self) -> str:
        return " ".join(map(str, self))

    @property
    def sizes(self) -> BlockSizes:
        gated, rounds = self.layout != "plain", self.activations != "none, none"
        return BlockSizes(self.experts, self.top, self.hidden, self.inner, gated, rounds)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One choice of the search and its time; None where it failed."""

    configs: TileConfigs
    microseconds: float | None
    why: str = ""


_enabled = False


def enable() -> None:
    """Measure blocks that have not been, in this process from now on."""
    global _enabled
    _enabled = True


def enabled() -> bool:
    return _enabled


def configs_for(
    problem: Problem, tokens: int, target: Target, device: torch.device, run: Callable[[TileConfigs], Tensor]
) -> TileConfigs:
    """The configurations of a call; `run` runs the block with others, and is called only to measure them."""
    default = choose(tokens, problem.sizes, target)
    if device.type != "cuda":
        return default
    found = measured(problem, tokens, device)
    if found is None and _enabled and not torch.cuda.is_current_stream_capturing():
        found = table_of(device).tune(problem, tokens, target, run)
    return default if found is None else found


def measured(problem: Problem, tokens: int, device: torch.device) -> TileConfigs | None:
    """The fastest of those that have been measured; None if none has."""
    return table_of(device).get(problem, tokens) if device.type == "cuda" else None


def state() -> str:
    """What :func:`measured` and :func:`enabled` would say now, for the key of a cache."""
    if not torch.cuda.is_available():
        return str(_enabled)
    # By its number, as tensors name it: another name would be another table, which hears of nothing new.
    return f"{_enabled} {table_of(torch.device('cuda', torch.cuda.current_device())).describe()}"


def range_of(tokens: int) -> int:
    """The range that a count of tokens is in: the largest of its counts."""
    return next(most for most in RANGES if tokens <= most)


class Table:
    """What has been measured on one GPU, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chosen: dict[tuple[Problem, int], TileConfigs] = {}
        self._stored = self._read()

    def get(self, problem: Problem, tokens: int) -> TileConfigs | None:
        at = problem, range_of(tokens)
        if at not in self._chosen:
            stored = self._stored.get(f"{problem.key} {at[1]}")
            if not stored or not _was_timed(stored):
                return None
            self._chosen[at] = _best(stored)
        return self._chosen[at]

    def tune(self, problem: Problem, tokens: int, target: Target, run: Callable[[TileConfigs], Tensor]) -> TileConfigs:
        """Measure the candidates, keep all of them in the file, and return the fastest."""
        measured = measure(problem, tokens, target, run)
        at = problem, range_of(tokens)
        self._chosen[at] = _best(measured)
        if _was_timed(measured):  # else the cause lies outside them: memory, or a call that gives NaN
            self._stored[f"{problem.key} {at[1]}"] = measured
            self._write()
        log.info("%s, %d tokens:\n%s", problem, tokens, describe(measured))
        return self._chosen[at]

    def describe(self) -> str:
        """Candidates, times and winners of all that has been measured."""
        return "\n\n".join(f"{at}\n{describe(found)}" for at, found in sorted(self._stored.items()))

    def _read(self) -> dict[str, list[Measured]]:
        try:
            stored = json.loads(self._path.read_text())
            return {at: [_measured(entry) for entry in found] for at, found in stored.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:  # or of another release
            log.warning("%s cannot be read (%s); blocks are tuned anew", self._path, error)
            return {}

    def _write(self) -> None:
        """As a whole, so that other processes never read half of it; what they wrote meanwhile is kept."""
        self._stored = {**self._read(), **self._stored}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            json.dump(self._stored, file, indent=1, default=dataclasses.asdict)
        os.replace(file.name, self._path)


def _was_timed(measured: list[Measured]) -> bool:
    return any(m.microseconds is not None for m in measured)


@cache
def table_of(device: torch.device) -> Table:
    """What has been measured on a GPU."""
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    # Of other kernels, or another compiler, nothing is known.
    of = f"{name}-triton-{metadata.version('triton')}-{compat.package_hash()[:12]}"
    return Table(compat.cache_folder() / "fx_nvfp4" / f"{of}.json")


def measure(problem: Problem, tokens: int, target: Target, run: Callable[[TileConfigs], Tensor]) -> list[Measured]:
    """Candidates, timed on the block itself; those whose result is wrong or varies are out.

    All are timed for both products at once, and then those of the same tokens as the fastest for each product alone.
    """
    sizes = problem.sizes
    default = choose(tokens, sizes, target)
    expected = run(default).float()
    both = [default, *(_for_both(c, problem) for c in candidates(sizes.load(tokens), problem.hidden, target))]
    if 1 < tokens <= 8:
        both.append(choose(1, sizes, target))
    found: dict[TileConfigs, Measured] = {}

    def time(tried: list[TileConfigs]) -> TileConfigs:
        """The fastest so far, with these."""
        new = [c for c in dict.fromkeys(tried) if c not in found]
        # Compilers run beside each other; an error comes again below, and is noted there.
        with ThreadPoolExecutor(_COMPILERS) as pool:
            list(pool.map(lambda c: _attempt(run, c), new))
        found.update({c: _try(c, run, expected) for c in new})
        return _best(list(found.values()))

    best = time(both)
    alike = [c for c in both if c.direct == best.direct and c.up.largest == best.up.largest]
    best = time([dataclasses.replace(best, down=c.down) for c in alike])
    time([dataclasses.replace(best, up=c.up) for c in alike])
    return list(found.values())


def _for_both(config: TileConfig, problem: Problem) -> TileConfigs:
    return TileConfigs(fitted(config, problem.hidden), fitted(config, problem.inner))


def _attempt(run: Callable[[TileConfigs], Tensor], configs: TileConfigs) -> None:
    with contextlib.suppress(*failures()):
        run(configs)


def failures() -> tuple[type[Exception], ...]:
    """What a configuration that a GPU cannot run raises."""
    import triton  # not needed on a CPU

    return triton.CompilationError, triton.runtime.errors.OutOfResources, RuntimeError, ValueError


def _try(configs: TileConfigs, run: Callable[[TileConfigs], Tensor], expected: Tensor) -> Measured:
    try:
        first, second = run(configs), run(configs)
        if not torch.equal(first, second):
            return Measured(configs, None, "two runs differ")
        error = float((first.float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error < 1e-2:
            return Measured(configs, None, f"its result differs by {error:.1e}")
        return Measured(configs, microseconds(lambda: run(configs)))
    except failures() as error:
        return Measured(configs, None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")


def microseconds(
    call: Callable[[], object], before: Callable[[int], object] | None = None, repeats: int = _REPEATS
) -> float:
    """Median time of a CUDA graph of the call.

    Args:
        before: called with 0, 1, ... ahead of each replay; by default the cache is overwritten.
    """
    before = before or _overwrite_cache()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before(i)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _overwrite_cache() -> Callable[[int], object]:
    content = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return lambda _: content.zero_()


def _best(measured: list[Measured]) -> TileConfigs:
    """The fastest; the first, which is the default, where none could be timed."""
    timed = [m for m in measured if m.microseconds is not None] or measured[:1]
    return min(timed, key=lambda m: m.microseconds or 0.0).configs


def _measured(entry: dict[str, Any]) -> Measured:
    given = entry["configs"]
    configs = TileConfigs(TileConfig(**given["up"]), TileConfig(**given["down"]), given["direct"])
    return Measured(configs, entry["microseconds"], entry["why"])


def describe(measured: list[Measured]) -> str:
    """A line for each candidate, the fastest first."""
    ordered = sorted(measured, key=lambda m: (m.microseconds is None, m.microseconds))
    lines = []
    for m in ordered:
        time = m.why if m.microseconds is None else f"{m.microseconds:.1f} us"
        lines.append(f"  {time:>12}  {m.configs.text}")
    return "\n".join(lines)
