"""Compiles the kernels for GPUs that need not be present, and prints what the compilers say as one JSON list.

    python tests/cross_compile.py [--full] [--tiled] [--copies] [--targets 90 gfx942 ...]

Run it in a process of its own: where TRITON_INTERPRET is set, kernels are decorated for the interpreter and cannot be
compiled.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fx_nvfp4.activation import parse
from fx_nvfp4.kernels.activation import compile_activation
from fx_nvfp4.kernels.batched import batched_kernel
from fx_nvfp4.kernels.config import (
    COMBINE_COLUMNS,
    DEQUANTIZE,
    FAKE_QUANTIZE_BLOCKS,
    INDEXED,
    ROUTING_BLOCK,
    ROUTING_BLOCKS_PER_STEP,
    ROUTING_GROUPS,
    gemm_config,
    gradient_config,
)
from fx_nvfp4.kernels.dequantize import dequantize_kernel
from fx_nvfp4.kernels.fake_quantize import fake_quantize_kernel
from fx_nvfp4.kernels.grouped import grouped_kernel
from fx_nvfp4.kernels.indexed import indexed_kernel
from fx_nvfp4.kernels.input_grad import SPLIT_BLOCK, input_grad_kernel, split_grad_kernel
from fx_nvfp4.kernels.moe import combine_kernel, down_kernel, up_kernel
from fx_nvfp4.kernels.routing import count_kernel, place_kernel

TARGETS = {
    **{str(arch): GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One number of rows for each row tile that config.gemm_config knows.
ROWS = (16, 32, 64)
# Every Triton function that an activation may be built of.
ACTIVATION = (
    "silu(g) * u + gelu(g) + gelu_tanh(clamp(u, -7.0, 7.0)) + softplus(u) + where(g > 0.0, relu(u), sign(u)) + erf(g)"
    " + pow(abs(g), u) + log2(exp2(g)) + rsqrt(exp(u)) + sqrt(abs(u)) + log(sigmoid(g)) + minimum(g, maximum(u, 0.0))"
)
QUICK_DTYPE_ROWS = (("bf16", 16), ("bf16", 64), ("fp16", 32), ("fp32", 64))


def kernel_calls(dtype: str, rows: int, hip: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every kernel with its compile-time arguments."""
    config = gemm_config(rows, DTYPES[dtype], hip).meta()
    gated = gemm_config(rows, DTYPES[dtype], hip, gated=True).meta()
    silu, anything = (compile_activation(parse(text).to_triton()) for text in ("silu(g) * u", ACTIVATION))
    parts = 3 if dtype == "fp32" else 2
    return {
        "batched": (batched_kernel, config),
        "grouped": (grouped_kernel, {**config, "GROUPS": 256}),
        "input_grad": (input_grad_kernel, {**gradient_config(rows, hip).meta(), "PARTS": parts, "GROUPS": 256}),
        "split_grad": (split_grad_kernel, {"PARTS": parts, "BLOCK": SPLIT_BLOCK}),
        "indexed": (indexed_kernel, INDEXED.meta()),
        "dequantize": (dequantize_kernel, DEQUANTIZE.meta()),
        "up": (up_kernel, {**gated, "GROUPS": 256, "ACTIVATION": silu}),
        "activation": (up_kernel, {**gated, "GROUPS": 256, "ACTIVATION": anything}),
        "down": (down_kernel, {**config, "GROUPS": 256}),
        "combine": (combine_kernel, {"A": 6, "BLOCK_N": COMBINE_COLUMNS, "PDL": False}),
        "count": (count_kernel, {"BLOCK": ROUTING_BLOCK, "BLOCKS": ROUTING_BLOCKS_PER_STEP}),
        "place": (place_kernel, {"BLOCK": ROUTING_BLOCK, "GROUPS": ROUTING_GROUPS}),
        "fake_quantize": (fake_quantize_kernel, {"APPLY_SCALE": True, "BLOCKS": FAKE_QUANTIZE_BLOCKS}),
    }


def argument_type(name: str, dtype: str) -> str:
    """The Triton type of a run-time argument, by its name."""
    if not name.endswith("_ptr"):
        return "i32"
    bytes_and_indices = {"qdata_ptr": "u8", "block_scale_ptr": "u8", "offs_ptr": "i32", "ids_ptr": "i64"}
    bytes_and_indices.update(row_group_ptr="i64", order_ptr="i64", parts_ptr="bf16", before_ptr="i32", total_ptr="i32")
    bytes_and_indices.update(words_ptr="i32", scales_ptr="u16", table_ptr="i32", counts_ptr="i32")
    bytes_and_indices.update(in_scale_ptr="fp64", h_scale_ptr="fp64")
    name = name.removeprefix("gate_")
    if name in ("x_ptr", "y_ptr", "out_ptr", "bias_ptr"):
        return f"*{dtype}"
    return f"*{bytes_and_indices.get(name, 'fp32')}"


