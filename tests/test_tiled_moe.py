"""The routed block on tiled weights against the plain block: layouts, sizes, routings, activations, biases.

Every case poisons its outputs, runs twice, and compares the two bit for bit: Triton 3.6 miscompiles some loops with a
register operand into races that one run does not show.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from fx_nvfp4 import block as plain
from fx_nvfp4 import gpu_tiled, reference
from fx_nvfp4.activation import parse
from fx_nvfp4.block import Block, Projection
from fx_nvfp4.kernels import tile_config
from fx_nvfp4.kernels.entry import enter
from fx_nvfp4.kernels.tile_config import BlockSizes, TileConfig, TileConfigs, choose
from fx_nvfp4.kernels.tile_table import sort_into_tiles
from fx_nvfp4.prepack import permute_k, prepack
from fx_nvfp4.reference import Activations

NONE = Activations("none", None, "hardware")
# 16 bits of the products' rounding, of h and of the sum.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def projection(
    experts: int, n: int, k: int, device: str, act: Activations = NONE, bias: torch.dtype | None = None
) -> Projection:
    qdata = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(experts, n, k // 16, device=device) + 0.25).to(torch.float8_e4m3fn)
    global_scale = (torch.rand(experts, n, device=device) + 0.5) * 0.5 / k**0.5
    made = None if bias is None else torch.randn(experts, n, device=device).to(bias)
    return Projection(qdata, scale, global_scale, made, act)


def tiled(p: Projection) -> Projection:
    words, scales = prepack(p.qdata, p.block_scale)
    return dataclasses.replace(p, qdata=words, block_scale=scales)


def tiled_block(block: Block) -> Block:
    return dataclasses.replace(block, up=tuple(map(tiled, block.up)), down=tiled(block.down))


def poison(x: Tensor, block: Block, slots: int) -> None:
    """Memory that the next allocations are likely to get holds NaN."""
    inner = block.down.qdata.shape[2] * 64
    wide = max(x.shape[1], inner, block.down.global_scale.shape[1])
    for _ in range(4):
        torch.full((slots, wide), float("nan"), dtype=x.dtype, device=x.device)


def check(block: Block, x: Tensor, ids: Tensor, weights: Tensor, configs: TileConfigs | None = None) -> None:
    expected = plain.moe(x, ids, weights, block).double()
    packed = tiled_block(block)
    runs = []
    for _ in range(2):
        poison(x, packed, ids.numel())
        runs.append(gpu_tiled.moe(x, ids, weights, packed, configs))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    error = (runs[0].double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < BOUND[x.dtype], float(error)


def routing(tokens: int, top: int, experts: int, device: str) -> tuple[Tensor, Tensor]:
    scores = torch.rand(tokens, experts, device=device)
    values, ids = scores.topk(top)
    return ids, values / values.sum(-1, keepdim=True)


def make(
    layout: str = "concatenated",
    experts: int = 4,
    hidden: int = 128,
    inner: int = 64,
    device: str = "cpu",
    act: Activations = NONE,
    bias: torch.dtype | None = None,
    activation: str | None = None,
    weighted: str = "output",
) -> Block:
    rows = 2 * inner if layout in ("concatenated", "interleaved") else inner
    count = 2 if layout == "separate" else 1
    up = tuple(projection(experts, rows, hidden, device, act, bias) for _ in range(count))
    text = activation or ("relu(u)" if layout == "plain" else "silu(g) * u")
    return Block(up, projection(experts, hidden, inner, device, act, bias), parse(text), layout, weighted)


@pytest.mark.in_part(8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "separate", "plain"])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(layout, dtype, bias, device):
    block = make(layout, device=device, bias=dtype if bias else None)
    x = torch.randn(5, 128, device=device).to(dtype)
    check(block, x, *routing(5, 2, 4, device))


@pytest.mark.in_part(4)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_chosen_configurations(tokens, device):
    block = make(device=device, hidden=192)
    x = torch.randn(tokens, 192, device=device).half()
    check(block, x, *routing(tokens, 3, 4, device))


@pytest.mark.in_part(3)
@pytest.mark.parametrize("mode", ["none", "static"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("triton", [(3, 7), (3, 8)])
def test_both_orders_of_the_matrix_units(triton, tokens, mode, monkeypatch, device):
    """mma.sync's left operand holds fours of neighbours up to Triton 3.7, and pairs since."""
    monkeypatch.setattr(tile_config, "_triton_version", lambda: triton)
    act = NONE if mode == "none" else activations(mode, "hardware", True, 8, device)
    block = make(experts=8, hidden=192, inner=64, act=act, device=device)
    ids, weights = routing(tokens, 2, 8, device)
    assert choose(tokens, BlockSizes(8, 2, 192, 64, True), "hopper").up.largest == 8
    check(block, torch.randn(tokens, 192, device=device).half(), ids, weights)


