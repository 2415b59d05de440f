"""Compile a model for given inputs and say what became of every packed weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .backend import collect_reports, nvfp4_emu
from .graph_breaks import BreakLog
from .lowering import compat
from .report import ROOT, GraphBreak, Match, Refusal, Report, module_path
from .tensor import NVFP4Weight
from .torchao_interop import is_torchao_nvfp4

_UNUSED = "no compiled graph uses this packed weight"


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile model anew for these inputs, run it once, and report its packed weights.

    The pass is the real one; what it leaves runs op by op, as generating code would change nothing that is reported
    and take most of the time. Resets Dynamo before and after, so that this neither meets nor uses up the
    recompilations of the code it looks at: compiled models compile again at their next call, from Inductor's cache.

    Args:
        model: a module or function, compiled or not.
        args, kwargs: what it is called with. Shapes decide what is compiled, so use typical ones.

    Returns:
        Report with ``matched`` (one entry a product that runs as an NVFP4 op), ``blocks`` (what became of each
        mixture of experts), ``refused`` (where, and why) and ``breaks`` (lines at which Dynamo ended a graph). A
        packed weight that no compiled graph used is refused too, with the break that is likely to hide it.
    """
    model = getattr(model, "_orig_mod", model)
    root = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    weights = _Weights(root if isinstance(root, torch.nn.Module) else torch.nn.Module())
    report, breaks = Report(), BreakLog()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with collect_reports() as part:
            compiled = nvfp4_emu(gm, example_inputs, options={"codegen": False})
        report.extend(weights.named(part, gm, example_inputs))
        return compiled

    torch._dynamo.reset()
    with breaks.listen(), compat.without_caches():
        torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    unused = weights.unused()
    report.breaks = breaks.breaks(root, [name for name, _ in unused])
    report.refused += [_refusal(name, dims, report.breaks) for name, dims in unused]
    report.notes += _hints(root, report)
    return report


class _Weights:
    """The packed weights of a model, by identity: a graph knows them by the names that its own function uses."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._names = {id(tensor): name for name, tensor in _tensors(model)}
        self._packed = {id(tensor): (name, list(tensor.shape)) for name, tensor in _packed(model)}
        self._used: set[int] = set()

    def unused(self) -> list[tuple[str, list[int]]]:
        """(name, shape) of the packed weights that entered no graph."""
        return [found for key, found in self._packed.items() if key not in self._used]

    def named(self, report: Report, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Report:
        """A graph's report with names as in the model, also if the graph is that of a module inside it."""
        self._used.update(map(id, example_inputs))
        prefixes = set()
        for (source, _), value in zip(compat.input_sources(gm), example_inputs, strict=False):
            name, inside = self._names.get(id(value), ""), module_path(source)
            if name and (name == inside or name.endswith(f".{inside}")):
                prefixes.add(name.removesuffix(inside))
        prefix = prefixes.pop() if len(prefixes) == 1 else ""
        return _moved(report, prefix) if prefix else report


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _packed(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Packed parameters, and bytes that lie beside their block scales."""
    for name, tensor in _tensors(model):
        if isinstance(tensor.data, NVFP4Weight) or is_torchao_nvfp4(tensor.data):
            yield name, tensor
        elif tensor.dim() > 1 and tensor.dtype in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
            module = model.get_submodule(name.rpartition(".")[0])
            beside = [t for _, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
            # Two codes a byte and a scale for 16 of them: one byte of scales for eight of codes.
            if any(t.dtype.itemsize == 1 and t.dim() > 1 and t.numel() * 8 == tensor.numel() for t in beside):
                yield name, tensor


def _moved(report: Report, prefix: str) -> Report:
    """A report whose names begin at the model and not at the module inside it that was traced."""

    def path(name: str) -> str:
        return prefix.removesuffix(".") if name == ROOT else prefix + name

    def match(m: Match) -> Match:
        return dataclasses.replace(m, where=_placed(m.where, path), weight=prefix + m.weight)

    return dataclasses.replace(
        report,
        matched=[match(m) for m in report.matched],
        refused=[dataclasses.replace(r, where=_placed(r.where, path)) for r in report.refused],
        blocks=[
            dataclasses.replace(b, where=_placed(b.where, path), weights=tuple(prefix + w for w in b.weights))
            for b in report.blocks
        ],
    )


def _placed(where: str, path: Callable[[str], str]) -> str:
    """A module path moved; where there was only a line of code, the module before it."""
    if not where.startswith(ROOT):
        return path(where)
    return path(ROOT) + where.removeprefix(ROOT)


def _refusal(name: str, shape: list[int], breaks: Sequence[GraphBreak]) -> Refusal:
    hidden_by = next((b for b in breaks if name in b.hides), None)
    if hidden_by is None:
        advice = "the model did not call it for these inputs, or not under torch.compile"
    else:
        hint = f". {hidden_by.hints[0]}" if hidden_by.hints else ""
        advice = f"it runs outside of all graphs, likely as the graph breaks at {hidden_by}{hint}"
    return Refusal(name, "", f"{_UNUSED} {shape}", advice)


def _hints(model: object, report: Report) -> list[str]:
    config = getattr(model, "config", None)
    hints = []
    if getattr(config, "_experts_implementation", None) == "eager":
        hints.append(
            "transformers' eager expert loop depends on data and cannot be one graph; "
            'call model.set_experts_implementation("grouped_mm")'
        )
    if report.graphs > 1:
        hints.append(f"Dynamo split the model into {report.graphs} graphs")
    return hints
