"""The one place that knows torch's private names, and what differs between torch 2.11 and 2.14."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import operator
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._inductor import config

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass
except ImportError:  # of a torch that is not tested: see versions.py

    class CustomGraphPass:  # type: ignore[no-redef]
        """So that this package can be imported."""


# Decompositions that would turn one-row products into multiply and sum before any pass sees them: under
# coordinate_descent_tuning, which the max-autotune modes set, and on a CPU.
_PRODUCTS = ("mm", "bmm", "mv", "addmm", "addmv", "baddbmm")


class ChainedPasses(CustomGraphPass):
    """Several joint passes as one; the cache key is that of all, and unknown if that of one is."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self._passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self._passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._passes]
        return None if None in keys else tuple(keys)


def with_joint_pass(patches: dict[str, Any], joint_pass: CustomGraphPass) -> dict[str, Any]:
    """Inductor config patches with joint_pass run before the joint graph passes, after any the user has set."""
    present = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    if present is not None:
        several = list(present) if isinstance(present, (list, tuple)) else [present]
        joint_pass = ChainedPasses([*several, joint_pass])
    return {**patches, "joint_custom_pre_pass": joint_pass}


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any], keep_products: bool, codegen: bool
) -> Callable[..., Any]:
    """compile_fx under config patches.

    keep_products leaves one-row matrix products whole; without codegen the graph runs op by op after all passes.
    """
    from torch._inductor.compile_fx import compile_fx

    inner = {} if codegen else {"inner_compile": _run_as_it_is}
    if not codegen:
        patches = {**patches, "force_disable_caches": True}
    with _products_kept(patches) if keep_products else contextlib.nullcontext():
        return compile_fx(gm, example_inputs, config_patches=patches, **inner)  # type: ignore[arg-type, return-value]


def _run_as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any], **_settings: Any) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    return make_boxed_func(gm.forward)


@contextlib.contextmanager
def _products_kept(patches: dict[str, Any]) -> Iterator[None]:
    """Matrix products out of Inductor's decomposition table for this compile.

    In place, because a table passed as an argument would become part of the cache key, and has none. Another thread
    that compiles something else meanwhile keeps its one-row products too, which costs it an optimisation at most.
    """
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(patches):
        table = select_decomp_table()
    packets = [getattr(torch.ops.aten, name) for name in _PRODUCTS]
    with _taken_lock:
        taken = _taken[id(table)]
        taken.users += 1
        taken.decompositions.update({op: table.pop(op) for op in list(table) if _packet(op) in packets})
    try:
        yield
    finally:
        with _taken_lock:
            taken.users -= 1
            if not taken.users:
                table.update(taken.decompositions)
                taken.decompositions.clear()


def lower_by(op: Any, lowering: Callable[..., Any]) -> None:
    """Inductor compiles an op by our lowering from now on; its operands have the strides that eager gave them."""
    from torch._inductor.lowering import add_layout_constraint, constrain_to_fake_tensors, lowerings

    # What Inductor itself decides for an op that it only calls.
    add_layout_constraint(op, constrain_to_fake_tensors)
    lowerings[op] = lowering


def as_call(op: Any, args: Any, kwargs: Any) -> Any:
    """An op in Inductor's graph as a call."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def why_no_launches() -> str | None:
    """Why the code that Inductor is about to write cannot hold launches of ours; None if it can."""
    from torch._inductor.virtualized import V

    if V.graph.cpp_wrapper:
        return "Inductor writes C++ around kernels here"
    if getattr(V.graph, "fx_wrapper", False):
        return "Inductor writes an FX graph around kernels here"
    if config.triton.autotune_at_compile_time:
        return "autotune_at_compile_time would run kernels on numbers that are no routing"
    if config.triton.enable_pdl:
        return "kernels of Inductor's own that start early do not all wait for those before them"
    return None


def as_it_lies(box: Any, strides: Sequence[int]) -> Any:
    """A tensor of Inductor's graph in memory, with those strides."""
    from torch._inductor import ir

    realized = ir.ExternKernel.require_exact_strides(box, list(strides))
    return realized if isinstance(realized, ir.TensorBox) else ir.TensorBox(realized)


