"""Random mixture-of-experts modules from the pieces of the zoo, compiled against eager.

    python tests/fuzz.py --count 5000 --seed 0

Case n of a run is that of the seed, seed + n, whatever comes before it: `--seed S --count 1` repeats one. What came of
each graph is counted: "lifted", "rewritten", "refused" with its reasons, "upstream" where PyTorch cannot run it either,
or a bug, and then the line to repeat it is printed: "DIFFERENT" from eager, "SILENT" dequantisation, "CRASH".
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from moe_zoo import ACTIVATIONS, MoE, Recipe, packings, unsupported
from zoo_checks import Outcome, capturing, check, tokens
from zoo_routing import ROUTINGS, TOP_1
from zoo_styles import DATA_DEPENDENT, LOOPS, STYLES
from zoo_weights import NEAR_MISSES, PACKINGS

# field of Recipe -> what it may be; repeated for what is to be met more often
PIECES: dict[str, tuple[Any, ...]] = {
    "style": tuple(STYLES),
    "routing": tuple(ROUTINGS),
    "form": ("concatenated", "concatenated", "interleaved", "separate", "plain"),
    "activation": tuple(ACTIVATIONS),
    "bias": (False, False, True),
    "shared": ("none", "none", "plain", "gated"),
    "stored": ("rows", "rows", "transposed", "columns"),
    "gather": ("packed", "dequantised"),
    "mask": ("scatter", "one-hot", "comparison"),
    "dtype": (torch.float32, torch.float32, torch.bfloat16, torch.float16),
}
COUNT_THAT_COVERS = 300  # cases, from seed 0, among which every piece is


@dataclass(frozen=True)
class Case:
    """What one seed stands for: arguments of zoo_checks.check."""

    seed: int
    recipe: Recipe
    shapes: tuple[tuple[int, ...], ...]
    dynamic: str

    def __str__(self) -> str:
        """A line of Python that repeats it."""
        plain = Recipe()
        changed = {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)}
        given = ", ".join(f"{k}={v!r}" for k, v in changed.items() if v != getattr(plain, k))
        return f"check(Recipe({given}), {list(self.shapes)}, {self.dynamic!r})"


def case(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    while True:
        recipe = _recipe(rng, seed)
        if not unsupported(recipe):
            break
    dynamic = rng.choices(("no", "tokens", "all"), (6, 3, 1))[0]
    count = 1 if dynamic == "no" else 3
    if rng.random() < 0.3:
        shapes = tuple((rng.randint(2, 4), rng.randint(2, 5)) for _ in range(count))
    else:
        # Dynamo specialises on the sizes 0 and 1.
        shapes = tuple((rng.randint(1 if dynamic == "no" else 2, 11),) for _ in range(count))
    return Case(seed, recipe, shapes, dynamic)


def _recipe(rng: random.Random, seed: int) -> Recipe:
    chosen = {piece: rng.choice(values) for piece, values in PIECES.items()}
    blocks = (1, 5) if rng.random() < 0.1 else (3, 6)
    experts = rng.choice((1, 2, 3, 4) if chosen["style"] in LOOPS else (1, 2, 3, 4, 5, 8))
    return Recipe(
        **chosen,
        packing=_packing(rng),
        experts=experts,
        top_k=1 if chosen["routing"] in TOP_1 else rng.randint(1, experts),
        hidden=16 * rng.randint(*blocks),
        intermediate=16 * rng.randint(*blocks),
        seed=seed,
    )


def _packing(rng: random.Random) -> str:
    """One for all weights, one for each, or one of them a near miss."""
    kind, names = rng.random(), list(PACKINGS)
    if kind < 0.3:
        return rng.choice([n for n in names if PACKINGS[n].tensor])
    if kind < 0.65:
        return rng.choice(names)
    if kind < 0.95:
        return ", ".join(rng.choices(names, k=3))
    # Blocks of 32 need an even number of blocks.
    odd = [n for n in NEAR_MISSES if "32" not in NEAR_MISSES[n][1]]
    return ", ".join(rng.sample([rng.choice(names), rng.choice(odd)], k=2))


def run(case: Case) -> Outcome:
    """The outcome of a case; whatever is raised is a crash, unless PyTorch raises it without us ("upstream")."""
    try:
        return check(case.recipe, case.shapes, case.dynamic)
    except Exception as error:
        text = [line for line in str(error).splitlines() if line.strip()] or [""]
        detail = f"{type(error).__name__}: {' '.join(text[:2])[:300]}"
    return Outcome("CRASH" if _runs_without_us(case) else "upstream", detail=detail)


def _runs_without_us(case: Case) -> bool:
    """Whether eager and PyTorch's own backend that runs a traced graph op by op can do it."""
    torch._dynamo.reset()
    model = MoE(case.recipe).requires_grad_(False)
    symbols = case.dynamic != "no"
    traced = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=symbols)
    with torch.no_grad(), capturing(case.recipe.style in DATA_DEPENDENT):
        try:
            for shape in case.shapes:
                x = tokens(case.recipe, *shape)
                model(x), traced(x)
        except Exception:
            return False
    return True


def outcomes(seed: int, count: int) -> Iterator[tuple[Case, Outcome]]:
    """Cases seed .. seed + count - 1 with what came of them; a refusal without a reason is a bug."""
    for number in range(seed, seed + count):
        found = case(number)
        outcome = run(found)
        if outcome.kind == "refused" and not all(r.reason and r.where for r in outcome.report.refused):
            outcome.kind = "UNEXPLAINED"
        yield found, outcome


def may_be_refused(found: Case) -> bool:
    """Whether a weight of this case is no NVFP4, or so small that dims cannot be told from blocks."""
    r = found.recipe
    return min(r.hidden, r.intermediate) < 48 or any(p not in PACKINGS.values() for p in packings(r.packing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="number of graphs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--refused", action="store_true", help="print what is refused and holds no near miss")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    kinds: Counter[str] = Counter()
    by_style: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    start = time.time()
    for found, outcome in outcomes(args.seed, args.count):
        kinds[outcome.kind] += 1
        by_style[found.recipe.style, outcome.kind] += 1
        odd = outcome.kind == "refused" and not may_be_refused(found)
        reasons.update([outcome.detail[:150]] if odd else [])
        if outcome.bug or args.verbose or (odd and args.refused):
            print(f"seed {found.seed}: {outcome.kind}: {outcome.detail}\n    {found}", flush=True)
    columns = sorted(kinds, key=lambda k: (k.isupper(), k))
    print(f"\n{'style':16}" + "".join(f"{k:>12}" for k in columns))
    for style in STYLES:
        print(f"{style:16}" + "".join(f"{by_style[style, k]:12}" for k in columns))
    print(f"{'all':16}" + "".join(f"{kinds[k]:12}" for k in columns))
    for reason, count in reasons.most_common(20):
        print(f"{count:6} refused: {reason}")
    bugs = sum(n for k, n in kinds.items() if k.isupper())
    print(f"{args.count} graphs, seeds {args.seed} to {args.seed + args.count - 1}: {bugs} unexplained, ", end="")
    print(f"{time.time() - start:.0f} s")
    return 1 if bugs else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
