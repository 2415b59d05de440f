"""The import rule: format <- tensor <- checkpoint; kernels import nothing of ours; passes know no kernel."""

import ast
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fx_nvfp4").rglob("*.py")) + sorted((ROOT / "passes").glob("*.py"))

# module or package -> what it may import of this project; packages stand for everything in them
ALLOWED = {
    "dialects": set(),
    "format": {"dialects"},
    "activation": set(),
    "prepack": {"format"},
    "layouts": {"format", "prepack"},
    "reference": {"format", "layouts"},
    "kernels": {"kernels"},
    "cpu": {"block", "format", "lowering", "reference", "report"},
    "gpu_tiled": {"activation", "block", "kernels", "layouts", "prepack", "reference", "tuning"},
    "tuning": {"kernels", "lowering"},
    "kernel_dump": {"kernels", "layouts", "passes"},
    "gpu": {"activation", "block", "format", "gpu_tiled", "kernels", "layouts", "reference"},
    "routing_checks": set(),
    "ops": {"cpu", "format", "gpu", "layouts", "reference", "routing_checks"},
    "block": {"activation", "layouts", "reference"},
    "block_grad": {"block", "ops"},
    "moe": {"activation", "block", "block_grad", "gpu", "layouts", "ops", "reference", "routing_checks"},
    "pickled": {"layouts"},
    "tensor": {"format", "dialects", "layouts", "ops", "pickled", "tiling", "torchao_interop"},
    "torchao_interop": {"format", "tensor"},
    "tiling": {"layouts", "lowering", "prepack", "tensor"},
    "state_dict": {"layouts", "tensor"},
    "prepack_model": {"layouts", "state_dict", "tensor", "tiling"},
    "tile_inputs": {"layouts", "lowering", "prepack_model", "report", "state_dict", "tensor"},
    "parts": {"layouts", "prepack", "tensor"},
    "regroup": {"layouts", "parts", "prepack", "tensor"},
    "views": {"format", "layouts", "parts", "prepack", "regroup", "tensor"},
    "products": {"tensor"},
    "dispatch": {"layouts", "products", "tensor", "views"},
    "torchao_dispatch": {"dispatch", "lowering", "tensor", "torchao_interop"},
    "serialize": {"tensor"},
    "fused": {"activation", "tensor"},
    "parameters": set(),
    "preparation": {"preparation", "fused", "layouts", "parameters", "passes", "report", "tensor", "torchao_interop"},
    "parallel": {"checkpoints", "format", "fused", "layouts", "parallel", "tensor"},
    "prepare": {"checkpoints", "preparation", "report", "state_dict", "tensor"},
    "quantization": {"quantization", "checkpoints", "dialects", "format", "ops", "reference", "tensor"},
    "quantize": {"quantization", "report", "tensor"},
    "calibrate": {"dialects", "ops", "parameters", "preparation", "quantization", "report", "tensor"},
    "save": {"checkpoints", "ops", "parallel", "tensor"},
    "report_table": {"report"},
    "report": {"report_table"},
    "passes": {"passes", "activation", "dialects", "format", "layouts", "ops", "report"},
    "lowering": {"kernels", "lowering", "passes"},
    "inlined": {"block", "gpu_tiled", "kernels", "lowering", "moe", "ops", "reference", "routing_checks", "tuning"},
    "tables": {"lowering", "report"},
    "kernel_choice": {"cpu", "kernels", "report", "tuning"},
    "inspect_table": {"checkpoints", "report_table"},
    "faithfulness": {
        *("activation", "block", "checkpoint", "checkpoints", "faithfulness", "format"),
        *("reference", "report_table", "tensor"),
    },
    "random_checkpoint": {"checkpoints", "format", "random_checkpoint"},
    "benchmark": {
        *("attention", "benchmark", "checkpoint", "checkpoints", "faithfulness", "format", "layers", "parameters"),
        *("random_checkpoint", "report_table", "tensor"),
    },
    "attention": set(),
    "layers": set(),
    "lm_harness": {"checkpoint", "prepare"},
    "cli": {
        *("benchmark", "checkpoint", "checkpoints", "dialects", "explain", "faithfulness", "inspect_table"),
        *("lm_harness", "random_checkpoint"),
    },
    "__main__": {"cli"},
    "untested": {"lowering", "report", "torchao_dispatch"},
    "debug_files": {"kernel_dump", "report", "tuning"},
    "graph_breaks": {"lowering", "report"},
    "backend": {
        *("debug_files", "inlined", "kernel_choice", "lowering", "passes", "report", "tables", "tuning"),
        *("tensor", "tile_inputs", "torchao_dispatch", "torchao_interop", "untested"),
    },
    "explain": {
        *("backend", "graph_breaks", "lowering", "preparation", "report", "tensor", "torchao_interop"),
    },
    "checkpoints": {"checkpoints", "format", "dialects", "tensor", "dispatch", "torchao_interop"},
    "checkpoint": {"checkpoints", "dialects", "parallel", "prepack_model", "state_dict", "tensor"},
}