def viewed(box: Any, shape: Sequence[int]) -> Any:
    """A tensor of Inductor's graph in another shape."""
    from torch._inductor.lowering import lowerings

    return lowerings[torch.ops.aten.view.default](box, list(shape))


def _packet(op: Any) -> Any:
    return getattr(op, "overloadpacket", op)


class _Taken:
    """Decompositions that are out of a table, and how many compilations want them out."""

    def __init__(self) -> None:
        self.users = 0
        self.decompositions: dict[Any, Any] = {}


# By the table's id; Inductor has one or, under fallback_random, another, and both stay.
_taken: defaultdict[int, _Taken] = defaultdict(_Taken)
_taken_lock = threading.Lock()


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's config patches of a torch.compile mode.

    Raises:
        RuntimeError: unknown mode, by Inductor.
    """
    from torch._inductor import list_mode_options

    return {} if mode in (None, "default") else dict(list_mode_options(mode))


def inductor_patches(options: Mapping[str, Any]) -> dict[str, Any]:
    """options checked against Inductor's config, with names as in torch.compile (dashes allowed).

    Raises:
        RuntimeError: Inductor has no such option.
    """
    patches = {name.replace("-", "_"): value for name, value in options.items()}
    for name in patches:
        if not hasattr(config, name):  # knows aliases too, which a copy of the config does not hold
            raise RuntimeError(f"unknown option {name!r}: neither nvfp4_emu nor torch._inductor.config has it")
    return patches


def input_sources(gm: fx.GraphModule) -> list[tuple[str, bool]]:
    """(name, whether it is a plain argument of the compiled function) of each graph input, as Dynamo knows them."""
    return [_source(node) for node in gm.graph.nodes if node.op == "placeholder"]


def _source(node: fx.Node) -> tuple[str, bool]:
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return str(node.target), True
    name = source.name() if callable(source.name) else source.name
    return name, getattr(source, "is_input", False)


def owned_inputs(gm: fx.GraphModule) -> list[bool]:
    """Of each graph input, whether a module of the user's holds it, or code around the compiled function does.

    What a call hands over is the caller's, by itself or in a list, a dict or an object that is no module.
    """
    return [_is_owned(node) for node in gm.graph.nodes if node.op == "placeholder"]


def _is_owned(node: fx.Node) -> bool:
    from torch._guards import ChainedSource

    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return False
    kind, root = source.guard_source, source.get_base() if isinstance(source, ChainedSource) else source
    in_module = kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()
    return in_module or not getattr(root, "is_input", False)


def frame_variables() -> dict[str, Any]:
    """What names in :func:`input_sources` begin with, of the frame that Dynamo traces: its locals L, its globals G."""
    from torch._dynamo.symbolic_convert import tls

    output = getattr(getattr(tls, "current_tx", None), "output", None)
    return {"L": getattr(output, "local_scope", {}), "G": getattr(output, "global_scope", {})}


def can_trace_again() -> bool:
    """Whether a backend is called by Dynamo while it traces, so that :func:`trace_again` leads back there."""
    from torch._dynamo.symbolic_convert import tls

    return getattr(tls, "current_tx", None) is not None


def trace_again(reason: str) -> NoReturn:
    """Out of a backend: let Dynamo trace the same frame anew, as something that it has looked at was changed.

    The one such exception that it lets through from a backend is named for its first use.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def placeholder_inputs(graph: fx.Graph) -> dict[fx.Node, tuple[int, str]]:
    """Placeholders of an AOTAutograd graph -> (input of Dynamo's graph, attribute of a tensor subclass or "")."""
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput, SubclassGetAttrAOTInput

    found: dict[fx.Node, tuple[int, str]] = {}
    for node in graph.find_nodes(op="placeholder"):
        described: Any = node.meta.get("desc")
        attribute = ""
        while isinstance(described, SubclassGetAttrAOTInput):
            described, attribute = described.base, described.attr
        if isinstance(described, PlainAOTInput):
            found[node] = described.idx, attribute
    return found


