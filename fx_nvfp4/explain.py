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

    Resets Dynamo before and after, so that this neither meets nor uses up the recompilations of the code it looks
    at: compiled models compile again at their next call, from Inductor's cache.

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

    torch._dynamo.reset()
    with collect_reports() as report, compat.without_caches():
        torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    if isinstance(model, torch.nn.Module):
        report.refused += _unused(model, report)
        report.notes += _hints(model, report)
    return report


def _unused(model: torch.nn.Module, report: Report) -> list[Refusal]:
    used = tuple(f".{m.weight}" for m in report.matched)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter.data, NVFP4Weight):
            names.setdefault(id(parameter), []).append(name)
    # By the end of the name, as Dynamo's begins with whatever the forward calls its module.
    unused = [tied[0] for tied in names.values() if not any(u.endswith(f".{n}") for u in used for n in tied)]
    return [
        Refusal(
            module_path(name),
            "",
            "no compiled graph uses this packed weight",
            "it ran outside the graphs (a graph break: see torch._dynamo.explain) or not at all for these inputs",
        )
        for name in unused
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
