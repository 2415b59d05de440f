"""The import rule: format <- tensor <- checkpoint; kernels import nothing of ours; passes know no kernel."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fx_nvfp4").rglob("*.py")) + sorted((ROOT / "passes").glob("*.py"))

# module or package -> what it may import of this project; packages stand for everything in them
ALLOWED = {
    "dialects": set(),
    "format": {"dialects"},
    "activation": set(),
    "reference": {"format"},
    "kernels": {"kernels"},
    "gpu": {"activation", "block", "format", "kernels", "reference"},
    "ops": {"format", "reference", "gpu"},
    "block": {"activation", "reference"},
    "block_grad": {"block", "ops"},
    "moe": {"activation", "block", "block_grad", "gpu", "ops", "reference"},
    "tensor": {"format", "dialects", "ops", "torchao_interop"},
    "torchao_interop": {"format", "tensor"},
    "parts": {"tensor"},
    "regroup": {"parts", "tensor"},
    "views": {"format", "parts", "regroup", "tensor"},
    "products": {"tensor"},
    "dispatch": {"products", "tensor", "views"},
    "torchao_dispatch": {"dispatch", "lowering", "torchao_interop"},
    "serialize": {"tensor"},
    "fused": {"activation", "tensor"},
    "preparation": {"preparation", "fused", "passes", "report", "tensor", "torchao_interop"},
    "prepare": {"checkpoints", "preparation", "report", "tensor"},
    "report_table": {"report"},
    "report": {"report_table"},
    "passes": {"passes", "activation", "dialects", "format", "ops", "report"},
    "lowering": {"lowering", "passes"},
    "tables": {"lowering", "report"},
    "kernel_choice": {"kernels", "report"},
    "inspect_table": {"checkpoints", "report_table"},
    "cli": {"checkpoint", "checkpoints", "dialects", "explain", "inspect_table"},
    "__main__": {"cli"},
    "debug_files": {"report"},
    "graph_breaks": {"lowering", "report"},
    "backend": {
        *("debug_files", "kernel_choice", "lowering", "passes", "report", "tables"),
        *("tensor", "torchao_dispatch", "torchao_interop"),
    },
    "explain": {
        *("backend", "graph_breaks", "lowering", "preparation", "report", "tensor", "torchao_interop"),
    },
    "checkpoints": {"checkpoints", "format", "dialects", "tensor", "dispatch", "torchao_interop"},
    "checkpoint": {"checkpoints", "format", "dialects", "tensor", "dispatch", "torchao_interop"},
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