def unit(path: Path) -> str:
    relative = path.relative_to(ROOT)
    parts = relative.parts if relative.parts[0] == "passes" else relative.parts[1:]
    return Path(parts[0]).stem


def imported(path: Path) -> set[str]:
    """Units of this project that a file imports, at its top or inside functions."""
    inside = path.relative_to(ROOT).with_suffix("").parts
    package = ["fx_nvfp4", *inside[:-1]] if inside[0] == "passes" else list(inside[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = (*base, *(node.module.split(".") if node.module else ()))
            # `from . import x` names modules, `from .x import y` names things in one.
            found |= {(*module, a.name) for a in node.names} if len(module) <= 1 else {module}
    return {f[1] for f in found if f[0] == "fx_nvfp4" and len(f) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path == ROOT / "fx_nvfp4" / "__init__.py":
        return
    name = unit(path)
    assert name in ALLOWED, f"add {name} to the import rule"
    assert imported(path) <= ALLOWED[name] | {name}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_passes_are_imported_under_one_name(path):
    # `import passes` would make a second copy of a module and register its handlers twice.
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(n == "passes" or n.startswith("passes.") for n in names)


def test_no_file_outgrows_one_responsibility():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_every_refusal_says_what_would_make_it_match():
    """A reason without advice leaves the reader of a report with nothing to do."""
    refusals = {"Refused", "Refusal", "Almost", "UnknownScale", "CannotTry", "CannotRewriteError"}
    found, silent = 0, []
    for path in FILES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", None) not in refusals:
                continue
            found += 1
            last = call.args[-1]
            if len(call.args) < 2 or (isinstance(last, ast.Constant) and not last.value):
                silent.append(f"{path.name}:{call.lineno}")
    assert found > 50
    assert not silent


def test_inductor_lowers_what_passes_emit():
    """What it has decomposed before our pass runs, clamp among it, it no longer knows: generating code would fail."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import lowerings

    found, unknown = 0, []
    for path in (ROOT / "passes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(call.args[0]) if isinstance(call, ast.Call) and call.args else ""
            if not re.fullmatch(r"(aten|prims)\.\w+\.\w+", text) or "emit" not in ast.unparse(call.func):
                continue
            found += 1
            op = attrgetter(text)(torch.ops)
            if op in decompositions and op not in lowerings:
                unknown.append(f"{path.name}:{call.lineno} {op}")
    assert found > 30
    assert not unknown


def test_importing_the_library_compiles_no_kernel():
    """A CPU needs none, and may lack Triton."""
    named = "[m for m in sys.modules if m.startswith(('fx_nvfp4.kernels.', 'fx_nvfp4.gpu'))]"
    script = f"import sys, fx_nvfp4.backend; print({named})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kernels = {"fx_nvfp4.kernels.config", "fx_nvfp4.kernels.tile_config", "fx_nvfp4.kernels.tile_candidates"}
    assert set(ast.literal_eval(done.stdout)) <= kernels
