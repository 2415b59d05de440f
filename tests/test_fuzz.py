"""The fuzzer on fixed seeds: no difference from eager, no silent dequantisation and no crash is left unexplained."""

import fuzz
import pytest
from zoo_weights import PACKINGS

pytest.importorskip("transformers")  # whose experts are two of the styles
pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, CHUNK = 300, 15


# A few cases in the quick tests: each chunk takes half a minute.
@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 4), *(pytest.param(seed, CHUNK, marks=pytest.mark.slow) for seed in range(0, COUNT, CHUNK))],
)
def test_nothing_is_unexplained(seed, count):
    found = list(fuzz.outcomes(seed, count))
    bugs = [f"seed {c.seed}: {o.kind}: {o.detail}\n  {c}" for c, o in found if o.bug]
    assert not bugs, "\n" + "\n".join(bugs)
    kinds = {o.kind for _, o in found}
    assert len(kinds & {"lifted", "rewritten", "refused"}) > 1  # or the cases are not random enough
    refused = [f"seed {c.seed}: {o.detail}" for c, o in found if o.kind == "refused" and not fuzz.may_be_refused(c)]
    assert not refused, "\n" + "\n".join(refused)


def test_a_case_is_its_seed_alone():
    assert [fuzz.case(n) for n in range(50)] == [fuzz.case(n) for n in range(50)]
    assert len({str(fuzz.case(n)) for n in range(200)}) == 200


def test_cases_cover_every_piece():
    recipes = [fuzz.case(n).recipe for n in range(fuzz.COUNT_THAT_COVERS)]
    named = {name for r in recipes for name in r.packing.split(", ")}
    assert named >= set(PACKINGS)
    for piece, values in fuzz.PIECES.items():
        assert {getattr(r, piece) for r in recipes} == set(values), piece
