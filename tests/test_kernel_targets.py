"""Every kernel compiles for every supported GPU, within its shared memory and without spilling registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import targets_table
import triton

KB = 1024
# Shared memory that one block may use. AMD: the LDS of a workgroup.
SHARED_LIMIT = {
    **{"80": 163 * KB, "86": 99 * KB, "89": 99 * KB, "90": 227 * KB, "100": 227 * KB, "120": 99 * KB},
    **{"gfx90a": 64 * KB, "gfx942": 64 * KB, "gfx950": 160 * KB},
}
# (Triton, target, kernel, dtype, rows) -> bytes that this Triton spills there: ptxas stops at the 168 registers with
# which three blocks share a multiprocessor.
SPILLED = {
    ("3.8", "90", "grouped", "bf16", 16): 8,
    **{("3.9", target, "down", "fp16", 32): 8 for target in ("86", "89")},
}
TRITON = ".".join(triton.__version__.split(".")[:2])
KERNELS = {
    *("batched", "grouped", "indexed", "dequantize", "fake_quantize", "input_grad", "split_grad"),
    *("up", "down", "activation", "combine", "count", "place"),
}


def cross_compile(*arguments: str) -> list[dict[str, Any]]:
    """In a process of its own, since kernels decorated for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "cross_compile.py"
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(results: list[dict[str, Any]]) -> None:
    for target, limit in SHARED_LIMIT.items():
        assert {r["kernel"] for r in results if r["target"] == target} == KERNELS
        assert {r["dtype"] for r in results if r["target"] == target} == {"bf16", "fp16", "fp32"}
        for r in (r for r in results if r["target"] == target):
            assert r["binary"] > 0, r
            assert r["shared"] <= limit, r
            assert r["spilled"] == SPILLED.get((TRITON, target, r["kernel"], r["dtype"], r["rows"]), 0), r
            # float32 inputs keep their mantissa.
            assert not r.get("tf32"), r
            # Triton 3.6 miscompiles these in some loops; config.gemm_config.
            assert not r.get("register_wgmma"), r


def test_kernels_compile_for_all_targets() -> None:
    check(cross_compile())


@pytest.mark.slow
def test_every_tile_in_every_dtype_compiles_for_all_targets() -> None:
    check(cross_compile("--full"))


def test_the_largest_tile_uses_hopper_matrix_units() -> None:
    """Otherwise the check for wgmma with operands in registers guards nothing."""
    results = cross_compile("--targets", "90")
    assert any(r["wgmma"] for r in results)


def test_kernels_on_tiled_weights_compile_for_all_targets() -> None:
    results = cross_compile("--tiled")
    assert {r["target"] for r in results} == set(SHARED_LIMIT)
    check_tiled(results)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_default_of_the_tiled_kernels_compiles(target: str) -> None:
    check_tiled(cross_compile("--tiled", "--full", "--targets", target))


def test_few_slots_are_loaded_whole_and_decoded_in_registers() -> None:
    """Masks that seemed to differ between neighbours halved every load; decoded weights went through shared memory.

    A block of gpt-oss, whose 2880 columns are no whole steps, took twice as long for one token. Under Triton 3.9 up
    products on an A100 kept twice what they load in shared memory, and in registers.
    """
    results = cross_compile("--copies", "--targets", "80", "90")
    assert len(results) == 8
    for whole, masked in zip(results[::2], results[1::2], strict=True):
        assert (whole["masked"], masked["masked"]) == (False, True)
        assert whole["copies"] == masked["copies"], (whole, masked)
        assert whole["copies"]["0x10"] > 0, whole
        assert whole["shared"] <= whole["staged"], whole


def check_tiled(results: list[dict[str, Any]]) -> None:
    for r in results:
        assert r["binary"] > 0, r
        assert r["shared"] <= SHARED_LIMIT[r["target"]], r
        assert r["spilled"] == 0, r
        # The layout exists so that decoded weights go from registers into Hopper's matrix units.
        assert r["target"] != "90" or not r["wgmma"] or r["register_wgmma"], r
    assert any(r.get("wgmma") for r in results) == any(r["target"] == "90" for r in results)


def test_the_page_of_targets_has_every_kernel_and_target() -> None:
    """docs/targets.md is made by `python tests/targets_table.py`, which is to be run again where this fails."""
    text = targets_table.PAGE.read_text()
    assert all(name in text for name in targets_table.NAMES.values())
    for kernel in KERNELS:
        assert re.search(rf"^\| {kernel} \|", text, re.MULTILINE), kernel


def test_tables_of_targets() -> None:
    case = {"kernel": "up", "dtype": "bf16", "rows": 16, "shared": 1536, "registers": 40, "spilled": 0}
    results = [
        {**case, "target": "80", "matrix": ["mma.sync"]},
        {**case, "target": "gfx942", "matrix": [], "spilled": 2},
    ]
    text = targets_table.page(results, results[:1], "9.9")
    assert "| sm_80 (A100) | `mma.sync` |\n| gfx942 (MI300) | none |" in text
    assert "| kernel | dtype | rows | 80 | gfx942 |" in text
    assert "| up | bf16 | 16 | 40, 1.5 K | 40, 1.5 K |" in text
    assert "1 of these 2 spill registers" in text
    assert "None of these 1 spills" in text
