"""Finds activations that the model quantises to NVFP4 and back by operations of its own, in front of our products.

The stretch from an activation x [.., K] to the operand of a product is recognised by what it computes, see
`activation_proof`: every spelling of a rule gives that rule's bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fx_nvfp4.format import BLOCK

from .activation_proof import Cut, Per, Rule, rule_of
from .cone import BYTES, Cone, structure
from .experts import fingerprint
from .nodes import CASTS, arguments, elements, fix, fixed, hint, is_float, renamed, same_size
from .sample import inputs_of, is_supported, is_tensor

aten = torch.ops.aten

_MAX_NODES = 200
_MAX_CUTS = 8  # scales to try for one stretch
_MAX_THRESHOLDS = 24
_LARGEST_BLOCK = 128  # elements that share a scale
_LARGEST = {aten.amax.default, aten.max.dim, aten.aminmax.default}
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.clone.default, aten.alias.default),
    aten.detach.default,
}
_MOVES = {
    *_VIEWS,
    *CASTS,
    aten.permute.default,
    aten.expand.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.slice.Tensor,
}
_ROUNDING = {
    *(aten.round, aten.floor, aten.ceil, aten.trunc, aten.bucketize, aten.searchsorted, aten.argmin),
    *(aten.gt, aten.ge, aten.lt, aten.le),
}
_STEPS = {aten.gt, aten.ge, aten.lt, aten.le}
_MANY_STEPS = 5  # no activation function has so many
_COMPARISONS = {
    *(*_STEPS, aten.eq, aten.ne, aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum),
}
_TO_GRID = {aten.round, aten.bucketize}
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8)
_GRIDS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Spelled:
    """A recognised quantiser.

    moves: the nodes from the product's operand back to the quantiser's result, that one not among them; they move or
    cast elements. tables: constants whose values were relied on.
    """

    cut: Cut
    rule: Rule
    moves: tuple[Node, ...]
    tables: tuple[Node, ...]


@dataclass(frozen=True)
class NearMiss:
    """An operand whose blocks are rounded, by no rule that is known."""

    node: Node


class Quantisers:
    """Recognises each structure once: the layers of a model are alike."""

    def __init__(self, constants: Mapping[Node, Tensor]) -> None:
        self._constants = constants
        self._known: dict[Hashable, tuple[list[Node], Spelled | NearMiss | None]] = {}

    def recognise(self, operand: Node) -> Spelled | NearMiss | None:
        """What quantises an operand, if it is anything but leaves, products and the like."""
        nodes = list(_above(operand))
        if not any(map(_takes_largest, nodes)):
            return NearMiss(operand) if _is_rounded(operand, nodes) else None
        _fix_columns(operand, nodes)
        key = structure(nodes), tuple(fingerprint(self._constants.get(n)) for n in nodes)
        if key not in self._known:
            self._known[key] = nodes, self._recognise(operand, nodes)
            return self._known[key][1]
        known, found = self._known[key]
        return renamed(found, dict(zip(known, nodes, strict=True)))

    def _recognise(self, operand: Node, nodes: list[Node]) -> Spelled | NearMiss | None:
        near, inside = False, set(nodes)
        for moves, out in results_of(operand):
            for x in _sources(nodes, out):
                region = list(_above(out, {x}))
                if not inside.issuperset(region):
                    continue
                near |= any(map(_rounds, region))
                thresholds = _thresholds(region)
                for cut in self._cuts(x, out, region):
                    if rule := rule_of(cut, _factors(cut, region), thresholds, self._constants):
                        tables = [n for n in _above(out, {x, cut.scale}) if n in self._constants]
                        return Spelled(cut, rule, moves, tuple(tables))
        return NearMiss(operand) if near or _is_rounded(operand, nodes) else None

    def _cuts(self, x: Node, out: Node, region: list[Node]) -> Iterator[Cut]:
        """Ways to see a stretch as a function of x and one scale, or of x alone."""
        if self._closed(x, out, None):
            yield Cut(x, out, None, "tensor", False)
        scales = [(n, per) for n in region if n not in self._constants and (per := _per(n, x))]
        for scale, per in scales[:_MAX_CUTS]:
            if self._closed(x, out, scale):
                yield Cut(x, out, scale, per, x in _above(scale))

    def _closed(self, x: Node, out: Node, scale: Node | None) -> bool:
        """Whether out is computed from nothing else."""
        ends = [n for n in _above(out, {x, scale}) if not is_supported(n) and n is not scale and n is not x]
        return len(ends) == sum(n in self._constants for n in ends)


def _fix_columns(operand: Node, nodes: list[Node]) -> None:
    """Under dynamic=True the columns of x are a symbol, but a product with a packed weight takes one number of them."""
    columns = hint(operand.meta["val"].shape[-1])
    for node in nodes:
        if not is_tensor(node) or is_supported(node):
            continue
        sizes = node.meta["val"].shape
        if len(sizes) > 1 and hint(sizes[-1]) == columns:
            fix(sizes[-1])


def _above(node: Node, stop: Container[Node | None] = ()) -> dict[Node, None]:
    """A node and the nearest that it is computed from, up to those in `stop` and to leaves, these included.

    The nearest come first, in an order that depends on structure alone.
    """
    found, queue = {node: None}, [node]
    while queue and len(found) < _MAX_NODES:
        current = queue.pop(0)
        if current in stop or not is_supported(current):
            continue
        for source in inputs_of(current):
            if source not in found:
                found[source] = None
                queue.append(source)
    return found


def holds_bytes(operand: Node) -> bool:
    """Whether an operand is computed from bytes nearby, as activations are that arrive as codes."""
    return any(node.meta["val"].dtype in BYTES for node in _above(operand) if is_tensor(node))


def _takes_largest(node: Node) -> bool:
    call = node.args[0] if node.target is operator.getitem else node
    return isinstance(call, Node) and call.target in _LARGEST


def results_of(operand: Node) -> Iterator[tuple[tuple[Node, ...], Node]]:
    """What may be a quantiser's result: the operand, and what it is moved from."""
    moves: list[Node] = []
    node = operand
    while True:
        yield tuple(moves), node
        if node.target not in _MOVES or not is_tensor(node.args[0]):
            return
        moves.append(node)
        node = node.args[0]  # type: ignore[assignment]


