"""The ``nvfp4_emu`` backend of torch.compile: our pass at the joint graph, then Inductor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from . import tuning
from .debug_files import DebugFiles
from .kernel_choice import with_choice
from .lowering import compat, versions
from .lowering.compat import CustomGraphPass
from .passes.cone import BYTES, WORDS
from .passes.emulate import emulate
from .passes.settings import Settings
from .report import Cost, NotEmulatedError, NVFP4Warning, Report, module_path
from .tables import TableGuard, find_tables, hash_tables
from .tensor import PART_OF_K, NVFP4Weight, layout_key
from .tile_inputs import tile_inputs
from .torchao_dispatch import emulated, swizzled_weights
from .torchao_interop import is_torchao_nvfp4
from .untested import compile_untested

log = logging.getLogger("fx_nvfp4")

_SWITCHES = (True, False)
# name -> (default, the values that it may have)
OPTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "strict": (False, _SWITCHES),
    "lift": (True, _SWITCHES),
    "codegen": (True, _SWITCHES),
    "activations": ("checkpoint", ("checkpoint", "nvfp4", "none")),
    "as_written": (False, _SWITCHES),
    "out_dtype": (None, (None, torch.float32, torch.bfloat16, torch.float16)),
    "shared_scales": (None, (None, "vllm")),
    "check_finite": (False, _SWITCHES),
    "tune": (None, (None, *_SWITCHES)),
    "inline": (True, _SWITCHES),
    "prepack": (True, (*_SWITCHES, "always")),  # "always": on a CPU too, where nothing gains from it
}
_PACKED_DTYPES = (*BYTES, *WORDS)
_collectors: ContextVar[tuple[Report, ...]] = ContextVar("fx_nvfp4_collectors", default=())


def nvfp4_emu(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its packed-NVFP4 products emulated and everything else by Inductor.

    Args:
        gm, example_inputs: as Dynamo calls a backend.
        mode: torch.compile's mode ("default", "reduce-overhead", "max-autotune", ...).
        options: ours are ``"strict"`` (default False), raise where a packed weight would be dequantised instead of
            warning; ``"lift"`` (default True), replace whole MoE blocks by one op and not just their products;
            ``"codegen"`` (default True), False runs the rewritten graph op by op instead of generating code, which
            tells an error of the rewriting from one of a kernel; ``"prepack"`` (default True), permute packed weights
            that the model owns, where kernels read tiles (on a GPU, in 16 bits, without gradients), as they lie, see
            :meth:`NVFP4Weight.tile_`; ``"tune"`` (default None: with the max-autotune modes), time configurations of
            the tiled kernels at the first call of a block in a range of token counts, from then on in the whole
            process, see :mod:`fx_nvfp4.tuning`; ``"inline"`` (default True), put kernels on tiled weights into the
            generated code, where it can be, instead of a call of our op, see :mod:`fx_nvfp4.inlined`. On the
            arithmetic: ``"activations"`` (default "checkpoint"), ``"as_written"``, ``"out_dtype"``,
            ``"shared_scales"`` and ``"check_finite"``, see :class:`fx_nvfp4.passes.settings.Settings`. Every other
            name goes to Inductor's config.

    Raises:
        NotEmulatedError: strict, and a packed weight is not emulated; names the site, the reason and what to do.
        RuntimeError: unknown option or mode.
    """
    if unknown:
        log.debug("nvfp4_emu: arguments %s of this torch release are not used", sorted(unknown))
    ours, inductor = _split_options(options or {})
    if (mode or "").startswith("max-autotune") if ours["tune"] is None else ours["tune"]:
        tuning.enable()
    patches = {**compat.mode_patches(mode), **inductor}
    if versions.is_tested():
        return _compile(gm, example_inputs, patches, ours)
    # Permuting weights makes Dynamo trace anew, by a name that has another purpose; inlining builds Inductor's nodes.
    emulate = functools.partial(_compile, gm, example_inputs, patches, {**ours, "prepack": False, "inline": False})
    return compile_untested(gm, example_inputs, emulate, patches, ours)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any], ours: dict[str, Any]
) -> Callable[..., Any]:
    packed = _holds_packed(example_inputs)
    if ours["activations"] == "nvfp4":
        _check_whole(example_inputs)
    left = tile_inputs(gm, example_inputs, ours["prepack"] == "always") if packed and ours["prepack"] else []
    tables = find_tables(gm, example_inputs) if packed else {}
    folder = compat.debug_folder(patches)
    graph_pass = EmulationPass(gm, ours, tables, DebugFiles(folder) if folder else None)
    patches = compat.with_joint_pass(patches, graph_pass)
    key = _report_key(gm, example_inputs, graph_pass)
    guard = TableGuard(gm, tables) if tables else None
    start = time.perf_counter()
    inlined = _inlined() if ours["inline"] else None
    with emulated(), inlined.inlining() if inlined else contextlib.nullcontext():
        compiled = compat.compile_with_inductor(gm, example_inputs, patches, packed, ours["codegen"])
    seconds = time.perf_counter() - start if ours["codegen"] else 0.0
    report = graph_pass.finish(key, seconds, [*_notes(example_inputs), *left])
    _publish(report, ours["strict"])
    return guard.wrap(compiled, graph_pass.used_tables) if guard and graph_pass.used_tables else compiled


