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
from .preparation.candidates import find_lists
from .report import ROOT, Cost, GraphBreak, Refusal, Report, module_path
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
    owner = model if isinstance(model, torch.nn.Module) else getattr(model, "__self__", None)
    root = owner if isinstance(owner, torch.nn.Module) else torch.nn.Module()
    sites, breaks = _Sites(root), BreakLog()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with collect_reports() as part:
            compiled = nvfp4_emu(gm, example_inputs, options={"codegen": False})
        return sites.recorded(compiled, part, [name for name, _ in compat.input_sources(gm)])

    torch._dynamo.reset()
    with breaks.listen(), compat.without_caches(), compat.uncompiled(root):
        torch.compile(model, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    report, unused = sites.report, sites.unused()
    report.breaks = breaks.breaks(root, [name for name, _ in unused])
    report.refused += [_refusal(name, shape, report.breaks) for name, shape in unused]
    report.notes += _hints(root, report)
    return report


class _Sites:
    """The sites of all graphs that ran, named as in the model.

    A graph knows its weights by the names that its own function uses, and equal layers share one graph where Dynamo
    compiles layer by layer: whose weights they are shows at each run.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.report = Report()
        self._names = {id(tensor): name.replace("_orig_mod.", "") for name, tensor in _tensors(model)}
        self._packed = {id(tensor): (name, list(tensor.shape)) for name, tensor in _packed(model)}
        self._used: set[int] = set()

    def recorded(self, compiled: Callable[..., Any], part: Report, sources: Sequence[str]) -> Callable[..., Any]:
        """compiled, which adds its sites once for each set of weights that it runs with."""
        seen: set[_Moves] = set()
        inside = [module_path(source) for source in sources]

        def run(*args: Any) -> Any:
            self._used.update(map(id, args))
            moves = self._moves(inside, args)
            if moves not in seen:
                self.report.extend(_moved(part, moves))
                part.graphs, part.cost = 0, Cost()  # counted now
                seen.add(moves)
            return compiled(*args)

        return run

    def unused(self) -> list[tuple[str, list[int]]]:
        """(name, shape) of the packed weights that entered no graph."""
        return [found for key, found in self._packed.items() if key not in self._used]

    def _moves(self, inside: Sequence[str], args: Sequence[Any]) -> _Moves:
        """(path in the graph, path in the model) of the modules that the graph's inputs belong to."""
        names = (
            (path, self._names[id(value)])
            for path, value in zip(inside, args, strict=False)
            if id(value) in self._names
        )
        # The longest first, so that it is found before those that it lies in.
        return tuple(sorted({_unlike(path, name) for path, name in names}, key=lambda move: -len(move[0])))


_Moves = tuple[tuple[str, str], ...]


def _unlike(a: str, b: str) -> tuple[str, str]:
    """Two dotted paths without the end that they share: m.experts.w and layers.0.experts.w -> m and layers.0."""
    left, right = a.split("."), b.split(".")
    while left and right and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
    return ".".join(left), ".".join(right)


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


def _moved(report: Report, moves: _Moves) -> Report:
    """A report whose paths begin at the model and not at what the traced function calls its modules."""

    def path(name: str) -> str:
        inside = "" if name.startswith(ROOT) else name  # the traced function's own code, known by its line
        for old, new in moves:
            if not old or inside == old or inside.startswith(f"{old}."):
                inside = ".".join(filter(None, (new, inside.removeprefix(old).removeprefix("."))))
                break
        return inside or name

    return dataclasses.replace(
        report,
        matched=[dataclasses.replace(m, where=path(m.where), weight=path(m.weight)) for m in report.matched],
        refused=[dataclasses.replace(r, where=path(r.where)) for r in report.refused],
        blocks=[
            dataclasses.replace(b, where=path(b.where), weights=tuple(map(path, b.weights))) for b in report.blocks
        ],
    )


def _refusal(name: str, shape: list[int], breaks: Sequence[GraphBreak]) -> Refusal:
    hidden_by = next((b for b in breaks if name in b.hides), None)
    if hidden_by is None:
        advice = "the model did not call it for these inputs, or not under torch.compile"
    else:
        place = f"{hidden_by.file}:{hidden_by.line} ({hidden_by.reason})"
        advice = f"it runs outside of all graphs, likely because of the graph break at {place}"
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
    lists = [path for path, _ in find_lists(model)] if isinstance(model, torch.nn.Module) else []
    if lists and not any("fx_nvfp4.prepare" in b.advice for b in report.blocks):
        which = f"{lists[0]} and {len(lists) - 1} more lists hold" if len(lists) > 1 else f"{lists[0]} holds"
        hints.append(f"{which} packed experts one by one; fx_nvfp4.prepare(model) makes each list one op")
    return hints