def tensor_constants(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Nodes of tensors that the traced code made of literals -> values, which are part of the graph."""
    module = graph.owning_module
    found = {n: operator.attrgetter(str(n.target))(module) for n in graph.find_nodes(op="get_attr")} if module else {}
    return {n: value for n, value in found.items() if is_real(value)}


def cache_folder() -> Path:
    """Where Inductor keeps compiled artifacts."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def build_cpp(source: str) -> ctypes.CDLL:
    """C++ source built for this CPU as Inductor builds its own, with OpenMP, and loaded.

    The library stays in Inductor's cache, and processes that want it at once build it once. The macro
    CPU_CAPABILITY_AVX512 or CPU_CAPABILITY_AVX2 tells for which instruction set.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


@contextlib.contextmanager
def without_caches() -> Iterator[None]:
    """Compile anew, reading and writing no cache."""
    with config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


@functools.lru_cache(maxsize=1)
def package_hash() -> str:
    """Hash of this package's sources: a changed recogniser or kernel must not meet an older artifact."""
    from hashlib import sha256

    import fx_nvfp4.passes

    digest = sha256(torch.__version__.encode())
    roots = [Path(__file__).parents[1], *map(Path, fx_nvfp4.passes.__path__)]
    for path in sorted({p for root in roots for p in root.rglob("*.py")}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def write_artifact(name: str, encoding: str, content: Callable[[], str]) -> None:
    """Leave text ("string") or JSON ("json") in the structured log of this compilation, where tlparse shows it.

    content is called only if anybody keeps that log.
    """
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=content)


def debug_folder(patches: Mapping[str, Any]) -> Path | None:
    """Where Inductor, under patches, leaves a folder for each graph that it compiles; None unless debugging is on."""
    from torch._dynamo.utils import get_debug_dir

    if not patches.get("trace.enabled", config.trace.enabled):
        return None
    return Path(patches.get("trace.debug_dir", config.trace.debug_dir) or get_debug_dir()) / "torchinductor"


@contextlib.contextmanager
def graph_break_log(receive: Callable[[str], None]) -> Iterator[None]:
    """Calls receive with what Dynamo logs at each graph break, or when it stops recompiling, inside the block.

    Through the log, as `graph_break_reasons` leaves out the functions that Dynamo gives up altogether.
    """
    from torch._dynamo.convert_frame import log as frame_log
    from torch._dynamo.symbolic_convert import graph_break_log as log
    from torch._dynamo.utils import reset_graph_break_dup_checker

    handler = _Receiver(receive)
    level, propagate = log.level, log.propagate
    if not log.isEnabledFor(logging.DEBUG):
        log.propagate = False  # nobody else has asked for these
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    frame_log.addHandler(handler)
    reset_graph_break_dup_checker()  # it shortens the messages of breaks that are known to it
    try:
        yield
    finally:
        frame_log.removeHandler(handler)
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Receiver(logging.Handler):
    def __init__(self, receive: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        self._receive(record.getMessage())


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """A model without what ``module.compile()`` and ``module.forward = torch.compile(module.forward)`` left in it."""
    calls = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    forwards = {m: vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}
    for module in calls:
        module._compiled_call_impl = None
    for module, forward in forwards.items():
        if not getattr(forward, "_torchdynamo_disable", False):  # what torch.compiler.disable made stays disabled
            module.forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call
        for module, forward in forwards.items():
            module.forward = forward


def other_users(tensor: Tensor) -> int:
    """How many other tensors have their elements in the memory of this one, also one that it is a view of."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 2  # without the tensor itself, and the variable here


def is_real(tensor: object) -> bool:
    """Whether a graph input holds values: compiling ahead of time passes fake ones."""
    return isinstance(tensor, Tensor) and not isinstance(tensor, torch._subclasses.FakeTensor)
