"""Every Triton kernel at the sizes where kernels go wrong, each beside its plain PyTorch twin.

Edges: K of one block (canonical) or one chunk (tiles), odd N, sizes that are no multiple of a tile; 0 tokens, 1, and
more than a tile; experts without tokens, all tokens on one, ids and offsets of nobody.

Inputs are made on the CPU, where the twin runs too, and results are compared there: on the GPU nothing runs but the
launchers and what they call. Places that are left unwritten by design are not looked at.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fx_nvfp4 import block as plain
from fx_nvfp4 import gpu, gpu_tiled, reference
from fx_nvfp4.activation import parse
from fx_nvfp4.block import Block, Projection
from fx_nvfp4.kernels.config import ENTRY_TOKENS, ROUTING_BLOCK, TABLE_SLOTS_AT_ONCE
from fx_nvfp4.kernels.entry import enter
from fx_nvfp4.kernels.routing import sort_slots
from fx_nvfp4.kernels.tile_candidates import candidates
from fx_nvfp4.kernels.tile_config import Target, TileConfigs, defaults, target_of_device
from fx_nvfp4.kernels.tile_table import sort_into_tiles
from fx_nvfp4.prepack import permute_k, prepack
from fx_nvfp4.reference import Activations

# Of the norm: 16 bits of the products' rounding, of h and of the sum.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
NONE = Activations("none", None, "hardware")
EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, or the kernels that one call launches, at one shape."""

    kernel: str
    shape: str
    check: Callable[[str], None]  # takes the device, raises AssertionError

    def run(self, device: str) -> None:
        """The same inputs whatever ran before."""
        torch.manual_seed(zlib.crc32(f"{self.kernel} {self.shape}".encode()))
        self.check(device)


def cases(quick: bool = False) -> Iterator[Case]:
    """All of them; quick: one dtype a shape, and of the tiled kernels the configurations that are chosen untuned."""
    for kernel, make in {**CANONICAL, **TILED}.items():
        for shape, check in make(quick):
            yield Case(kernel, shape, check)


Checks = Iterator[tuple[str, Callable[[str], None]]]


def each(quick: bool, dtypes: tuple[torch.dtype, ...], number: int) -> tuple[torch.dtype, ...]:
    """The dtypes of the shape with this number: all, or one of them in turn."""
    return (dtypes[number % len(dtypes)],) if quick else dtypes


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Operands


