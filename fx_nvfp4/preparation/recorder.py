"""Records what a module computes, op by op on real tensors, with its submodules as single steps.

The recording is a graph whose nodes know the value they had, and on whose contents they depend: an in-place op is
a new version of the memory that it writes, so that a loop which adds to one tensor is a chain.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ..tensor import NVFP4Weight
from .record import Unsuited

CONSTANT = "_constant"  # target prefix of tensors that the module made from Python numbers
Stub = Callable[[int, Tensor], Tensor]  # (expert, rows [S, K]) -> rows [S, H]


@dataclass
class Call:
    """One call of an expert: its node, which expert, and the rows it was given [S, K]."""

    node: Node
    expert: int
    rows: Tensor


@dataclass
class Recording:
    """A module's forward for one input.

    Every node's meta holds ``value`` (a copy of what it gave, None if no tensor), ``deps`` (nodes whose contents it
    used) and ``writers`` (argument node -> node that last wrote the argument's memory).
    """

    graph: fx.Graph
    x: Node
    output: Node
    calls: list[Call]
    order: dict[Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}


def record(module: nn.Module, experts: list[nn.Module], x: Tensor, stub: Stub) -> Recording:
    """Run module(x) with ``stub`` in place of the experts, without gradients.

    Raises:
        Unsuited: the module cannot be run so; the reason says why.
    """
    recorder = _Recorder(module)
    x = x.clone()  # which the module may write to
    with seeded(x.device), torch.no_grad(), _leaves(recorder, module, experts), _stubs(recorder, experts, stub):
        node = recorder.placeholder(x)
        before = _kept_tensors(module)
        try:
            with recorder:
                out = module.forward(x)  # its own hooks will run around the new forward as well
        except Unsuited:
            raise
        except Exception as error:  # whatever the module's own code raises
            raise Unsuited(
                f"its forward raised {type(error).__name__} for an input {list(x.shape)}: {error}",
                "prepare() calls it with hidden states alone",
            ) from error
    kept = [name for name, ids in _kept_tensors(module).items() if not ids <= before.get(name, set())]
    if kept:
        raise Unsuited(f"its forward keeps tensors in self.{kept[0]}", "return them instead")
    return Recording(recorder.graph, node, recorder.output(out), recorder.calls)


def _kept_tensors(module: nn.Module) -> dict[str, set[int]]:
    """Attribute, or buffer, that holds tensors -> what identifies them."""
    held = {**module.__dict__, **module._buffers}
    return {name: {id(t) for t in _tensors(value)} for name, value in held.items() if name != "_buffers"}


def descendants(recording: Recording, roots: set[Node]) -> set[Node]:
    """roots and every node whose contents depend on them."""
    found = set(roots)
    for node in recording.graph.nodes:
        if not found.isdisjoint(node.meta["deps"]):
            found.add(node)
    return found


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in every block, and the caller's generators untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def untouched(module: nn.Module, experts: list[nn.Module]) -> Iterator[None]:
    """Trials leave no trace: modes, attributes (lists and dicts with what they held) and buffers are put back.

    On a CPU trials use one thread: they are many and small.
    """
    apart = {id(m) for expert in experts for m in expert.modules()}
    parts = [m for m in module.modules() if id(m) not in apart]
    attributes = [(m, dict(m.__dict__)) for m in parts]
    held = [(v, v.copy()) for m in parts for v in m.__dict__.values() if isinstance(v, (list, dict))]
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.clone()) for m in parts for b in m._buffers.values() if b is not None and not b.is_meta]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for part, before in attributes:
            part.__dict__.clear()
            part.__dict__.update(before)
        for container, items in held:
            container.clear()
            container.extend(items) if isinstance(container, list) else container.update(items)
        for part, mode in modes:
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextlib.contextmanager
def replaced_forwards(experts: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Experts whose forward is another for a while; all else of them stays within reach."""
    try:
        for expert, forward in zip(experts, forwards, strict=True):
            expert.forward = forward
        yield
    finally:
        for expert in experts:
            expert.__dict__.pop("forward", None)


def only_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that an expert is called with.

    Raises:
        Unsuited: it is called with more.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise Unsuited(f"its experts are called with {len(given)} arguments", "call them with hidden states alone")
    return given[0]


def _stubs(recorder: _Recorder, experts: list[nn.Module], stub: Stub) -> contextlib.AbstractContextManager[None]:
    def forward(e: int, *args: Any, **kwargs: Any) -> Tensor:
        return recorder.call(e, only_rows(args, kwargs), stub)

    return replaced_forwards(experts, [lambda *a, e=e, **k: forward(e, *a, **k) for e in range(len(experts))])


@contextlib.contextmanager
def _leaves(recorder: _Recorder, module: nn.Module, experts: list[nn.Module]) -> Iterator[None]:
    """Every submodule but the experts becomes one step of the recording."""
    apart = {id(m) for expert in experts for m in expert.modules()}
    handles = []
    for path, child in module.named_modules():
        if child is module or id(child) in apart or any(id(m) in apart for m in child.modules()):
            continue
        handles.append(child.register_forward_pre_hook(recorder.enter, prepend=True, with_kwargs=True))
        leave = _leave(recorder, path)
        handles.append(child.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave(recorder: _Recorder, path: str) -> Callable[..., None]:
    return lambda _module, args, kwargs, out: recorder.leave(path, args, kwargs, out)


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.calls: list[Call] = []
        self._inside = 0  # leaf modules entered and not yet left
        self._nodes: dict[int, Node] = {}
        self._alive: list[Any] = []  # what ids in _nodes stand for
        self._writers: dict[Any, Node] = {}
        self._attributes = dict(_attributes(module))
        self._owned = {_memory(t): n for n, t in (*module.named_parameters(), *module.named_buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        inputs = self._inputs((args, kwargs))
        written = _written(func._schema, args, kwargs)
        for tensor in written:
            if _memory(tensor) in self._owned:
                raise Unsuited(f"its forward writes to {self._owned[_memory(tensor)]}", "return what it counts instead")
        out = func(*args, **kwargs)
        self._add("call_function", func, inputs, out, written)
        return out

    def placeholder(self, x: Tensor) -> Node:
        return self._add("placeholder", "x", ((), {}, {}), x, [])

    def output(self, out: Any) -> Node:
        if not all(isinstance(t, (Tensor, type(None), int, float, bool)) for t in tree_flatten(out)[0]):
            raise Unsuited(f"its forward returns a {type(out).__name__}", "return tensors, in tuples, lists or dicts")
        inputs = self._inputs(((out,), {}))
        return self._add("output", "output", inputs, None, [])

    def call(self, expert: int, rows: Tensor, stub: Stub) -> Tensor:
        """An expert's call: rows [.., K] are flattened for the stub."""
        inputs = self._inputs(((expert, rows), {}))
        self._inside += 1
        flat = rows.reshape(-1, rows.shape[-1]).clone()
        y = stub(expert, flat)
        out = y.reshape(*rows.shape[:-1], y.shape[-1])
        self._inside -= 1
        self.calls.append(Call(self._add("call_function", self.call, inputs, out, []), expert, flat))
        return out

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._inside:
            self._before = self._inputs((args, kwargs)), [(t, t._version) for t in _tensors((args, kwargs))]
        self._inside += 1

    def leave(self, path: str, _args: Any, _kwargs: Any, out: Any) -> None:
        self._inside -= 1
        if not self._inside:
            inputs, versions = self._before
            written = [t for t, version in versions if t._version != version]
            self._add("call_module", path, inputs, out, written)

    def _add(self, op: str, target: Any, inputs: tuple[Any, Any, dict[Node, Node]], out: Any, written: Any) -> Node:
        args, kwargs, writers = inputs
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["writers"] = writers
        node.meta["deps"] = {*writers, *(w for a, w in writers.items() if not _older(w, a))}
        node.meta["seq"] = len(self.graph.nodes)
        self._register(node, out)
        for tensor in written:
            self._writers[_memory(tensor)] = node
        return node

    def _register(self, node: Node, out: Any) -> None:
        node.meta["value"] = None
        if isinstance(out, Tensor):
            self._alive.append(out)
            self._nodes[id(out)] = node
            node.meta["value"] = out if isinstance(out, NVFP4Weight) else out.detach().clone()
            self._writers.setdefault(_memory(out), node)
        elif isinstance(out, (tuple, list, dict)):
            for key, part in out.items() if isinstance(out, dict) else enumerate(out):
                if isinstance(part, (Tensor, tuple, list, dict)):
                    self._add("call_function", operator.getitem, ((node, key), {}, {node: node}), part, [])

    def _inputs(self, tree: Any) -> tuple[Any, Any, dict[Node, Node]]:
        """(args, kwargs) with nodes for tensors, and who last wrote each of them."""
        args, kwargs = tree_map(lambda t: self._node(t) if isinstance(t, Tensor) else t, tree)
        nodes = {self._node(t): self._writers.get(_memory(t), self._node(t)) for t in _tensors(tree)}
        return tuple(args), dict(kwargs), nodes

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._nodes:
            target = self._attributes.get(id(tensor), f"{CONSTANT}{len(self._alive)}")
            self._add("get_attr", target, ((), {}, {}), tensor, [])
        return self._nodes[id(tensor)]


def _older(a: Node, b: Node) -> bool:
    """Whether a was there before b, so that b, a view made later, depends on it already."""
    return a.meta["seq"] < b.meta["seq"]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that an op writes to."""
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    return _tensors([given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write])


def _memory(tensor: Tensor) -> Any:
    """What tensors share that are views of each other."""
    return id(tensor) if isinstance(tensor, NVFP4Weight) else tensor.untyped_storage()._cdata


def _attributes(module: nn.Module) -> Iterator[tuple[int, str]]:
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield id(tensor), path
        if isinstance(tensor, NVFP4Weight):
            yield from ((id(getattr(tensor, part)), f"{path}.{part}") for part in tensor.__tensor_flatten__()[0])
