"""The moe op taken apart in generated code: kernels as text, their launches in order, the weighted sum fused.

On a CPU Triton interprets the generated code's kernels; on a GPU Inductor's launcher compiles and starts them. What is
compiled is shown, by `inlined_kernels.py`, to be what the library's own launches compile.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tiled_moe import BOUND, activations, make, projection, routing, tiled, tiled_block
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_nvfp4  # noqa: F401
from fx_nvfp4.block import Block
from fx_nvfp4.kernels import tile_config

pytestmark = pytest.mark.usefixtures("one_thread", "_fresh")
CALL = "torch.ops.fx_nvfp4.moe.default("
KERNELS = ("table_kernel", "entry_kernel", "tiled_up_kernel", "tiled_down_kernel")


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def call(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The op on a block, between operations that Inductor may fuse with it."""
    up, down = block.up, block.down
    given = [[getattr(p, name) for p in up] for name in ("qdata", "block_scale", "global_scale")]
    bias, act = up[0].bias is not None, up[0].act
    y = torch.ops.fx_nvfp4.moe(
        x * 0.5,
        ids,
        weights,
        *given,
        down.qdata,
        down.block_scale,
        down.global_scale,
        block.activation.text,
        block.layout,
        [p.bias for p in up] if bias else None,
        down.bias,
        [p.act.scale for p in up] if act.mode == "static" else None,
        down.act.scale,
        act.mode,
        down.act.mode,
        act.dialect,
        block.weighted,
        block.out_dtype,
    )
    return y + x


def compiled(block: Block, *given: Tensor, dynamic: bool = False, **options: object) -> tuple[Tensor, str]:
    """(result, generated code)."""
    function = torch.compile(
        lambda *tensors: call(block, *tensors),
        backend="nvfp4_emu",
        options={"prepack": False, "force_disable_caches": True, **options},  # inlining is the default
        dynamic=dynamic,
    )
    with torch.no_grad():
        result, codes = run_and_get_code(function, *given)
    return result, "".join(codes)


