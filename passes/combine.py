"""Shows that what follows the down products is the weighted sum over the slots of each token.

Before:  down -> index_put(order) -> view -> mul(weights) -> sum -> out
After:   out[t] = sum over a of weights[t, a] * (y[row of slot (t, a)] + bias[ids[t, a]]), or refused

The ops in between are linear (`walk`), so their coefficients are all there is to know. Results of the products that are
zero but for one slot of a token show that slot's weight, any weight, bit for bit; small integers everywhere, and
weights that are powers of two, show that nothing else is in the sum, as it is exact in any order and any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from .block import Unit
from .coords import Coords
from .found import Refused
from .leaves import mix
from .nodes import CASTS, elements, flat_index, is_tensor, shape_of
from .routing import Routing
from .rows import NOWHERE, PADDING, Rows, Setting, coordinates
from .sample import with_boundaries
from .walk import Walk

_PAIRS, _TOKENS = 4096, 1024  # slots, or tokens with one slot each, that one world looks at
_MOST_TOKENS = 1 << 15  # of a third of the tokens: three worlds see each where there are no more than thrice as many
_MOST_SLOTS = 32  # the sum of small integers of so many slots is exact in bfloat16

Down = Callable[[Unit, Coords], Tensor]


class Combine:
    """The combine of a candidate in one world; every method raises `Refused` or `Unsupported` if it is no block."""

    def __init__(self, setting: Setting) -> None:
        self.s, self.c = setting, setting.candidate
        self.biases: dict[Node, None] = {}
        self._choose_elements()

    def _choose_elements(self) -> None:
        """Elements of out to look at: some feature of every slot (or token), every feature of some, and all edges."""
        c, generator = self.c, self.s.generator
        pairs = torch.arange(c.tokens * c.slots)
        if len(pairs) > _PAIRS:  # a slot of each token, of every third where there are many
            token = torch.arange(generator.initial_seed() % 3, c.tokens, 3 if c.tokens > _TOKENS else 1)
            token = token[torch.randperm(len(token), generator=generator)[:_MOST_TOKENS]]
            pairs = token * c.slots + torch.randint(0, c.slots, token.shape, generator=generator)
        pairs = torch.cat((pairs, torch.randint(0, c.tokens * c.slots, (c.features,), generator=generator)))
        feature = torch.randint(0, c.features, (len(pairs),), generator=generator)
        feature[-c.features :] = torch.arange(c.features)
        index = coordinates(c.out, pairs // c.slots, feature, c.features)
        zero = lambda unit, at: torch.zeros(len(at.sample))  # noqa: E731
        edges = with_boundaries(c.out, lambda: self._walk(zero), index[-c.features :], generator)[c.features :]
        self.index = torch.cat((index, edges))
        flat = flat_index(c.out, self.index)
        self.token, self.feature = flat // c.features, flat % c.features
        self.slot = torch.randint(0, c.slots, (len(flat),), generator=generator)
        self.slot[: len(pairs)] = pairs % c.slots

    def _walk(self, down: Down, with_bias: bool = False, routing: Routing | None = None) -> Walk:
        """A walk through the combine, for what the down products give, and for biases that are zero or integers."""
        units = {unit.down.node: unit for unit in self.c.units}

        def values(node: Node, at: Coords) -> Tensor | None:
            if node in units:
                return down(units[node], at).to(node.meta["val"].dtype)
            if node.op not in ("placeholder", "get_attr") or node in self.s.nodes:
                return None
            expert, feature = self._bias(node, at)
            bias = _integers(expert, feature, 2) if with_bias else torch.zeros(len(at.sample))
            return bias.to(node.meta["val"].dtype)

        return Walk(self.s.nodes, routing or self.s.routing, values)

    def _bias(self, node: Node, at: Coords) -> tuple[Tensor, Tensor]:
        """(expert, feature) of elements of a parameter, which must be the down product's bias."""
        flat = flat_index(node, at.index)
        if elements(node) == self.c.experts * self.c.features:
            self.biases[node] = None
            return flat // self.c.features, flat % self.c.features
        expert = self.c.bias_owners.get(node)
        if expert is None or elements(node) != self.c.features:
            raise Refused(
                f"the combine reads {node.name} {list(shape_of(node))}", "add it to the sum, not inside of it"
            )
        self.biases[node] = None
        return torch.full_like(flat, expert), flat

    def rows_read(self) -> list[Tensor]:
        """The rows of each unit's down product that the chosen elements are made of."""
        walk = self._walk(lambda unit, at: torch.zeros(len(at.sample)))
        if not bool((walk.evaluate(self.c.out, self.index) == 0).all()):
            raise Refused("the combine adds something to the weighted sum", "add it after the sum")
        rows = []
        for unit in self.c.units:
            reads = [at.index for at in walk.reads.get(unit.down.node, ())]
            index = torch.cat(reads) if reads else torch.zeros(0, len(shape_of(unit.down.node)), dtype=torch.int64)
            row, expert, _ = self.s.locate(unit, unit.down, index)
            rows.append(row[expert >= 0].unique())
        return rows

    def _check_no_rounding(self) -> None:
        """Casts of the products' results keep what the block's result can show; rounding once after the sum may be."""
        out = self.c.out.meta["val"].dtype
        down = {unit.down.node: unit.down.node.meta["val"].dtype for unit in self.c.units}
        coarsest = max(torch.finfo(dtype).eps for dtype in (out, *down.values()))
        after = set(down)
        for node in self.c.out.graph.nodes:
            if after.isdisjoint(node.all_input_nodes) or node not in self.s.nodes:
                continue
            after.add(node)
            if node.target not in CASTS or not is_tensor(node):
                continue
            dtype = node.meta["val"].dtype
            if dtype.is_floating_point and torch.finfo(dtype).eps > coarsest:
                raise Refused(
                    f"experts' results are rounded to {dtype} in {node.name}, and the op sums them as they are",
                    "leave that cast out, or round the sum",
                )

    def check(self, rows: Mapping[Node, Rows], weighted: str) -> None:
        """rows: of each down product. weighted: where the weights are, before the products or after."""
        self._check_no_rounding()
        self._check_one_slot(rows, weighted)
        self._check_all_slots(rows, weighted)

    def _check_one_slot(self, rows: Mapping[Node, Rows], weighted: str) -> None:
        """With all slots zero but one, out is what that one weighs, any number, times a power of two."""
        dtype = self.c.out.meta["val"].dtype
        span = 4 if torch.float16 in (dtype, self.c.x.meta["val"].dtype) else 20
        power = torch.exp2(torch.randint(-span, span + 1, self.token.shape, generator=self.s.generator).double())
        expert = self.s.world.ids[self.token, self.slot]

        def down(unit: Unit, at: Coords) -> Tensor:
            row_token, row_expert, _ = self._slot_of(rows, unit, at)
            mine = (row_token == self.token[at.sample]) & (row_expert == expert[at.sample])
            return torch.where(mine, power[at.sample], 0.0)

        got = self._walk(down).evaluate(self.c.out, self.index)
        inside = (expert >= 0) & (expert < self.c.experts)
        share = self.s.share if weighted == "output" else self.s.chosen.double()
        expected = torch.where(inside, share[self.token, torch.where(inside, expert, 0)] * power, 0).to(dtype)
        once = (self.s.world.ids[self.token] == expert[:, None]).sum(1) == 1
        wrong = (got != expected) & once  # of two slots on one expert, the sum is that of two roundings
        if bool(wrong.any()):
            lost = bool((got[wrong] == 0).all())
            what = "slots are dropped" if lost else f"slots are not weighted by {self.c.weights}"
            part = f"in {100 * float(wrong.double().mean()):.3g}% of the elements tried"
            raise Refused(f"{what}, {part}", "weight every slot once by its routing weight, and drop none")

    def _check_all_slots(self, rows: Mapping[Node, Rows], weighted: str) -> None:
        """With small integers everywhere, and weights that are powers of two, the sum is exact."""
        c, world = self.c, self.s.world
        if c.slots > _MOST_SLOTS:
            raise Refused(f"a token takes {c.slots} experts", f"up to {_MOST_SLOTS} are understood")
        routing = self.s.routing
        if c.weights is not None:
            exact = world.spread(world.exact, c.experts) if c.per_expert else world.exact
            routing = routing.replaced({c.weights: exact.reshape(shape_of(c.weights))})

        def down(unit: Unit, at: Coords) -> Tensor:
            token, expert, feature = self._slot_of(rows, unit, at)
            holds = expert >= 0
            if weighted == "input":  # rows that a weight of zero makes zero
                holds &= (token < 0) | self.s.chosen[token.clamp(min=0), expert.clamp(min=0)]
            return torch.where(holds, _integers(token * c.experts + expert, feature, 1), 0.0)

        got = self._walk(down, True, routing).evaluate(c.out, self.index)
        ids = world.ids[self.token]
        inside = (ids >= 0) & (ids < c.experts)
        weight = torch.where(inside, world.exact[self.token].double() if weighted == "output" else 1.0, 0.0)
        feature = self.feature[:, None].expand(ids.shape)
        values = _integers(self.token[:, None] * c.experts + ids, feature, 1).double()
        if self.biases:
            values = values + _integers(ids, feature, 2)
        if not torch.equal(got.double(), (weight * values).sum(1)):
            raise Refused("the combine is no sum over the slots of each token", "sum what each slot's expert gives")

    def _slot_of(self, rows: Mapping[Node, Rows], unit: Unit, at: Coords) -> tuple[Tensor, Tensor, Tensor]:
        """(token, expert, feature) of elements of a down product; those of no expert hold zeros."""
        row, expert, feature = self.s.locate(unit, unit.down, at.index)
        token = torch.where(expert >= 0, rows[unit.down.node].token[row], PADDING)
        if bool((token == NOWHERE).any()):
            raise Refused("which rows are summed depends on the weights' values", "sum the rows of all slots")
        return token, expert, feature


def _integers(row: Tensor, feature: Tensor, salt: int) -> Tensor:
    """Small integers, none of them zero, for elements of rows."""
    bits = mix(
        torch.stack((row.reshape(-1), feature.reshape(-1)), 1), torch.zeros(row.numel(), dtype=torch.int64), salt
    )
    return torch.tensor([-2.0, -1.0, 1.0, 2.0])[bits % 4].reshape(row.shape)
