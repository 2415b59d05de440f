"""What one expert computes, from a trace of its forward: down(activation(up(x))) and where the packed parts lie.

Before:  x -> [dequantise ->] linear(gate), linear(up) -> silu, mul -> linear(down)
After:   activation "silu(g) * u", layout "separate", and per product: codes, scales, bias, activation scale
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..layouts import is_tiled, weight_sizes
from ..passes.emulate import emulate
from ..passes.settings import Settings
from ..tensor import NVFP4Weight
from .middle import Middle, chosen, find_middle
from .record import Unsuited

_ROWS = 6  # of the example input; experts treat rows alike
_SAME_MEMORY = (torch.ops.aten.view.dtype, torch.ops.aten.alias.default, torch.ops.aten.detach.default)
PARTS = ("qdata", "block_scale", "global_scale", "act_scale", "bias")


@dataclass
class Leaf:
    """One plain tensor of an expert, and how to put another in its place."""

    name: str
    get: Callable[[], Tensor]
    set: Callable[[Tensor], None]
    trained: bool = False


@dataclass(frozen=True)
class Product:
    """One product of an expert.

    Attributes:
        features: (K, N).
        tiled: whether the weight is in tiles.
        activations, dialect: how its input is quantised.
    """

    features: tuple[int, int]
    tiled: bool
    activations: str
    dialect: str


class ExpertPlan:
    """The function of experts with one structure.

    Attributes:
        activation, layout: as :class:`fx_nvfp4.fused.FusedExperts` takes them.
        products: of the up weights, then of down.
        in_features, out_features: K and H.
    """

    def __init__(self, expert: nn.Module, dtype: torch.dtype) -> None:
        leaves = list(leaves_of(expert))
        width = _width(expert)
        device = leaves[0].get().device
        self._module, tables = _trace(expert, leaves, torch.zeros(_ROWS, width, dtype=dtype, device=device))
        self._tables = {i: leaves[i].get().clone() for i in tables}
        self.graph = self._module.graph
        middle = find_middle(self.graph)
        self.activation, self.layout = middle.activation, middle.layout
        self._nodes = list(_part_nodes(middle))
        self.products = [_product(op) for op in (*middle.up, middle.down)]
        self.in_features, self.out_features = self.products[0].features[0], self.products[-1].features[1]
        if len({p.dialect for p in self.products if p.activations != "none"}) > 1:
            raise Unsuited("its products round activations by different rules", "use one dialect in all of them")
        if len({p.activations for p in self.products[:-1]}) > 1:
            raise Unsuited("its gate and up quantise their input differently", "use one kind of activations in both")

    def computes_as(self, other: ExpertPlan) -> bool:
        """Whether experts of both plans are one function of their leaves."""
        mine, its = ((p.activation, p.layout, p.products, p.sources()) for p in (self, other))
        return mine == its

    def check_tables(self, name: str, expert: nn.Module) -> None:
        """Raise `Unsuited` if an expert's lookup tables are not those that the plan was made with."""
        leaves = list(leaves_of(expert)) if self._tables else []
        for i, table in self._tables.items():
            if not torch.equal(leaves[i].get(), table):
                raise Unsuited(f"expert {name} has another lookup table {leaves[i].name}", "give all experts one table")

    def sources(self) -> list[dict[str, int | None]]:
        """For each product, part -> number of the leaf that is this part as it lies, None if it is computed."""
        placeholders = {n: i for i, n in enumerate(n for n in self.graph.nodes if n.op == "placeholder")}
        return [{part: placeholders.get(_unviewed(node)) for part, node in parts.items()} for parts in self._nodes]

    def parts(self, expert: nn.Module, product: int) -> dict[str, Tensor]:
        """Parts of one of an expert's products, in the layout the ops take; computed anew if not stored so."""
        nodes = self._nodes[product]
        values = _Evaluate([leaf.get() for leaf in leaves_of(expert)], self.graph)
        return {part: values.of(node) for part, node in nodes.items()}


def leaves_of(expert: nn.Module) -> Iterator[Leaf]:
    """Every plain tensor of an expert, packed parameters by their parts, in a fixed order."""
    for path, module in expert.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                name = f"{path}.{key}" if path else key
                if isinstance(tensor, NVFP4Weight):
                    yield from (_part_leaf(tensor, part, name) for part in tensor.__tensor_flatten__()[0])
                elif tensor is not None:
                    yield Leaf(name, _getter(store, key), _setter(store, key), tensor.requires_grad)


def _part_leaf(weight: NVFP4Weight, part: str, name: str) -> Leaf:
    return Leaf(f"{name}.{part}", lambda: getattr(weight, part), lambda value: setattr(weight, part, value))


def _getter(store: dict[str, Any], key: str) -> Callable[[], Tensor]:
    return lambda: store[key].detach()