def _check_whole(example_inputs: Sequence[Any]) -> None:
    """Raise where activations would get a dynamic scale of which this rank sees a part."""
    for given in example_inputs:
        if getattr(given, PART_OF_K, False) and isinstance(given, NVFP4Weight) and given.activations == "none":
            raise ValueError(
                f'activations="nvfp4": a weight {list(given.shape)} is sharded by its intermediate dim, and its '
                "activations would get a dynamic scale, the largest of all of that dim, which no rank holds: shard by "
                'dim="expert", or quantise and calibrate with static activations'
            )


def _inlined() -> ModuleType | None:
    """The module that takes ops apart, if Triton is there to compile their kernels."""
    if importlib.util.find_spec("triton") is None:
        log.debug("nothing is put into generated code: Triton is not installed, and without it no kernel runs")
        return None
    from . import inlined  # here, as it imports Triton

    return inlined


def _reset() -> None:
    """Called by torch._dynamo.reset(): give back what CUDA graphs hold, as Inductor's own backend does."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


nvfp4_emu.reset = _reset  # type: ignore[attr-defined]


class EmulationPass(CustomGraphPass):
    """Runs :func:`fx_nvfp4.passes.emulate.emulate` on the joint graph.

    Before:  the traced model, with packed weights dequantised or held in NVFP4Weight
    After:   the same with fx_nvfp4 ops in place of the products that use them
    """

    def __init__(
        self, gm: fx.GraphModule, options: Mapping[str, Any], tables: Mapping[int, Tensor], files: DebugFiles | None
    ) -> None:
        self._files = files
        self._sources = compat.input_sources(gm)
        self._options = dict(options)
        self._settings = Settings(**{f.name: options[f.name] for f in fields(Settings)})
        self._tables = tables
        self._uuid = (
            f"{compat.package_hash()}-{json.dumps(self._options, sort_keys=True, default=str)}-{hash_tables(tables)}"
        )
        if options["inline"] and (inlined := _inlined()):
            self._uuid += f"-{hashlib.sha256(inlined.key().encode()).hexdigest()}"
        self.report: Report | None = None
        self.used_tables: set[int] = set()

    def __call__(self, graph: fx.Graph) -> None:
        inputs = compat.placeholder_inputs(graph)
        constants = {n: self._tables[i] for n, (i, attribute) in inputs.items() if i in self._tables and not attribute}
        constants.update(compat.tensor_constants(graph))
        names = {n: self._name(*source) for n, source in inputs.items()}
        if self._files:
            self._files.add_graph("Graph before the pass", graph)
        report, tables = emulate(graph, constants, names, self._settings)
        report.matched = [with_choice(m) for m in report.matched]
        if self._files:
            self._files.add_graph("Graph after the pass", graph)
        self.used_tables |= {inputs[node][0] for node in tables}
        # Branches of control flow are graphs of their own, and come before the one around them.
        self.report = self.report or Report()
        self.report.extend(report)
        self.report.graphs = 1
        if report.refused and self._options["strict"]:
            # Raised here so that nothing is compiled, and no artifact kept, that a strict user did not allow.
            self._write(self.report)
            raise NotEmulatedError(_refusals(report))

    def uuid(self) -> Any:
        return self._uuid

    def finish(self, key: str, seconds: float, notes: Sequence[str]) -> Report:
        """The report of the compilation, which took seconds, with the files and log entries that it leaves."""
        if self.report is None:
            report = self._restore(key)
            # What runs may be another than when this was compiled, as FX_NVFP4_CPU says.
            report.matched = [with_choice(dataclasses.replace(m, config="")) for m in report.matched]
        else:
            report = self.report
            report.cost.compilation = seconds
            self._save(key, report)
        report.notes += notes  # of these weights as they lie now
        self._write(report)
        return report

    def _write(self, report: Report) -> None:
        compat.write_artifact("fx_nvfp4_report", "json", report.to_json)
        compat.write_artifact("fx_nvfp4_report_text", "string", lambda: report.table(full=True))
        if self._files:
            self._files.write(report)

    def _save(self, key: str, report: Report) -> None:
        """Keep the report beside Inductor's artifacts: with a warm cache the pass will not run."""
        path = compat.cache_folder() / "fx_nvfp4" / f"{key}.json"
        content = {"report": report.to_json(), "tables": sorted(self.used_tables)}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))

    def _restore(self, key: str) -> Report:
        """Read back what :meth:`_save` kept when this graph was compiled first."""
        path = compat.cache_folder() / "fx_nvfp4" / f"{key}.json"
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            # Without the record nobody knows which tables were relied on: guard them all.
            self.used_tables = set(self._tables)
            note = "compiled from Inductor's cache and its report is gone; fx_nvfp4.explain() recompiles"
            return Report(notes=[note], graphs=1)
        self.used_tables = set(content["tables"])
        report = Report.from_json(content["report"])
        report.cost = Cost()  # the pass did not run
        return report

    def _name(self, index: int, attribute: str) -> str:
        return module_path(self._sources[index][0]) if index < len(self._sources) else attribute