def check(block: Block, tokens: int, device: str, dtype: torch.dtype = torch.float16, top: int = 2) -> str:
    """The generated code of a block that is inlined and right."""
    experts, hidden = block.down.global_scale.shape
    ids, weights = routing(tokens, top, experts, device)
    ids[tokens // 2, 0] = -1
    ids[tokens // 3, 1] = experts
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    packed = tiled_block(block)
    result, code = compiled(packed, x, ids, weights)
    expected = call(block, x, ids, weights).double()
    assert CALL not in code
    assert result.dtype == (torch.float32 if block.out_dtype == torch.float32 else dtype)
    error = (result.double() - expected).norm() / expected.norm()
    assert error < BOUND[dtype], float(error)
    return code


@pytest.mark.in_part(8)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "separate", "plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layouts(layout, dtype, device):
    # Rows that are rounded enter under every release of Triton.
    act = activations("static", "hardware", False, 4, device)
    code = check(make(layout, device=device, bias=dtype, act=act), 7, device, dtype)
    assert all(f"def {name}_" in code for name in KERNELS)


def test_rows_that_need_nothing_do_not_enter(device, monkeypatch):
    """The up kernel then waits for the table's, which is the one ahead of it."""
    monkeypatch.setattr(tile_config, "_triton_version", lambda: (3, 7))
    code = check(make(device=device), 7, device)
    assert "def entry_kernel_" not in code
    assert "EARLY = False" in code or "EARLY = tl.constexpr(False)" in code


@pytest.mark.in_part(2)
@pytest.mark.parametrize("per_expert", [False, True])
def test_rounded_activations(per_expert, device):
    check(make(device=device, act=activations("static", "hardware", per_expert, 4, device)), 7, device)


@pytest.mark.in_part(6)
@pytest.mark.parametrize("weighted", ["output", "input"])
@pytest.mark.parametrize("tokens", [2, 5, 40])
def test_numbers_of_tokens(weighted, tokens, device):
    """Each slot by itself, one table for all, weights on either side."""
    code = check(make(device=device, weighted=weighted), tokens, device)
    assert ("def table_kernel_" in code) == (tokens > 2)


def test_many_slots_take_the_table_of_counts(monkeypatch, device):
    monkeypatch.setattr("fx_nvfp4.kernels.tile_table.TABLE_SLOTS_AT_ONCE", 64)
    assert "def table_of_counts_kernel_" in check(make(device=device), 48, device)


def test_the_result_may_have_a_dtype_of_its_own(device):
    check(dataclasses.replace(make(device=device), out_dtype=torch.float32), 5, device)


def test_launches_keep_their_order_and_the_sum_fuses_with_the_residual(device):
    """The up kernel reads the table before the kernel ahead of it has ended, so that must not be the table's."""
    act = activations("static", "hardware", False, 4, device)
    code = check(make(device=device, act=act), 7, device)
    text = code[code.index("def call(") :]
    starts = [text.index(f"{name}_{i}.run(") for i, name in enumerate(KERNELS)]
    assert starts == sorted(starts)
    rest = text[starts[-1] :].splitlines()[1:]
    calls = [line for line in rest if "fused" in line and "#" not in line and "(" in line]
    assert len(calls) == 1, calls


def test_blocks_of_one_shape_share_kernels(device):
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    function = torch.compile(
        lambda x: call(block, call(block, x, ids, weights), ids, weights),
        backend="nvfp4_emu",
        options={"inline": True, "prepack": False, "force_disable_caches": True},
    )
    with torch.no_grad():
        result, (code,) = run_and_get_code(function, x)
    assert code.count("def tiled_up_kernel_") == 1
    assert code.count(".run(") >= 8
    expected = call(block, call(block, x, ids, weights), ids, weights)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_a_symbolic_number_of_tokens_stays_a_call(device):
    """The choice of tile sizes is one of each call then."""
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    result, code = compiled(block, x, ids, weights, dynamic=True)
    assert CALL in code
    torch.testing.assert_close(result, call(block, x, ids, weights), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "block",
    [
        lambda device: tiled_block(make(device=device, act=activations("dynamic", "hardware", False, 4, device))),
        lambda device: make(device=device),
    ],
    ids=["scales that torch computes", "weights not in tiles"],
)
def test_what_is_more_than_launches_stays_a_call(block, device):
    block = block(device)
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    result, code = compiled(block, x, ids, weights)
    assert CALL in code
    torch.testing.assert_close(result, call(block, x, ids, weights), rtol=2e-2, atol=2e-2)


@pytest.mark.in_part(2)
@pytest.mark.parametrize("op", ["linear", "batched"])
@pytest.mark.parametrize("mode", ["none", "static"])
def test_products_are_inlined_too(op, mode, device):
    act = activations(mode, "hardware", False, 4, device)
    p = tiled(projection(4, 64, 128, device, act))
    weight = [part[0] for part in p.weight] if op == "linear" else p.weight
    x = torch.randn(4, 5, 128, device=device).half()
    options = {"inline": True, "prepack": False, "force_disable_caches": True}

    def run(x: Tensor) -> Tensor:
        return getattr(torch.ops.fx_nvfp4, op)(x, *weight, act.scale, act.mode).relu()

    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(run, backend="nvfp4_emu", options=options), x)
    assert f"torch.ops.fx_nvfp4.{op}.default(" not in code
    assert "def tiled_down_kernel_" in code
    torch.testing.assert_close(result, run(x), rtol=2e-3, atol=2e-3)


def short_call(block: Block, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As models call it: no operand that has a default."""
    up, down = block.up[0], block.down
    given = [[part] for part in up.weight]
    return torch.ops.fx_nvfp4.moe(x, ids, weights, *given, *down.weight, block.activation.text, block.layout)


def test_after_a_compilation_without_the_option(device):
    """Inductor then hands the operands over by name, with their defaults."""
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    for inline in (False, True, False, True):
        torch._dynamo.reset()
        options = {"inline": inline, "prepack": False, "force_disable_caches": True}
        function = torch.compile(short_call, backend="nvfp4_emu", options=options)
        with torch.no_grad():
            result, (code,) = run_and_get_code(function, block, x, ids, weights)
        assert (CALL in code) != inline
        torch.testing.assert_close(result, short_call(block, x, ids, weights), rtol=2e-3, atol=2e-3)


def test_branches_have_kernels_of_their_own(device):
    """Each branch is written by a wrapper of its own, and all their kernels stand in one module."""
    blocks = [tiled_block(make(device=device, activation=text)) for text in ("silu(g) * u", "relu(g) * u")]
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()

    def run(x: Tensor, first: Tensor) -> Tensor:
        branches = [lambda x, block=block: short_call(block, x, ids, weights) for block in blocks]
        return torch.cond(first, *branches, (x,))

    options = {"inline": True, "prepack": False, "force_disable_caches": True}
    function = torch.compile(run, backend="nvfp4_emu", options=options)
    for place, block in enumerate(blocks):
        with torch.no_grad():
            result = function(x, torch.tensor(place == 0, device=device))
        torch.testing.assert_close(result, short_call(block, x, ids, weights), rtol=2e-3, atol=2e-3)


def test_separate_weights_that_share_a_scale(device):
    """One tensor given twice is one: gate and up then share the rounded rows."""
    check(make("separate", device=device, act=activations("static", "hardware", False, 4, device)), 7, device)


def test_operands_that_do_not_fit_raise_as_they_do_uncompiled(device):
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    with pytest.raises(ValueError, match="weights must be floating point"):
        compiled(block, x, ids, weights[:2])


def test_the_debug_mode_looks_at_ids_at_each_call(monkeypatch, device):
    monkeypatch.setenv("FX_NVFP4_DEBUG_IDS", "1")
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    ids[3, 1] = 4
    x = torch.randn(7, 128, device=device).half()
    with pytest.raises(IndexError):
        compiled(block, x, ids, weights)


def test_without_the_option_the_op_is_a_call(device):
    block = tiled_block(make(device=device))
    ids, weights = routing(7, 2, 4, device)
    x = torch.randn(7, 128, device=device).half()
    assert CALL in compiled(block, x, ids, weights, inline=False)[1]


def test_generated_kernels_compile_to_the_instructions_of_the_library_s_launches():
    """In a process of its own, since kernels decorated for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "inlined_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 12
    assert all(f["equal"] for f in found), found
