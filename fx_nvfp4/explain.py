"""Compile a model for given inputs and say what became of every packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backend import collect_reports, nvfp4_emu
from .lowering import compat
from .report import Refusal, Report, module_path
from .tensor import NVFP4Weight


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile model anew for these inputs, run it once, and report its packed weights.

    Args:
        model: a module or function; need not be compiled.
        args, kwargs: what it is called with. Shapes decide what is compiled, so use typical ones.

    Returns:
        Report with ``matched`` (one entry a product that runs as an NVFP4 op) and ``refused`` (where, and why).
        A packed parameter that no compiled graph used is refused too.
    """
    model = getattr(model, "_orig_mod", model)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return nvfp4_emu(gm, example_inputs)

    with collect_reports() as report, compat.without_caches():
        torch.compile(model, backend=backend)(*args, **kwargs)
    if isinstance(model, torch.nn.Module):
        report.refused += _unused(model, report)
        report.notes += _hints(model, report)
    return report


def _unused(model: torch.nn.Module, report: Report) -> list[Refusal]:
    used = {m.weight for m in report.matched}
    packed = [name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p.data, NVFP4Weight)]
    return [
        Refusal(
            module_path(name),
            "",
            "no compiled graph uses this packed weight",
            "it ran outside the graphs (a graph break: see torch._dynamo.explain) or not at all for these inputs",
        )
        for name in packed
        if name not in used
    ]


def _hints(model: torch.nn.Module, report: Report) -> list[str]:
    config = getattr(model, "config", None)
    hints = []
    if getattr(config, "_experts_implementation", None) == "eager":
        hints.append(
            "transformers' eager expert loop depends on data and cannot be one graph; "
            'call model.set_experts_implementation("grouped_mm")'
        )
    if report.graphs > 1:
        hints.append(f"Dynamo split the model into {report.graphs} graphs; torch._dynamo.explain says where and why")
    return hints