def _sources(nodes: list[Node], out: Node) -> list[Node]:
    """What may be quantised to become out: of its shape, and what block maxima are taken of, nearest to them first."""
    above, found = _above(out), dict[Node, None]()
    for largest in filter(_takes_largest, nodes):
        node = inputs_of(largest)[0]
        while True:
            if node in above and node is not out and _alike(node, out):
                found[node] = None
            sources = inputs_of(node) if is_supported(node) else []
            if len(sources) != 1:
                break
            (node,) = sources
    return list(found)


def is_view(move: Node) -> bool:
    """Whether a move leaves all elements in their order."""
    if move.target is not aten.permute.default:
        return move.target in _VIEWS
    given = arguments(move)
    sizes = given.self.meta["val"].shape
    kept = [d % len(sizes) for d in given.dims if not same_size(sizes[d], 1)]
    return kept == sorted(kept)


def _alike(x: Node, out: Node) -> bool:
    a, b = x.meta["val"], out.meta["val"]
    floats = all(t.is_floating_point() and t.dtype.itemsize > 1 for t in (a, b))
    columns = fixed(a.shape[-1]) if a.dim() else None
    blocks = columns is not None and columns % BLOCK == 0
    return floats and blocks and a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def _per(scale: Node, x: Node) -> Per | None:
    """What has a scale of its own, if a node may hold the scales of x."""
    val, shape = scale.meta["val"], x.meta["val"].shape
    if not val.is_floating_point() or val.dtype.itemsize == 1:
        return None
    if all(same_size(size, 1) for size in val.shape):
        return "tensor"
    count = math.prod(val.shape)
    if same_size(count, math.prod(shape[:-1])):
        return "row"
    return "expert" if len(shape) == 3 and same_size(count, shape[0]) else None


def _factors(cut: Cut, region: list[Node]) -> tuple[float, ...]:
    """Global scales that are written in the program, and none."""
    if cut.scale is not None:
        return (1.0,)
    numbers = [f for f in Cone(cut.out, tuple(region), frozenset()).factors() if f > 0]
    return tuple(dict.fromkeys((1.0, *numbers, *(1 / f for f in numbers))))


def _thresholds(region: list[Node]) -> tuple[float, ...]:
    """Numbers written in the program that something is compared with, or limited to."""
    found: dict[float, None] = {}
    for node in region:
        if getattr(node.target, "overloadpacket", None) not in _COMPARISONS:
            continue
        for arg in (*node.args, *node.kwargs.values()):
            if isinstance(arg, Node) and arg.target is aten.full.default:
                arg = arg.args[1]
            if isinstance(arg, (int, float)) and math.isfinite(arg) and arg != 0:
                found[abs(float(arg))] = None
    return tuple(found)[:_MAX_THRESHOLDS]


def _is_rounded(operand: Node, nodes: list[Node]) -> bool:
    """Whether elements of an operand, or a number for few of them each, are rounded to a grid on the way, in whatever
    way their maximum is found: by an op that rounds, or by many steps."""
    steps = 0
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", None)
        source = node.args[0] if node.args else None
        if not is_float(source) or elements(source) * _LARGEST_BLOCK < elements(operand):  # type: ignore[arg-type]
            continue
        if packet in _TO_GRID or (node.target in CASTS and node.meta["val"].dtype in _NARROW):
            return True
        steps += packet in _STEPS and isinstance(node.args[1], (int, float))
    return steps >= _MANY_STEPS


def _rounds(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return is_supported(node) and (packet in _ROUNDING or (node.target in CASTS and node.meta["val"].dtype in _GRIDS))
