"""The kernels on tiled weights in the configurations that are chosen, compiled as tests/cross_compile.py compiles."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cross_compile import TARGETS, compile_kernel, describe
from triton.backends.compiler import GPUTarget

from fx_nvfp4.activation import parse
from fx_nvfp4.kernels.activation import compile_activation
from fx_nvfp4.kernels.config import ENTRY_BLOCK, TABLE_BLOCK, TABLE_COUNTED, TABLE_SLOTS_AT_ONCE
from fx_nvfp4.kernels.entry import entry_kernel
from fx_nvfp4.kernels.fragments import decode_form
from fx_nvfp4.kernels.tile_candidates import shared_bytes
from fx_nvfp4.kernels.tile_config import (
    ALONE,
    Target,
    TileConfig,
    TileConfigs,
    by_load,
    defaults,
    needs_wait,
    takes_pairs,
)
from fx_nvfp4.kernels.tile_table import count_blocks_kernel, table_kernel, table_of_counts_kernel
from fx_nvfp4.kernels.tiled_down import tiled_down_kernel
from fx_nvfp4.kernels.tiled_up import tiled_up_kernel

MANY = 200  # slots of an expert
LOADS = (1, MANY)
GROUPS = 256


def kind_of(target: GPUTarget) -> Target:
    return "hip" if target.backend == "hip" else "hopper" if target.arch == 90 else "cuda"


def product_constants(target: GPUTarget, config: TileConfig, direct: bool) -> dict[str, Any]:
    form = decode_form(target.backend, target.arch if isinstance(target.arch, int) else 0)
    pdl = target.backend == "cuda" and target.arch >= 90
    pairs = takes_pairs(config, kind_of(target), direct)
    order = "permuted" if pairs and not direct else "pairs" if pairs else "fours"
    constants = {"ORDER": order, "DIRECT": direct, "FORM": form, "MASKED": False}
    constants["WAIT"] = needs_wait(config, kind_of(target))
    return {**constants, "PREFETCHED": config.prefetched, "PDL": pdl, **config.meta()}


def products(target: GPUTarget, configs: TileConfigs) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    direct = configs.direct
    silu = compile_activation(parse("silu(g) * u").to_triton())
    constants = product_constants(target, configs.up, direct)
    permuted = constants["ORDER"] == "permuted"
    gated = {"ACTIVATION": silu, "GATED": True, "INTERLEAVED": False, "PERMUTE_H": permuted, "EARLY": True}
    yield "tiled up", tiled_up_kernel, {**constants, **gated}
    yield "tiled down", tiled_down_kernel, product_constants(target, configs.down, direct)


def others(target: GPUTarget) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    pdl = target.backend == "cuda" and target.arch >= 90
    table = {"BLOCK": TABLE_BLOCK, "GROUPS": GROUPS, "PDL": pdl}
    yield "table", table_kernel, {**table, "TOKENS": 16, "SLOTS": TABLE_SLOTS_AT_ONCE}
    yield "count blocks", count_blocks_kernel, {**table, "BLOCK": TABLE_COUNTED}
    yield "table of counts", table_of_counts_kernel, {**table, "TOKENS": 128, "STEP": 4096 // GROUPS}
    yield (
        "entry",
        entry_kernel,
        {"ROWS": 8, "PER_EXPERT": True, "PERMUTE": True, "NATIVE": pdl, "BLOCK": ENTRY_BLOCK, "PDL": pdl},
    )


def compile_tiled(targets: list[str], full: bool) -> list[dict[str, Any]]:
    results = []
    for name in targets:
        target = TARGETS[name]
        kind = kind_of(target)
        every, loads = defaults(kind), {load: by_load(load, kind) for load in LOADS}
        some = [*((f"{load} slots an expert", TileConfigs(c, c)) for load, c in loads.items()), ("one token", every[0])]
        for dtype in ("bf16", "fp16") if full else ("bf16",):
            chosen = [(c.text, c) for c in every] if full and dtype == "bf16" else some
            calls = [(f"{k}, {what}", *rest) for what, c in chosen for k, *rest in products(target, c)]
            batches = {**product_constants(target, by_load(MANY, kind), False), "table_ptr": None}
            calls.append((f"tiled down, batches of {MANY}", tiled_down_kernel, batches))
            if kind == "hopper":  # the others' are among those above
                alone = [{**product_constants(target, config, False), "table_ptr": None} for config in ALONE[kind]]
                names = ("fewest rows by one weight", "few rows by one weight", "more rows by one weight")
                calls += [(f"tiled down, {n}", tiled_down_kernel, c) for n, c in zip(names, alone, strict=True)]
            for kernel, function, constants in (*calls, *others(target)):
                compiled = compile_kernel(function, constants, dtype, target)
                case = {"target": name, "kernel": kernel, "dtype": dtype, "shared": compiled.metadata.shared}
                results.append({**case, **describe(compiled, target)})
    return results


def copies_of(targets: list[str]) -> list[dict[str, Any]]:
    """For few slots on targets of NVIDIA: bytes and number of asynchronous copies, K being whole steps, and masked."""
    results = []
    for name in targets:
        target = TARGETS[name]
        config = by_load(1, kind_of(target))
        for kernel, function, constants in products(target, TileConfigs(config, config)):
            for masked in (False, True):
                compiled = compile_kernel(function, {**constants, "MASKED": masked}, "bf16", target)
                sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global\b.*?, (0x\w+),", compiled.asm["ptx"])
                case = {"target": name, "kernel": kernel, "masked": masked, "copies": Counter(sizes)}
                results.append({**case, "shared": compiled.metadata.shared, "staged": shared_bytes(config)})
    return results