@contextlib.contextmanager
def collect_reports() -> Iterator[Report]:
    """A report that receives the sites of every graph that this thread compiles inside the block."""
    report = Report()
    token = _collectors.set((*_collectors.get(), report))
    try:
        yield report
    finally:
        _collectors.reset(token)


def _publish(report: Report, strict: bool) -> None:
    for collector in _collectors.get():
        collector.extend(report)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", report.table(full=True))
    else:
        log.info("%s", report)
    if report.refused:
        if strict:
            raise NotEmulatedError(_refusals(report))
        if not _collectors.get():
            warnings.warn(_refusals(report), NVFP4Warning, stacklevel=2)


def _refusals(report: Report) -> str:
    sites = "\n".join(f"  {r}" for r in report.refused)
    uses = "use of a packed weight is" if len(report.refused) == 1 else "uses of packed weights are"
    return f"{len(report.refused)} {uses} not emulated as NVFP4:\n{sites}"


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = {name: options.get(name, default) for name, (default, _) in OPTIONS.items()}
    for name, value in ours.items():
        allowed = OPTIONS[name][1]
        if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            raise RuntimeError(f"option {name!r} must be {' or '.join(map(_written, allowed))}, got {value!r}")
    return ours, compat.inductor_patches({k: v for k, v in options.items() if k not in OPTIONS})


def _written(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _holds_packed(example_inputs: Sequence[Any]) -> bool:
    tensors = [t for t in example_inputs if isinstance(t, Tensor)]
    return any(_is_packed_tensor(t) or (t.dtype in _PACKED_DTYPES and t.dim() > 1) for t in tensors)


def _is_packed_tensor(tensor: Tensor) -> bool:
    return isinstance(tensor, NVFP4Weight) or is_torchao_nvfp4(tensor)


def _notes(example_inputs: Sequence[Any]) -> list[str]:
    """What a user may want to know of the weights as they are stored."""
    count = swizzled_weights(example_inputs)
    note = (
        f"{count} torchao weights hold their scales in 128 x 4 tiles, which are laid out linearly at each call; "
        "fx_nvfp4.prepare(model) does it once"
    )
    return [note] * bool(count) + [_NATIVE] * _multiplies_natively(example_inputs)


_NATIVE = (
    "this GPU multiplies NVFP4 itself, in kernels of torchao, vLLM and others, which are faster; here it is emulated "
    "all the same"
)


def _multiplies_natively(example_inputs: Sequence[Any]) -> bool:
    """Whether packed weights lie on a GPU of compute capability 10 (Blackwell) or above."""
    if torch.version.hip is not None:
        return False
    devices = {t.device for t in example_inputs if isinstance(t, Tensor) and t.is_cuda and _is_packed_tensor(t)}
    return any(torch.cuda.get_device_capability(device)[0] >= 10 for device in devices)


def _report_key(gm: fx.GraphModule, example_inputs: Sequence[Any], graph_pass: EmulationPass) -> str:
    inputs = [_describe(t) for t in example_inputs if isinstance(t, Tensor)]
    content = f"{gm.code}{inputs}{graph_pass.uuid()}{torch.is_grad_enabled()}"
    return hashlib.sha256(content.encode()).hexdigest()


def _describe(tensor: Tensor) -> str:
    """What of a graph input decides the compiled graph."""
    if _is_packed_tensor(tensor):
        return layout_key(tensor)
    return f"{tensor.dtype} {list(map(str, tensor.shape))} {tensor.device} {tensor.requires_grad}"
