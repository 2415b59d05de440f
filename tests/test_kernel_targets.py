"""Every kernel compiles for every supported GPU, within its shared memory and without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KB = 1024
# Shared memory that one block may use. AMD: the LDS of a workgroup.
SHARED_LIMIT = {
    **{"80": 163 * KB, "86": 99 * KB, "89": 99 * KB, "90": 227 * KB, "100": 227 * KB, "120": 99 * KB},
    **{"gfx90a": 64 * KB, "gfx942": 64 * KB, "gfx950": 160 * KB},
}
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
            assert r["spilled"] == 0, r
            # float32 inputs keep their mantissa.
            assert not r.get("tf32"), r
            # Triton 3.6 miscompiles these in some loops; config.gemm_config.
            assert not r.get("register_wgmma"), r


@pytest.mark.slow
def test_kernels_compile_for_all_targets() -> None:
    check(cross_compile())


@pytest.mark.slow
def test_every_tile_in_every_dtype_compiles_for_all_targets() -> None:
    check(cross_compile("--full"))


def test_the_largest_tile_uses_hopper_matrix_units() -> None:
    """Otherwise the check for wgmma with operands in registers guards nothing."""
    results = cross_compile("--targets", "90")
    assert any(r["wgmma"] for r in results)


@pytest.mark.slow
def test_kernels_on_tiled_weights_compile_for_all_targets() -> None:
    results = cross_compile("--tiled")
    assert {r["target"] for r in results} == set(SHARED_LIMIT)
    for r in results:
        assert r["binary"] > 0, r
        assert r["shared"] <= SHARED_LIMIT[r["target"]], r
        assert r["spilled"] == 0, r
        # The layout exists so that decoded weights go from registers into Hopper's matrix units.
        assert r["target"] != "90" or not r["wgmma"] or r["register_wgmma"], r
    assert any(r["wgmma"] for r in results)