def packed(n: int, k: int, experts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    lead = () if experts is None else (experts,)
    qdata = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8)
    scale = (torch.rand(*lead, n, k // 16) + 0.25).to(torch.float8_e4m3fn)
    return qdata, scale, (torch.rand(*lead, n) + 0.5) * 0.5 / k**0.5


def activations(mode: str, experts: int | None = None) -> Activations:
    """Static ones with a scale for each expert where there are experts."""
    if mode != "static":
        return Activations(mode, None, "hardware")
    return Activations(mode, torch.rand(experts or (), dtype=torch.float64) * 1e-3 + 5e-4, "hardware")


def ids_of(pattern: str, *shape: int, experts: int = EXPERTS) -> Tensor:
    """Expert ids of one routing."""
    if pattern == "one expert":
        return torch.full(shape, experts - 1)
    ids = torch.randint(0, experts, shape)
    if pattern == "empty experts":
        return ids // 2 * 2
    if pattern == "ids out of range":
        nobody = torch.tensor([-1, experts, 1 << 32, -(1 << 40)])
        return torch.where(torch.rand(shape) < 0.4, nobody[torch.randint(0, 4, shape)], ids)
    return ids


PATTERNS = ("spread", "one expert", "empty experts", "ids out of range")
# Where the groups of 37 rows end: a group of nobody behind the last, an end past the rows among them.
OFFSETS = {
    "spread": [9, 17, 30, 37],
    "one expert": [0, 0, 37, 37],
    "empty experts": [0, 20, 20, 37],
    "rows of nobody": [3, 3, 8, 21],
    "end out of range": [5, 9, 30, 60],
}


def moved(value: Any, device: str) -> Any:
    """Tensors, and whatever holds them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if isinstance(value, (Block, Projection, Activations)):
        changed = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Equal where the bound is 0; what nobody has written is NaN or a large number."""
    found = found.cpu()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    if not bound:
        assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()} differ"
    elif found.numel():
        error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error < bound, f"relative error {float(error):.1e}"


def twins(op: str, bound: float, make: Callable[[], tuple[Any, ...]], ours: Any = gpu) -> Callable[[str], None]:
    """A check that an op's body for GPUs gives what its plain body gives."""

    def check(device: str) -> None:
        arguments = make()
        expected = getattr(reference, op)(*arguments)
        close(getattr(ours, op)(*moved(arguments, device)), expected, bound)

    return check


# Canonical weights


def fake_quantize(quick: bool) -> Checks:
    for number, (rows, k) in enumerate([(0, 32), (1, 16), (3, 48), (130, 16)]):
        for dtype in each(quick, DTYPES, number):
            for experts in (None, rows or 1):

                def make(rows=rows, k=k, dtype=dtype, experts=experts):
                    scale = torch.rand(experts or (), dtype=torch.float64) * 1e-3 + 5e-4
                    return torch.randn(rows, k).to(dtype), scale if rows or not experts else scale[:0], "hardware"

                what = "one scale" if experts is None else "a scale a row"
                yield f"{rows} x {k} {name(dtype)}, {what}", twins("fake_quantize", 0, make)


def dequantize(quick: bool) -> Checks:
    for number, (experts, n, k) in enumerate([(None, 1, 16), (None, 33, 48), (3, 7, 272), (2, 0, 16)]):
        for dtype in each(quick, DTYPES, number):

            def make(experts=experts, n=n, k=k, dtype=dtype):
                return *packed(n, k, experts), dtype

            lead = "" if experts is None else f"{experts} x "
            yield f"{lead}{n} x {k} {name(dtype)}", twins("dequantize", 0, make)


def products(op: str, gradient: bool = False) -> Callable[[bool], Checks]:
    """Checks of one product, or of its gradient."""

    def make_checks(quick: bool) -> Checks:
        number = 0
        for what, given in situations(op).items():
            for n, k in ((1, 16), (33, 48), (65, 272)):
                number += 1
                for dtype in each(quick, DTYPES, number):
                    modes = ("none",) if gradient or dtype == torch.float32 else ("none", "static", "dynamic")
                    for mode in (modes[number % len(modes)],) if quick else modes:
                        make = product_arguments(op, gradient, given, n, k, dtype, mode)
                        check = twins("input_grad" if gradient else op, BOUND[dtype], make)
                        rounded = "" if gradient else f", activations {mode}"
                        yield f"{what}, {n} x {k} {name(dtype)}{rounded}", check

    return make_checks


def situations(op: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """By name: the number of rows, and what makes the op's ids or offsets."""
    if op == "indexed":
        found = {f"19 rows, {p}": (19, lambda p=p: ids_of(p, 19)) for p in PATTERNS}
        return found | {"no row": (0, lambda: ids_of("spread", 0)), "1 row": (1, lambda: ids_of("spread", 1))}
    if op == "grouped":
        found = {f"37 rows, {p}": (37, lambda ends=ends: torch.tensor(ends)) for p, ends in OFFSETS.items()}
        zeros, one = [0] * EXPERTS, [0, 0, 1, 1]
        return found | {"no row": (0, lambda: torch.tensor(zeros)), "1 row": (1, lambda: torch.tensor(one).int())}
    return {f"{rows} rows": (rows, lambda: None) for rows in (0, 1, 5, 70)}


def product_arguments(
    op: str, gradient: bool, given: tuple[int, Callable[[], Any]], n: int, k: int, dtype: torch.dtype, mode: str
) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        rows, extra = given[0], given[1]()
        experts = None if op == "linear" else EXPERTS
        width = n if gradient else k
        x = torch.randn(*((EXPERTS, rows) if op == "batched" else (rows,)), width).to(dtype)
        weight = packed(n, k, experts)
        if gradient:
            return x, *weight, extra if op == "indexed" else None, extra if op == "grouped" else None
        return x, *weight, *(() if extra is None else (extra,)), activations(mode, experts)

    return make


def moe(quick: bool) -> Checks:
    layouts = ("concatenated", "interleaved", "separate", "plain")
    number = 0
    for hidden, inner in ((16, 16), (48, 80)):
        for tokens, pattern in ((0, "spread"), (1, "spread"), *((21, p) for p in PATTERNS)):
            for layout in layouts[number % 4 :][:1] if quick else layouts:
                number += 1
                for dtype in each(quick, DTYPES, number):

                    def check(device, sizes=(hidden, inner), t=tokens, p=pattern, la=layout, d=dtype, n=number):
                        block = make_block(la, *sizes, bias=d if n % 2 else None)
                        block_against_plain(block, t, p, d, device, lambda *a: gpu.moe(*a))

                    yield f"{tokens} tokens, {pattern}, {hidden} x {inner}, {layout}, {name(dtype)}", check


def make_block(layout: str, hidden: int, inner: int, act: Activations = NONE, bias: torch.dtype | None = None) -> Block:
    def projection(n: int, k: int) -> Projection:
        return Projection(*packed(n, k, EXPERTS), None if bias is None else torch.randn(EXPERTS, n).to(bias), act)

    rows = 2 * inner if layout in ("concatenated", "interleaved") else inner
    up = tuple(projection(rows, hidden) for _ in range(2 if layout == "separate" else 1))
    text = "relu(u)" if layout == "plain" else "silu(g) * u"
    return Block(up, projection(hidden, inner), parse(text), layout, "output")


def block_against_plain(
    block: Block, tokens: int, pattern: str, dtype: torch.dtype, device: str, run: Any, given: Block | None = None
) -> None:
    """`run` on `given`, by default the block itself, against the plain block; twice, as races may not show once."""
    x = torch.randn(tokens, block.up[0].k).to(dtype)
    ids = ids_of(pattern, tokens, 2)
    weights = torch.rand(tokens, 2)
    expected = plain.moe(x, ids, weights, block)
    arguments = moved((x, ids, weights, given or block), device)
    one, other = run(*arguments).cpu(), run(*arguments).cpu()
    close(one, expected, BOUND[dtype])
    assert torch.equal(one, other), "two runs differ: a race"


def routing(quick: bool) -> Checks:
    sizes = (0, 1, ROUTING_BLOCK - 1, ROUTING_BLOCK + 1, *(() if quick else (ROUTING_BLOCK * 65,)))
    for slots in sizes:
        for pattern in PATTERNS:

            def check(device, slots=slots, pattern=pattern):
                ids = ids_of(pattern, slots, 1).flatten()
                order, offs = sort_slots(ids.unsqueeze(1).to(device), EXPERTS)
                expected = [(ids == e).nonzero().flatten() for e in range(EXPERTS)]
                close(offs, torch.tensor([len(e) for e in expected]).cumsum(0).int(), 0)
                close(order[: sum(map(len, expected))], torch.cat(expected).int(), 0)

            yield f"{slots} slots, {pattern}", check


CANONICAL: dict[str, Callable[[bool], Checks]] = {
    "fake_quantize": fake_quantize,
    "dequantize": dequantize,
    **{op: products(op) for op in ("linear", "batched", "grouped", "indexed")},
    **{f"input_grad of {op}": products(op, gradient=True) for op in ("linear", "batched", "grouped", "indexed")},
    "routing": routing,
    "moe: up, down, combine": moe,
}


# Weights in tiles


def table(quick: bool) -> Checks:
    """Tiles of sorted slots."""
    for slots in (0, 1, 65, 300, *(() if quick else (TABLE_SLOTS_AT_ONCE + 2,))):
        for pattern in PATTERNS:
            for tokens in (8, 64):

                def check(device, slots=slots, pattern=pattern, tokens=tokens):
                    ids = ids_of(pattern, slots, 1)
                    found = slots_by_expert(sort_into_tiles(ids.to(device), EXPERTS, tokens))
                    flat = ids.flatten()
                    assert found == {e: s for e in range(EXPERTS) if (s := (flat == e).nonzero().flatten().tolist())}

                yield f"{slots} slots, {pattern}, {tokens} a tile", check


def slots_by_expert(tiles: Tensor) -> dict[int, list[int]]:
    """What a table says, reading what is written alone."""
    found: dict[int, list[int]] = {}
    for number, count in enumerate(tiles[:, 1].tolist()):
        if count:
            found.setdefault(int(tiles[number, 0]), []).extend(tiles[number, 4 : 4 + count].tolist())
    return found


def entry(quick: bool) -> Checks:
    number = 0
    for tokens, k in ((0, 64), (1, 64), (5, 192), (ENTRY_TOKENS + 8, 64)):
        for kind in ("rows", "rows rounded", "slots rounded by expert"):
            number += 1
            if quick and tokens > ENTRY_TOKENS:
                continue
            for dtype in each(quick, HALVES, number):
                yield f"{tokens} tokens x {k} {name(dtype)}, {kind}", entry_check(tokens, k, dtype, kind)


def entry_check(tokens: int, k: int, dtype: torch.dtype, kind: str) -> Callable[[str], None]:
    def check(device: str) -> None:
        x, ids, weights = torch.randn(tokens, k).to(dtype), ids_of("spread", tokens, 2), torch.rand(tokens, 2)
        if kind != "slots rounded by expert":
            act = activations("none" if kind == "rows" else "static")
            scale = None if act.scale is None else act.scale.to(device)
            close(enter(x.to(device), act_scale=scale), permute_k(act.enter_rows(x, None, 1)[0]), 0)
            return
        act = activations("static", EXPERTS)
        rows = (x.repeat_interleave(2, dim=0).float() * weights.reshape(-1, 1)).to(dtype)
        found = enter(*moved((x, ids), device), EXPERTS, *moved((weights, act.scale), device), apart=True)
        close(found, permute_k(act.enter_rows(rows, ids.reshape(-1), EXPERTS)[0]), 0)

    return check


def tiled(p: Projection) -> Projection:
    words, scales = prepack(p.qdata, p.block_scale)
    return dataclasses.replace(p, qdata=words, block_scale=scales)


def tiled_products(quick: bool) -> Checks:
    number = 0
    for op in ("linear", "batched", "indexed", "grouped"):
        for what, given in situations(op).items():
            for n, k in ((16, 64), (48, 192)):
                number += 1
                for dtype in each(quick, HALVES, number):
                    modes = ("none", "static", "dynamic")
                    for mode in (modes[number % 3],) if quick else modes:
                        make = product_arguments(op, False, given, n, k, dtype, mode)
                        yield f"{op}, {what}, {n} x {k} {name(dtype)}, activations {mode}", in_tiles(op, make, dtype)


def in_tiles(op: str, make: Callable[[], tuple[Any, ...]], dtype: torch.dtype) -> Callable[[str], None]:
    def check(device: str) -> None:
        x, qdata, scale, *rest = make()
        expected = getattr(reference, op)(x, qdata, scale, *rest)
        arguments = moved((x, *prepack(qdata, scale), *rest), device)
        close(getattr(gpu_tiled, op)(*arguments), expected, BOUND[dtype])

    return check


def tiled_moe(quick: bool) -> Checks:
    """Every configuration at uneven sizes and routings; the smallest sizes and the layouts with those chosen."""
    tokens_and_patterns = ((0, "spread"), (1, "spread"), (2, "ids out of range"), *((21, p) for p in PATTERNS))
    number = 0
    for tokens, pattern in tokens_and_patterns:
        for layout in ("concatenated", "interleaved", "separate", "plain"):
            for mode in ("none", "static", "dynamic"):
                number += 1
                if quick and number % 7:
                    continue
                for dtype in each(quick, HALVES, number // 7):
                    sizes = ((64, 64), (128, 192))[number % 2]
                    what = f"{tokens} tokens, {pattern}, {sizes[0]} x {sizes[1]}, {layout}, {name(dtype)}"
                    yield f"{what}, activations {mode}", tiled_check(tokens, pattern, sizes, layout, mode, dtype)
    for configs in configurations(quick):
        for number, pattern in enumerate(PATTERNS):
            sizes = ((320, 128), (64, 192))[number % 2]
            tokens = 3 if configs.direct else 33 if quick else 75
            what = f"{tokens} tokens, {pattern}, {sizes[0]} x {sizes[1]}, {describe(configs)}"
            check = tiled_check(tokens, pattern, sizes, "concatenated", "none", HALVES[number // 2], configs)
            if not quick or pattern == "one expert":
                yield what, check


def tiled_check(
    tokens: int,
    pattern: str,
    sizes: tuple[int, int],
    layout: str,
    mode: str,
    dtype: torch.dtype,
    configs: TileConfigs | None = None,
) -> Callable[[str], None]:
    def check(device: str) -> None:
        bias = dtype if layout in ("separate", "interleaved") else None
        block = make_block(layout, *sizes, activations(mode, EXPERTS), bias)
        given = dataclasses.replace(block, up=tuple(map(tiled, block.up)), down=tiled(block.down))
        block_against_plain(block, tokens, pattern, dtype, device, lambda *a: gpu_tiled.moe(*a, configs), given)

    return check


def configurations(quick: bool) -> list[TileConfigs]:
    """Those that this GPU may be given: the defaults, and what tuning tries."""
    target: Target = target_of_device(0) if torch.cuda.is_available() else "hopper"
    found = defaults(target)
    if not quick:
        loads = (1.0, 10.0, 40.0, 80.0, 300.0)
        found += [TileConfigs(c, c) for load in loads for c in candidates(load, 2048, target)]
    return list(dict.fromkeys(found))


def describe(configs: TileConfigs) -> str:
    turns = f", {configs.up.at_once} in turns" if configs.up.at_once > 1 else ""
    return configs.text + turns


TILED: dict[str, Callable[[bool], Checks]] = {
    "tiled: table": table,
    "tiled: entry": entry,
    "tiled: down alone": tiled_products,
    "tiled: up, down": tiled_moe,
}