def _setter(store: dict[str, Any], key: str) -> Callable[[Tensor], None]:
    def put(value: Tensor) -> None:
        store[key].data = value

    return put


def _width(expert: nn.Module) -> int:
    """K: what an expert takes. Its first weight says so, packed or spelled."""
    for tensor in (*expert.parameters(), *expert.buffers()):
        if isinstance(tensor, NVFP4Weight):
            return tensor.shape[-1] if not tensor.transposed else tensor.shape[-2]
    for tensor in (*expert.parameters(), *expert.buffers()):
        if tensor.dim() == 2 and not tensor.is_floating_point():
            return tensor.shape[-1] * 2 * tensor.dtype.itemsize
    raise Unsuited("its experts hold no 2-D packed weight")


def _trace(expert: nn.Module, leaves: list[Leaf], x: Tensor) -> tuple[fx.GraphModule, set[int]]:
    """Two experts alike as a graph over the leaves of each, x and logits; packed products as NVFP4 ops.

    Also the numbers of the leaves that hold lookup tables, on whose values this relies.
    """
    values = [leaf.get() for leaf in leaves]
    names = [leaf.name for leaf in leaves]

    def call(*arguments: Tensor) -> Tensor:
        *parts, rows, logits = arguments
        own = [dict(zip(names, half, strict=True)) for half in (parts[: len(names)], parts[len(names) :])]
        return chosen(
            lambda e, rows: torch.func.functional_call(expert, _reassembled(expert, own[e]), (rows,)), rows, logits
        )

    # Tensors of their own, as tracing takes equal ones for one.
    arguments = *values, *(v.clone() for v in values), x, x.new_zeros(len(x), 2)
    try:
        with torch.no_grad():
            inlined = make_fx(call, tracing_mode="fake")(*arguments)
            # A second time without in-place operations; the packed class is gone by now.
            graph_module = make_fx(torch.func.functionalize(inlined), tracing_mode="fake")(*arguments)
    except Exception as error:  # whatever the expert's own code raises
        raise Unsuited(
            f"the forward of its experts cannot be traced: {type(error).__name__}: {error}",
            "an expert should be a function of hidden states, without choices that depend on them",
        ) from error
    graph = graph_module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    constants = {n: v for n, v in zip(placeholders, (*values, *values), strict=False) if _is_table(v)}
    report, tables = emulate(
        graph, constants, dict(zip(placeholders, (*names, *names), strict=False)), Settings(lift=False)
    )
    if report.refused:
        raise Unsuited(f"in its experts, {report.refused[0]}")
    return graph_module, {placeholders.index(n) % len(leaves) for n in tables}


def _is_table(value: Tensor) -> bool:
    return value.numel() <= 512


def _reassembled(expert: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of the expert with other plain tensors in them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in (*expert.named_parameters(), *expert.named_buffers()):
        if isinstance(tensor, NVFP4Weight):
            own = {part: parts[f"{name}.{part}"] for part in tensor.__tensor_flatten__()[0]}
            tensors[name] = tensor.replace(**own)
        else:
            tensors[name] = parts[name]
    return tensors


def _part_nodes(middle: Middle) -> Iterator[dict[str, Node]]:
    for node, bias in zip((*middle.up, middle.down), (*middle.up_bias, middle.down_bias), strict=True):
        parts = {name: given for name, given in _arguments(node).items() if name in PARTS}
        parts["bias"] = bias
        yield {name: part for name, part in parts.items() if isinstance(part, Node)}


def _product(op: Node) -> Product:
    given = _arguments(op)
    codes = given["qdata"].meta["val"]
    _, n, k = weight_sizes(codes)
    return Product((k, n), is_tiled(codes), given.get("activations", "none"), given.get("dialect", "hardware"))


def _arguments(op: Node) -> dict[str, Any]:
    """Arguments of an op by their names."""
    schema = op.target._schema  # type: ignore[union-attr]
    return {**dict(zip((a.name for a in schema.arguments), op.args, strict=False)), **op.kwargs}


def _unviewed(node: Node) -> Node:
    """The graph input of which a part is another dtype's view."""
    while node.op == "call_function" and node.target in _SAME_MEMORY:
        node = node.all_input_nodes[0]
    return node


class _Evaluate:
    """Values of nodes that depend on an expert's leaves alone."""

    def __init__(self, leaves: list[Tensor], graph: fx.Graph) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._values: dict[Node, Any] = dict(zip(placeholders, leaves, strict=False))

    def of(self, node: Node) -> Any:
        if node not in self._values:
            if node.op == "placeholder":
                raise Unsuited("a packed part of its experts depends on the hidden states")
            if node.op == "get_attr":
                return getattr(node.graph.owning_module, str(node.target))
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
            with torch.no_grad():
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]
