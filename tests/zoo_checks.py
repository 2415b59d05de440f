"""Compiles a zoo module, runs it against eager, and judges the graph: what became of every packed weight."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_zoo import MoE, Recipe, packings
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from zoo_styles import DATA_DEPENDENT, IN_BFLOAT16

from fx_nvfp4.backend import collect_reports
from fx_nvfp4.report import Report

_OURS = "fx_nvfp4"
_PACKED = (torch.uint8, torch.int8, torch.int32, torch.float4_e2m1fn_x2)
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Largest difference allowed between compiled and eager, and from the fp32 reference, over the largest value.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


class DenseWeights(CustomGraphPass):
    """Finds float tensors, as large as a weight, that the graph still makes of packed bytes after our pass."""

    def __init__(self, smallest: int) -> None:
        self.smallest = smallest
        self.found: list[str] = []
        self.ops: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        tainted: set[fx.Node] = set()
        for node in graph.nodes:
            val = node.meta.get("val")
            if node.op == "placeholder":
                if isinstance(val, Tensor) and val.dtype in _PACKED and val.dim() > 1:
                    tainted.add(node)
                continue
            if node.op != "call_function":
                continue
            name = str(node.target)
            if name.startswith(_OURS):
                self.ops.append(name.split(".")[1])
            if name.startswith(_OURS) and "dequantize" not in name:
                continue
            if any(source in tainted for source in node.all_input_nodes):
                tainted.add(node)
                if isinstance(val, Tensor) and val.dtype in _WIDE and _elements(val) >= self.smallest:
                    self.found.append(f"{node.name} {list(val.shape)}")

    def uuid(self) -> Any:
        return None


def _elements(val: Tensor) -> int:
    """Number of elements, counting a symbolic size as one."""
    return math.prod(size for size in val.shape if isinstance(size, int))


@dataclass
class Outcome:
    """What compiling one module gave.

    kind: "lifted" (at least one block is one op and nothing is refused), "rewritten", "refused" (with reasons), or a
    bug: "DIFFERENT" numbers, "SILENT" dequantisation, or a "CRASH".
    """

    kind: str
    report: Report = field(default_factory=Report)
    dense: list[str] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    error: float = 0.0
    reference_error: float = 0.0
    detail: str = ""

    @property
    def bug(self) -> bool:
        return self.kind.isupper()


@contextlib.contextmanager
def capturing(wanted: bool) -> Iterator[None]:
    """Settings of Dynamo under which styles that depend on data are one graph."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=wanted, capture_scalar_outputs=wanted):
        yield


def tokens(recipe: Recipe, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, recipe.hidden, generator=generator).to(recipe.dtype)


def check(
    recipe: Recipe,
    shapes: Sequence[tuple[int, ...]] = ((5,),),
    dynamic: str = "no",
    options: dict[str, Any] | None = None,
    fullgraph: bool = True,
    capture: bool = True,
) -> Outcome:
    """Compile the module of `recipe` and compare it with eager at every token shape, one graph for all.

    dynamic: sizes that are symbols: "no" ones, those of "tokens", or "all" that Dynamo can make so.
    """
    torch._dynamo.reset()
    model = MoE(recipe).requires_grad_(False)
    watch = DenseWeights(model.smallest_weight())
    given = {"codegen": False, "force_disable_caches": True, "joint_custom_post_pass": watch, **(options or {})}
    symbols = {"no": False, "tokens": None, "all": True}[dynamic]
    run = torch.compile(model, backend="nvfp4_emu", options=given, dynamic=symbols, fullgraph=fullgraph)
    error, reference_error = 0.0, 0.0
    with torch.no_grad(), collect_reports() as report, capturing(capture and recipe.style in DATA_DEPENDENT):
        for i, shape in enumerate(shapes):
            x = tokens(recipe, *shape, seed=i + 1)
            want = model(x)
            if dynamic == "tokens":
                for d in range(len(shape)):
                    torch._dynamo.mark_dynamic(x, d)
            # Sizes that happen to be equal are no reason to compile again.
            apart = torch.fx.experimental._config.patch(use_duck_shape=False)
            with torch._dynamo.config.patch(error_on_recompile=i > 0), apart:
                got = run(x)
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            error = max(error, difference(got, want, coarse(recipe)))
            if not rounds_activations(recipe):
                reference_error = max(reference_error, difference(got, model.reference(x)))
    outcome = Outcome("", report, watch.found, watch.ops, error, reference_error)
    outcome.kind, outcome.detail = _judge(outcome, bound(recipe))
    return outcome


def _judge(o: Outcome, limit: float) -> tuple[str, str]:
    if not max(o.error, o.reference_error) <= limit:
        return "DIFFERENT", f"{o.error:.3g} from eager, {o.reference_error:.3g} from the reference, allowed {limit:.3g}"
    if o.dense and not o.report.refused:
        return "SILENT", ", ".join(o.dense[:3])
    if o.report.refused:
        return "refused", "; ".join(dict.fromkeys(r.reason for r in o.report.refused))
    lifted = any(b.lifted for b in o.report.blocks)
    why = "; ".join(b.reason for b in o.report.blocks if not b.lifted)
    return ("lifted" if lifted else "rewritten"), why


def difference(got: Tensor, want: Tensor, mean: bool = False) -> float:
    """Largest absolute difference over the largest value, or the same of means; NaN where either is not finite."""
    got, want = got.double(), want.double()
    if not want.numel():
        return 0.0
    scale = float(want.square().mean().sqrt() if mean else want.abs().max())
    assert scale > 0, "nothing to compare"
    off = got - want
    return float(off.square().mean().sqrt() if mean else off.abs().max()) / scale


def rounds_activations(recipe: Recipe) -> bool:
    return any(p.tensor in ("static", "dynamic") for p in packings(recipe.packing))


def coarse(recipe: Recipe) -> bool:
    """Rounded activations fall to the other side of a code boundary where short arithmetic differs in its last bit."""
    return rounds_activations(recipe) and _precision(recipe) != torch.float32


def bound(recipe: Recipe) -> float:
    return 0.2 if coarse(recipe) else BOUNDS[_precision(recipe)]


def _precision(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.style in IN_BFLOAT16 else recipe.dtype
