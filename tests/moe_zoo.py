"""Mixture-of-experts modules composed of pieces, each written the way models in the wild are written.

    zoo = MoE(Recipe(style="grouped_mm", routing="sigmoid with groups", form="interleaved", bias=True))
    zoo(x), zoo.reference(x)  # as the model spells it; and in fp32, expert by expert

A style lays out tokens, products and the weighted sum; a routing chooses experts; a form says what an expert is.
`supported` names the combinations that no model has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_routing import ROUTINGS, TOP_1
from zoo_styles import ALL_TOKENS_INPUT, IN_BFLOAT16, MODULE_LISTS, STYLES, WEIGHTED_INPUT
from zoo_weights import NEAR_MISSES, PACKINGS, Packing, Weight


@dataclass(frozen=True)
class Recipe:
    """One module; every field is a piece.

    packing: of zoo_weights' PACKINGS and NEAR_MISSES; several, "lookup, divided", go to gate, up and down in turn.
    stored, gather: as zoo_weights.Weight takes them. mask: how dense styles make a mask of ids.
    form: "concatenated" (gate rows, then up rows, of one weight), "interleaved" (g u g u), "separate" (two weights)
    or "plain" (up alone, no gate).
    shared: an expert for every token beside the chosen ones: "none", "plain" or "gated" (times a sigmoid).
    """

    style: str = "einsum"
    routing: str = "softmax, top-k"
    form: str = "concatenated"
    activation: str = "silu"
    bias: bool = False
    shared: str = "none"
    packing: str = "lookup"
    stored: str = "rows"
    gather: str = "packed"
    mask: str = "scatter"
    dtype: torch.dtype = torch.float32
    experts: int = 4
    top_k: int = 2
    hidden: int = 64
    intermediate: int = 96
    seed: int = 0


class MoE(nn.Module):
    """x [T, H] or [B, S, H] -> the same shape."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        reason = unsupported(recipe)
        assert not reason, reason
        self.recipe, r = recipe, recipe
        generator = torch.Generator().manual_seed(r.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.router = nn.Parameter(random(r.experts, r.hidden) * 0.3, requires_grad=False)
        self.register_buffer("correction", random(r.experts) * 0.05)
        parts = {"separate": 2, "plain": 1}.get(r.form, 1)
        rows = r.intermediate if r.form in ("separate", "plain") else 2 * r.intermediate
        lists = r.style in MODULE_LISTS
        many = [random(r.experts, rows, r.hidden) * r.hidden**-0.5 for _ in range(parts)]
        many.append(random(r.experts, r.hidden, r.intermediate) * r.intermediate**-0.5)
        bias = [random(*w.shape[:2]) * 0.2 if r.bias else None for w in many]
        if lists:
            experts = zip(*(w.unbind() for w in many), strict=True)
            biases = zip(*(b.unbind() if b is not None else (None,) * r.experts for b in bias), strict=True)
            self.list = nn.ModuleList(Expert([*ws], [*bs], r) for ws, bs in zip(experts, biases, strict=True))
        else:
            self.stack = Expert(many, bias, r)
        if r.shared != "none":
            one = [random(*w.shape[1:]) * w.shape[-1] ** -0.5 for w in many]
            self.shared = Expert(one, [None] * len(one), r)
            self.shared_gate = nn.Parameter(random(1, r.hidden).to(r.dtype) * 0.3, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        y = STYLES[self.recipe.style](self, x, *self.route(x))
        return self.beside(x, y).view(shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [T, A] in x's dtype, ids [T, A]); logits in fp32, where ties do not happen."""
        logits = F.linear(x.float(), self.router)
        weights, ids = ROUTINGS[self.recipe.routing](self, logits, self.recipe.top_k)
        return weights.to(x.dtype), ids

    def smallest_weight(self) -> int:
        """Elements of the smallest single weight."""
        return min(w.n * w.k for w in self.modules() if isinstance(w, Weight))

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """y with the shared expert's output."""
        if self.recipe.shared == "none":
            return y
        shared = self.shared(x)
        return y + (F.linear(x, self.shared_gate).sigmoid() * shared if self.recipe.shared == "gated" else shared)

    def reference(self, x: Tensor) -> Tensor:
        """What the module means, in fp32 and expert by expert."""
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(flat)
        out = torch.zeros(flat.shape, dtype=torch.float32)
        every = self.list if self.recipe.style in MODULE_LISTS else None
        for e in range(self.recipe.experts):
            expert = every[e] if every else self.stack
            share = torch.where(ids == e, weights, 0).sum(dim=1, keepdim=True).float()
            number = None if every else e
            if self.recipe.style in ALL_TOKENS_INPUT:
                out += expert.truth(flat.float() * share, number)
            elif self.recipe.style in WEIGHTED_INPUT:
                out += (share != 0) * expert.truth(flat.float() * share, number)
            else:
                out += share * expert.truth(flat.float(), number)
        if self.recipe.style == "linear":
            out = self.stack.truth(flat.float(), 0)
        if self.recipe.shared != "none":
            gate = F.linear(flat.float(), self.shared_gate.float()).sigmoid() if self.recipe.shared == "gated" else 1
            out += gate * self.shared.truth(flat.float())
        return out.view(x.shape)


class Expert(nn.Module):
    """The weights of one expert [N, K], or of all [E, N, K], and what lies between its products."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None], recipe: Recipe) -> None:
        super().__init__()
        r = self.recipe = recipe
        made = [
            Weight(w, p, r.dtype, r.stored, r.gather) for w, p in zip(weights, cycle(packings(r.packing)), strict=False)
        ]
        self.up, self.down = nn.ModuleList(made[:-1]), made[-1]
        self.up_bias = nn.ParameterList(_parameter(b, r.dtype) for b in biases[:-1] if b is not None)
        self.down_bias = None if biases[-1] is None else _parameter(biases[-1], r.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Of one expert: x [.., K] -> [.., H]."""
        ups = [F.linear(x, w.nk(), b) for w, b in zip(self.up, self.up_biases(), strict=True)]
        return F.linear(self.act(ups), self.down.nk(), self.down_bias)

    def up_biases(self) -> list[Tensor | None]:
        return list(self.up_bias) or [None] * len(self.up)

    def act(self, ups: list[Tensor]) -> Tensor:
        """Products of the up weights -> the down product's input."""
        form, (f, pair) = self.recipe.form, ACTIVATIONS[self.recipe.activation]
        if form == "plain":
            return f(ups[0])
        if form == "separate":
            gate, up = ups
        elif form == "interleaved":
            gate, up = ups[0][..., ::2], ups[0][..., 1::2]
        else:
            gate, up = ups[0].chunk(2, dim=-1)
        return pair(gate, up) if pair else f(gate) * up

    def truth(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [T, K] in fp32 through one expert."""

        def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
            w = weight.truth() if expert is None else weight.truth()[expert]
            b = 0 if bias is None else bias.float() if expert is None else bias[expert].float()
            return x @ w.T + b

        ups = [product(x, w, b) for w, b in zip(self.up, self.up_biases(), strict=True)]
        return product(self.act(ups), self.down, self.down_bias)


def packings(names: str) -> list[Packing]:
    return [PACKINGS.get(name) or NEAR_MISSES[name][0] for name in names.split(", ")]


def _parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.to(dtype), requires_grad=False)


# Activations: (of one input, of gate and up where it is not f(gate) * up)


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=1.5), up.clamp(min=-1.5, max=1.5)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor] | None]] = {
    "silu": (F.silu, None),
    "gelu": (F.gelu, None),
    "gelu tanh": (lambda g: F.gelu(g, approximate="tanh"), None),
    "relu squared": (lambda g: F.relu(g).square(), None),
    "relu": (F.relu, None),
    "clamped swiglu": (F.silu, _clamped_swiglu),
    "spelled silu": (lambda g: g / (1 + torch.exp(-g)), None),
}


def unsupported(r: Recipe) -> str:
    """Why no model has these pieces together; "" where one may."""
    if r.routing in TOP_1 and r.top_k != 1:
        return "argmax chooses one expert"
    if r.routing == "sigmoid with groups" and (
        r.experts % 2 or r.experts < 4 or r.top_k > 2 * ((r.experts // 2 + 1) // 2)
    ):
        return "groups of two experts, and not more chosen than their groups hold"
    if not 1 <= r.top_k <= r.experts:
        return "more experts chosen than there are"
    if r.style in ("grouped_mm", "batched_mm") and r.form == "separate":
        return "transformers' experts hold gate and up in one weight"
    if r.style in IN_BFLOAT16 and r.dtype == torch.float16:
        return "torchtitan computes in bf16"
    if r.stored == "columns" and any(p.codes == "int32" for p in packings(r.packing)):
        return "int32 words are packed along the last dim"
    if r.stored == "columns" and any(p.scales == "swizzled" for p in packings(r.packing)):
        return "128 x 4 tiles hold rows"
    return ""
