"""Every style of mixture of experts with every spelling of its weights: what the graph becomes, and its numbers.

`check` compares with eager and with the fp32 reference, and looks for dense weights in the graph; PRODUCTS and
NOT_LIFTED say which ops must be found there.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from moe_zoo import ACTIVATIONS, Recipe, packings, unsupported
from zoo_checks import Outcome, check
from zoo_routing import ROUTINGS, TOP_1
from zoo_styles import ALL_TOKENS_INPUT, DATA_DEPENDENT, IN_BFLOAT16, LOOPS, MODULE_LISTS, STYLES, _TransformersExperts
from zoo_weights import NEAR_MISSES, PACKINGS

pytest.importorskip("transformers")  # whose experts are two of the styles
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"no": [(5,)], "tokens": [(5,), (8,), (3,)], "all": [(5,), (8,), (3,)]}
TENSOR = "packed tensor W4A16"
# style -> the ops of its up and its down product
PRODUCTS = {
    **dict.fromkeys(("linear", "stacked_loop", "split_sizes", *MODULE_LISTS), ("linear", "linear")),
    **dict.fromkeys(("einsum", "batched_mm", "batched_rows", "scattered_rows"), ("indexed", "indexed")),
    **dict.fromkeys(("grouped_mm", "titan", "titan_input", "titan_unsorted", "titan_padded"), ("grouped", "grouped")),
    **dict.fromkeys(("dense_bmm", "dense_matmul", "llama4", "llama4_scatter", "capacity"), ("batched", "batched")),
    "dense_einsum": ("linear", "batched"),
}
# style -> why its products stay apart
NOT_LIFTED = {
    "linear": "no routing",
    "split_sizes": "how many rows an expert has is known when it runs, not when it is traced",
    **dict.fromkeys(MODULE_LISTS, "experts are weights by themselves; prepare() makes them one"),
}

DENSE = ("dense_bmm", "dense_matmul", "dense_einsum", "llama4", "llama4_scatter", "capacity", "stacked_loop")


def is_lifted(r: Recipe) -> bool:
    """Whether the whole block becomes one moe op."""
    weights = packings(r.packing)
    ups = weights[: 2 if r.form == "separate" else 1]
    if len({p.tensor.removesuffix("none") for p in ups}) > 1:
        return False  # the moe op rounds what gate and up take alike
    if any(p.tensor == "dynamic" for p in weights) and r.style in DENSE:
        return False  # activation scales are taken over tokens that the moe op does not see
    if r.style == "stacked_loop" and any(p.order == "no global" for p in weights):
        return False  # scales of one that are made for each expert tell no experts of one weight
    if r.style in ALL_TOKENS_INPUT and r.bias:
        return False  # experts that were not chosen see zeros, and give their bias
    if r.style == "titan_input" and r.dtype == torch.float32:
        return False  # weighs x in fp32 and rounds it to bf16 after that, where the moe op weighs what is rounded
    if r.style in IN_BFLOAT16 and r.dtype == torch.float32 and r.bias:
        return False  # adds fp32 biases to bf16 products, and does not round the sum
    if r.style.startswith("titan") and r.routing == "repeated argmax":
        return False  # its histogram would count an id past the last expert, which this is not known to exclude
    if r.style in DENSE and r.routing == "repeated argmax" and r.mask == "scatter" and r.top_k > 1:
        return False  # scatter keeps the last of equal ids, which repeated argmax is not known to exclude
    return r.style not in NOT_LIFTED


def expected_ops(r: Recipe) -> Counter:
    """Ops of the compiled graph by name."""
    ups = 2 if r.form == "separate" else 1
    times = r.experts if r.style in LOOPS else 1
    up, down = PRODUCTS[r.style]
    ops = Counter({"moe": 1}) if is_lifted(r) else Counter({up: ups * times}) + Counter({down: times})
    return ops + (Counter({"linear": ups + 1}) if r.shared != "none" else Counter())


def emulated(recipe: Recipe, dynamic: str = "no", **kwargs: object) -> Outcome:
    """The outcome of a recipe whose every product must be emulated, in one graph."""
    o = check(recipe, SHAPES[dynamic], dynamic, **kwargs)
    assert not o.bug, (o.kind, o.detail)
    assert not o.report.refused, o.report
    assert not o.dense
    assert o.report.graphs == 1
    if recipe.style == "dense_einsum" and not is_lifted(recipe):  # packed tensors and spelled weights differ
        assert len(o.ops) == expected_ops(recipe).total()
    else:
        assert Counter(o.ops) == expected_ops(recipe), o.report
    assert [b.lifted for b in o.report.blocks] == [True] or not is_lifted(recipe)
    assert all(b.lifted or b.reason for b in o.report.blocks)
    return o


def table() -> list[tuple[str, str, torch.dtype, str]]:
    """(style, packings, dtype, dynamic): some styles with every packing, every style with every dtype and dynamic."""
    names = list(PACKINGS)
    every = ("linear", "einsum", "batched_mm", "grouped_mm", "dense_bmm", "list_masked")
    rows = []
    for i, style in enumerate(STYLES):
        weights = 2 if style in ("batched_mm", "grouped_mm") else 3
        count = -(-len(names) // weights) if style in every else 6
        for j in range(count):
            start = weights * j if style in every else 5 * i + weights * j
            chosen = [names[(start + w) % len(names)] for w in range(weights)]
            rows.append((style, ", ".join(chosen), DTYPES[j % 3], ("no", "tokens")[j // 3 % 2]))
    return rows


@pytest.mark.in_part(24)
@pytest.mark.parametrize(("style", "packing", "dtype", "dynamic"), table())
def test_style_with_spellings(style, packing, dtype, dynamic):
    form = "separate" if packing.count(",") == 2 else "concatenated"
    recipe = Recipe(style=style, packing=packing, form=form, dtype=dtype, experts=2 if style in LOOPS else 4)
    if unsupported(recipe):
        recipe = replace(recipe, dtype=torch.bfloat16)
    emulated(recipe, dynamic)


@pytest.mark.in_part(8)
@pytest.mark.parametrize("style", STYLES)
def test_weights_in_tiles_become_what_canonical_ones_become(style):
    form = ("concatenated", "interleaved", "separate")[list(STYLES).index(style) % 3]
    recipe = Recipe(style=style, form=form, packing=TENSOR, dtype=torch.bfloat16, experts=2, intermediate=64)
    recipe = replace(recipe, form="concatenated") if unsupported(recipe) else recipe
    o = emulated(recipe, options={"prepack": "always"})
    assert {m.source for m in o.report.matched} == {"packed tensor, tiles"}


@pytest.mark.in_part(6)
@pytest.mark.parametrize("style", ["linear", "einsum", "grouped_mm", "dense_einsum", "titan_padded", "list_masked"])
def test_everything_dynamic(style):
    emulated(Recipe(style=style, dtype=torch.bfloat16, experts=2), "all")


FORMS = [
    {"form": "interleaved", "activation": "clamped swiglu", "bias": True, "stored": "transposed"},
    {"form": "plain", "activation": "relu squared", "shared": "plain"},
    {"form": "separate", "activation": "gelu tanh", "stored": "columns", "shared": "gated"},
    {"form": "concatenated", "activation": "gelu", "bias": True, "shared": "gated", "gather": "dequantised"},
]


@pytest.mark.in_part(20)
@pytest.mark.parametrize(
    ("form", "style"),
    list(itertools.product(FORMS, STYLES)),
    ids=lambda v: v["form"] if isinstance(v, dict) else v,
)
def test_forms_of_experts(style, form):
    """Of packed tensors and spelled weights in turn, as each style takes both alike."""
    recipe = Recipe(style=style, experts=2 if style in LOOPS else 4, **form)
    if not unsupported(recipe):
        emulated(recipe)


@pytest.mark.in_part(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for style in ("grouped_mm", "dense_bmm"):
        emulated(Recipe(style=style, activation=activation, packing=TENSOR))


@pytest.mark.in_part(20)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("style", ["dense_bmm", "grouped_mm", "batched_mm", "titan"])
def test_routings(style, routing):
    top_k = 1 if routing in TOP_1 else 3
    for mask in ("scatter", "one-hot", "comparison") if style == "dense_bmm" else ("scatter",):
        emulated(Recipe(style=style, routing=routing, experts=6, top_k=top_k, mask=mask, packing=TENSOR))


@pytest.mark.in_part(4)
@pytest.mark.parametrize("routing", ["softmax, top-k", *TOP_1])
@pytest.mark.parametrize("style", ["grouped_mm", "batched_mm"])
def test_rows_of_absent_experts_are_masked(style, routing, monkeypatch):
    """As transformers does under expert parallelism, and up to 5.17 always; with one expert a token, rows gathered and
    masked are as many as the tokens."""
    monkeypatch.setattr(_TransformersExperts, "_is_expert_parallel", True)
    emulated(Recipe(style=style, routing=routing, experts=6, top_k=1 if routing in TOP_1 else 3, packing=TENSOR))


@pytest.mark.in_part(24)
@pytest.mark.parametrize("style", STYLES)
def test_tokens_of_a_batch(style):
    """x [B, S, H], and shapes at which sizes are 1."""
    recipe = Recipe(style=style, experts=2, packing=TENSOR)
    for shapes, dynamic in (([(2, 3)], "no"), ([(1,)], "no"), ([(2, 3), (3, 4)], "tokens")):
        o = check(recipe, shapes, dynamic)
        assert not o.bug, (o.kind, o.detail)
        assert not o.report.refused, o.report


@pytest.mark.parametrize("style", DATA_DEPENDENT)
def test_graph_breaks_leave_numbers_right(style):
    """Without the settings that capture data-dependent sizes: as many graphs as Dynamo makes, all of them emulated."""
    o = check(Recipe(style=style, experts=3, packing=TENSOR), fullgraph=False, capture=False)
    assert not o.bug, (o.kind, o.detail)
    assert not o.report.refused, o.report


@pytest.mark.in_part(8)
@pytest.mark.parametrize("style", ["linear", "einsum", "grouped_mm", "dense_bmm", "list_masked"])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(style, name):
    o = check(Recipe(style=style, packing=name, experts=2))
    assert not o.bug, (o.kind, o.detail)
    assert o.report.matched == []
    assert not o.ops
    assert NEAR_MISSES[name][1] in o.detail
    assert len(o.report.refused) >= (4 if style == "list_masked" else 2)


def test_half_supported_block_names_what_it_skips():
    o = check(Recipe(style="grouped_mm", packing="lookup, NF4", shared="plain"))
    assert o.kind == "refused"
    assert Counter(o.ops) == Counter({"grouped": 1, "linear": 1})
    assert len(o.report.refused) == 2
    assert all("NF4" in r.reason for r in o.report.refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(style="einsum", dtype=torch.bfloat16, bias=True),
        Recipe(style="grouped_mm", packing="packed tensor W4A4 dynamic", shared="gated"),
        Recipe(style="dense_bmm", form="interleaved", activation="clamped swiglu", bias=True, stored="transposed"),
        Recipe(style="list_where", experts=2),
    ],
    ids=lambda r: r.style,
)
def test_generated_code(recipe):
    """Through Inductor's code generation."""
    emulated(recipe, "tokens", options={"codegen": True})
