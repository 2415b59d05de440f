"""Compiles each kernel of a routed block twice for sm_90, and prints whether the instructions are equal, as JSON.

Once as Triton's own launcher does, which the library uses and the benchmarks time; once from the text and the types
that stand in generated code (fx_nvfp4/lowering). No GPU is needed.

    python tests/inlined_kernels.py
"""

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import MockTensor

from fx_nvfp4 import gpu_tiled
from fx_nvfp4.kernels.launch import Launch, recording
from fx_nvfp4.kernels.tile_config import BlockSizes, choose
from fx_nvfp4.lowering.kernel_source import kernel_text, parameters_of, specialise
from fx_nvfp4.moe import make_block

TARGET = GPUTarget("cuda", 90, 32)
ON_HOPPER = {"FORM": "sm90", "PDL": True, "NATIVE": True, "launch_pdl": True}


def launches(tokens: int) -> list[Launch]:
    """Of a block of Qwen3-30B-A3B's sizes, with rounded activations, as they are on Hopper."""
    experts, hidden, inner, top = 128, 2048, 768, 8

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tiles = experts, n // 16, k // 64, 32
        words, scales = empty(*tiles, 4, dtype=torch.int32), empty(*tiles, 2, dtype=torch.uint8)
        return words, scales, empty(experts, n, dtype=torch.float32)

    with FakeTensorMode(), recording() as found:
        up, scale = weight(2 * inner, hidden), empty(dtype=torch.float64)
        given = [[t] for t in up], weight(hidden, inner)
        act = {"up_act_scale": [scale], "down_act_scale": scale}
        modes = {"up_activations": "static", "down_activations": "static"}
        block = make_block(*given[0], *given[1], "silu(g) * u", "concatenated", **act, **modes)
        x = empty(tokens, hidden, dtype=torch.bfloat16)
        ids, weights = empty(tokens, top, dtype=torch.int64), empty(tokens, top, dtype=torch.float32)
        configs = choose(tokens, BlockSizes(experts, top, hidden, inner, True), "hopper")
        gpu_tiled.products(x, ids, weights, block, configs)
    return [launch._replace(constants=on_hopper(launch)) for launch in found]


def on_hopper(launch: Launch) -> dict[str, Any]:
    return {**launch.constants, **{n: v for n, v in ON_HOPPER.items() if n in launch.constants or n == "launch_pdl"}}


def by_triton(launch: Launch) -> str:
    given = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    return launch.kernel.warmup(*given, grid=(1,), **launch.constants).asm["ptx"]


def from_text(launch: Launch, folder: Path) -> str:
    arguments = dict(zip(parameters_of(launch.kernel), launch.arguments, strict=True))
    types, constants, divisible = specialise(launch.kernel, arguments, lambda name: True)
    name = launch.kernel.fn.__name__
    text = kernel_text(launch.kernel, name, launch.constants, "# the decorator of Inductor's launcher")
    path = folder / f"{name}.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n{text}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    # As Inductor's launcher: for debugging, which matters to assertions alone, and these kernels have none.
    options = {
        "debug": True,
        "sanitize_overflow": False,
        **{n: v for n, v in launch.constants.items() if n in ("num_warps", "launch_pdl")},
    }
    source = ASTSource(getattr(module, name), types, constants, attributes)
    return triton.compile(source, target=TARGET, options=options).asm["ptx"]


def instructions(ptx: str) -> str:
    """Without comments and what debuggers read."""
    code = ptx.split(".section")[0]
    return re.sub(r"\s+", " ", re.sub(r"//.*|^\s*\.(loc|file).*$", "", code, flags=re.MULTILINE))


def main() -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGET,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (1, 64, 4096):
            for launch in launches(tokens):
                ours, theirs = from_text(launch, Path(folder)), by_triton(launch)
                kernel = launch.kernel.fn.__name__
                results.append(
                    {"tokens": tokens, "kernel": kernel, "equal": instructions(ours) == instructions(theirs)}
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