def compile_kernel(kernel: Any, arguments: dict[str, Any], dtype: str, target: GPUTarget) -> Any:
    """Compile as a launch with aligned pointers and strides would."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in arguments else argument_type(name, dtype) for name in names}
    aligned = re.compile(r".*_ptr|stride_x.|stride_q.|stride_we|K|N")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in arguments and aligned.fullmatch(name)
    }
    constants = {(names.index(name),): value for name, value in arguments.items()}
    return triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options)


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack frame, which is where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": fields["REG"], "spilled": fields["STACK"] + fields["LOCAL"]}


def amd_resources(assembly: str) -> dict[str, int]:
    """Vector registers of a thread, and how many of all registers are spilled."""
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return {"registers": fields["vgpr_count"], "spilled": fields["vgpr_spill_count"] + fields["sgpr_spill_count"]}


def has_register_operand(ptx: str) -> bool:
    """Whether a wgmma takes its left operand from registers: then a second register list follows the accumulator's."""
    return re.search(r"wgmma\.mma_async[^;{]*\{[^}]*\}\s*,\s*\{", ptx) is not None


def matrix_instructions(assembly: str) -> list[str]:
    """The instructions that multiply matrices, with the shape and dtype of their operands where the name has them."""
    found = re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_\w+?_\d+x\d+x\d+\w*", assembly)
    return sorted(set(found))


def describe(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    assembly = compiled.asm
    if target.backend == "hip":
        matrix = matrix_instructions(assembly["amdgcn"])
        return {"binary": len(assembly["hsaco"]), **amd_resources(assembly["amdgcn"]), "matrix": matrix}
    ptx = assembly["ptx"]
    return {
        "binary": len(assembly["cubin"]),
        **nvidia_resources(assembly["cubin"]),
        "matrix": matrix_instructions(ptx),
        "wgmma": "wgmma.mma_async" in ptx,
        "register_wgmma": has_register_operand(ptx),
        "tf32": ".tf32" in ptx,
    }


def combinations(full: bool) -> Iterator[tuple[str, int, frozenset[str]]]:
    """dtype, rows, and the kernels to compile with them; kernels whose tile ignores rows come once per dtype."""
    tiled = frozenset({"batched", "grouped", "input_grad", "up", "down"})
    others = frozenset(
        {"indexed", "dequantize", "fake_quantize", "split_grad", "activation", "combine", "count", "place"}
    )
    if full:
        for dtype in DTYPES:
            for rows in ROWS:
                yield dtype, rows, tiled | others if rows == ROWS[0] else tiled
        return
    for i, (dtype, rows) in enumerate(QUICK_DTYPE_ROWS):
        # These share their tile, so half of them are compiled for every other combination.
        yield dtype, rows, frozenset({"grouped", "up", "input_grad"} if i % 2 else {"batched", "down", "input_grad"})
    yield "bf16", ROWS[0], others


def compile_all(targets: list[str], full: bool) -> list[dict[str, Any]]:
    results = []
    for target_name in targets:
        target = TARGETS[target_name]
        for dtype, rows, wanted in combinations(full):
            for name, (kernel, arguments) in kernel_calls(dtype, rows, target.backend == "hip").items():
                if name not in wanted:
                    continue
                compiled = compile_kernel(kernel, arguments, dtype, target)
                case = {"target": target_name, "kernel": name, "dtype": dtype, "rows": rows}
                results.append({**case, "shared": compiled.metadata.shared, **describe(compiled, target)})
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every kernel in every dtype and tile")
    parser.add_argument("--tiled", action="store_true", help="only the kernels on tiled weights")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--copies", action="store_true", help="only how the kernels on tiled weights load, of NVIDIA's")
    options = parser.parse_args()
    if options.copies:
        from cross_compile_tiled import copies_of

        print(json.dumps(copies_of(options.targets)))
    elif options.tiled:
        from cross_compile_tiled import compile_tiled

        print(json.dumps(compile_tiled(options.targets, options.full)))
    else:
        print(json.dumps(compile_all(options.targets, options.full)))