CONFIGS = [
    TileConfig(128, 16, 16, 128, num_warps=4, num_stages=3),
    TileConfig(64, 16, 32, 128, num_warps=4, num_stages=3),
    TileConfig(128, 16, 64, 128, num_warps=4, num_stages=3),
    TileConfig(128, 16, 128, 128, num_warps=8, num_stages=3, at_once=8),
    TileConfig(64, 8, 8, 128, num_warps=4, num_stages=3),
    TileConfig(32, 8, 8, 256, num_warps=2, num_stages=4),
]


@pytest.mark.in_part(10)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("sizes", [(128, 64), (64, 192), pytest.param((320, 128), marks=pytest.mark.slow)], ids=str)
def test_every_configuration_with_uneven_experts(config, sizes, device):
    """Empty experts, one with most tokens, slots of nobody, sizes that do not fill a tile of the product."""
    block = make(experts=5, hidden=sizes[0], inner=sizes[1], device=device)
    tokens = 75
    ids, weights = routing(tokens, 2, 5, device)
    ids[:50, 0] = 3
    ids[ids == 1] = 2
    ids[60:, 1] = -1
    x = torch.randn(tokens, sizes[0], device=device).half()
    check(block, x, ids, weights, TileConfigs(config, config))


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "static"])
def test_tiles_between_powers_of_two(mode, device):
    """48 and 96 tokens, which are two products by the same decoded weights; experts that need one, or both in turn."""
    config = TileConfig(64, 16, 96, 64, num_warps=4, num_stages=2, at_once=8)
    assert config.sizes == (16, 32, 48, 64, 96)
    act = NONE if mode == "none" else activations(mode, "hardware", True, 3, device)
    block = make(experts=3, hidden=64, inner=64, act=act, device=device)
    ids = torch.arange(3, device=device).repeat_interleave(torch.tensor([33, 130, 1], device=device)).unsqueeze(1)
    ids = ids[torch.randperm(len(ids), device=device)]
    x, weights = torch.randn(len(ids), 64, device=device).half(), torch.rand(len(ids), 1, device=device)
    check(block, x, ids, weights, TileConfigs(config, config))


STATIC, DYNAMIC = "static", "dynamic"


def activations(mode: str, dialect: str, per_expert: bool, experts: int, device: str) -> Activations:
    if mode != STATIC:
        return Activations(mode, None, dialect)
    scale = torch.rand(experts if per_expert else (), dtype=torch.float64, device=device) * 1e-3 + 5e-4
    return Activations(mode, scale, dialect)


@pytest.mark.in_part(8)
@pytest.mark.parametrize("mode", [STATIC, DYNAMIC])
@pytest.mark.parametrize("dialect", ["hardware", "vllm"])
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_activations_are_rounded_as_the_plain_block_rounds_them(mode, dialect, per_expert, tokens, device):
    act = activations(mode, dialect, per_expert, 4, device)
    block = make(device=device, hidden=128, inner=128, act=act)
    x = torch.randn(tokens, 128, device=device).bfloat16()
    check(block, x, *routing(tokens, 2, 4, device))


def test_gate_and_up_with_activation_scales_of_their_own(device):
    block = make("separate", device=device, hidden=128, inner=64)
    acts = [activations(STATIC, "hardware", True, 4, device) for _ in range(2)]
    up = tuple(dataclasses.replace(p, act=act) for p, act in zip(block.up, acts, strict=True))
    x = torch.randn(6, 128, device=device).bfloat16()
    check(dataclasses.replace(block, up=up), x, *routing(6, 2, 4, device))


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_sum_is_rounded_once_to_the_dtype_asked_for(tokens, device):
    block = make(device=device)
    x = torch.randn(tokens, 128, device=device).half()
    ids, weights = routing(tokens, 2, 4, device)
    narrow, wide = (
        gpu_tiled.moe(x, ids, weights, tiled_block(dataclasses.replace(block, out_dtype=dtype)))
        for dtype in (None, torch.float32)
    )
    assert wide.dtype == torch.float32
    assert torch.equal(narrow, wide.half())
    assert not torch.equal(narrow.float(), wide)


@pytest.mark.parametrize("tokens", [1, 5])
def test_routing_weights_on_the_input(tokens, device):
    block = make(device=device, weighted="input", act=activations(STATIC, "hardware", True, 4, device))
    x = torch.randn(tokens, 128, device=device).half()
    check(block, x, *routing(tokens, 1, 4, device))


@pytest.mark.in_part(4)
@pytest.mark.parametrize("mode", ["none", STATIC, DYNAMIC])
@pytest.mark.parametrize("op", ["linear", "batched", "indexed", "grouped"])
def test_products_of_other_ops(op, mode, device):
    act = activations(mode, "hardware", op != "linear", 3, device)
    p = projection(3, 64, 192, device)
    if op == "linear":
        p = dataclasses.replace(p, qdata=p.qdata[0], block_scale=p.block_scale[0], global_scale=p.global_scale[0])
    x = torch.randn(*((3, 7) if op == "batched" else (21,)), 192, device=device).bfloat16()
    extra = {
        "indexed": (torch.randint(-1, 4, (21,), device=device),),
        "grouped": (torch.tensor([4, 4, 18], dtype=torch.int32, device=device),),
    }.get(op, ())
    expected = getattr(reference, op)(x, *p.weight, *extra, act)
    torch.full((64, 64), float("nan"), dtype=x.dtype, device=device)
    out = getattr(gpu_tiled, op)(x, *tiled(p).weight, *extra, act)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
    assert torch.equal(out == 0, expected == 0)


@pytest.mark.parametrize("op", ["linear", "batched"])
def test_rows_of_several_tiles_need_no_table(op, device):
    """300 rows are three tiles of an expert, the last not full, and only their place says whose they are."""
    p = projection(2, 64, 64, device)
    if op == "linear":
        p = dataclasses.replace(p, qdata=p.qdata[0], block_scale=p.block_scale[0], global_scale=p.global_scale[0])
    x = torch.randn(*((2, 300) if op == "batched" else (300,)), 64, device=device).bfloat16()
    act = activations("none", "hardware", False, 2, device)
    expected = getattr(reference, op)(x, *p.weight, act)
    out = getattr(gpu_tiled, op)(x, *tiled(p).weight, act)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("experts", [3, 130])
@pytest.mark.parametrize("tokens", [1, 200, 3000])
def test_table_names_every_slot_once_in_rising_order(tokens, experts, device):
    """3,000 tokens of two slots are more than one launch sorts."""
    ids = torch.randint(-1, experts + 1, (tokens, 2), device=device)
    table = sort_into_tiles(ids, experts, 16).cpu()
    found: dict[int, list[int]] = {}
    for expert, count, *rest in table.tolist():
        found.setdefault(expert if count else -1, []).extend(rest[2 : 2 + count])
    flat = ids.cpu().flatten()
    for e in range(experts):
        assert found.get(e, []) == (flat == e).nonzero().flatten().tolist()


@pytest.mark.in_part(2)
@pytest.mark.parametrize("tokens", [3, 520])
def test_rows_of_slots_are_weighted_and_rounded_by_their_experts(tokens, device):
    """520 tokens are so many that a program reads a row once for all of its slots."""
    x = torch.randn(tokens, 64, device=device).half()
    ids, weights = routing(tokens, 3, 5, device)
    act_scale = torch.rand(5, dtype=torch.float64, device=device) * 1e-3 + 5e-4
    rows = (x.repeat_interleave(3, dim=0).float() * weights.reshape(-1, 1)).half()
    expected, _ = Activations("static", act_scale, "hardware").enter_rows(rows, ids.reshape(-1), 5)
    found = enter(x, ids, 5, weights, act_scale, apart=True)
    torch.testing.assert_close(found, permute_k(expected), rtol=0, atol=0)


@pytest.mark.in_part(8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-20, 0.003, 1.0, 700.0])
def test_rows_enter_with_the_oracle_s_bits(dtype, scale, device):
    """Any bit patterns: NaN, infinities, subnormals, blocks whose scale is zero, subnormal, or past the largest."""
    bits = torch.randint(-(2**15), 2**15, (64, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    x = torch.cat((bits.view(dtype), torch.randn(64, 256).mul(scale * 900).to(dtype))).to(device)
    act_scale = torch.tensor(scale, dtype=torch.float64, device=device)
    expected, _ = Activations("static", act_scale, "hardware").enter_rows(x, None, 1)
    torch.testing.assert_close(enter(x, act_scale=act_scale, permute=False), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(enter(x, act_scale=act_scale), permute_k(expected), rtol=0, atol=0, equal_nan=True)
