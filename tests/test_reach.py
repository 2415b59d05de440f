"""docs/reach.md names tests that exist, and every test of compile features and odd input has its line there.

So does the README's table of torch versions; each row of either says of each set-up whether its tests were run there.
"""

import ast
import re
from pathlib import Path

import pytest

from fx_nvfp4.lowering import versions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reach.md").read_text()
README = (ROOT / "README.md").read_text()
NAMED = re.compile(r"tests/(\w+\.py)(?:::(\w+))?")
SET_UPS = ["2.11, CUDA", "2.13, CPU", "2.14, CPU"]
HOW_IT_FARED = re.compile(r"(?<!not )\bpassed\b|^(no record|not run|not for CUDA|\*\*failed\*\*: )")
# Of these files, tests whose line another one is: they try the same feature in another way, or a rule behind it.
BESIDE = {
    *("test_numbers_that_become_symbols_by_themselves", "test_pickles_from_before_scales_travelled_as_bytes"),
    *("test_assertions_on_a_packed_weight", "test_compiled_products_of_odd_inputs"),
    *("test_the_debug_mode_reaches_compiled_models", "test_another_value_of_the_variable_is_refused"),
    "test_the_oracle_rounds_what_is_not_finite_block_by_block",
}


def names_in(name):
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def rows_by_set_up(text):
    """(tests, a cell for each set-up) of each row of the tables that have a column for each."""
    tables = re.findall(r"^\| [^|\n]*\| tests \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for table in tables for row in table.splitlines()]
    return [(tests, cells) for _, tests, *cells in rows]


@pytest.mark.parametrize(("text", "least"), [(TEXT, 30), (README, 7)], ids=["reach.md", "README"])
def test_named_tests_exist(text, least):
    named = NAMED.findall(text)
    assert len(named) > least
    missing = [f"{file}::{test}" for file, test in named if test and test not in names_in(file)]
    assert not missing
    assert all((ROOT / "tests" / file).is_file() for file, _ in named)


@pytest.mark.parametrize(("text", "least"), [(TEXT, 40), (README, 6)], ids=["reach.md", "README"])
def test_every_cell_says_how_its_tests_fared(text, least):
    assert text.count(f"| tests | {' | '.join(SET_UPS)} |") == len(re.findall(r"\| tests \|", text))
    rows = rows_by_set_up(text)
    assert len(rows) > least
    for tests, cells in rows:
        assert NAMED.search(tests), tests
        assert len(cells) == len(SET_UPS)
        assert all(HOW_IT_FARED.search(cell) for cell in cells), cells


def test_the_releases_that_count_as_tested_have_their_columns():
    releases = [tuple(map(int, name.split(",")[0].split("."))) for name in SET_UPS]
    assert min(releases) == versions.OLDEST
    assert versions.NEWEST in releases


@pytest.mark.parametrize("file", ["test_compile_features.py", "test_hardening.py"])
def test_every_feature_has_its_line(file):
    named = {test for found, test in NAMED.findall(TEXT) if found == file}
    assert names_in(file) - named - BESIDE == set()


def test_readme_links_to_the_pages():
    for page in ("docs/reach.md", "docs/targets.md", "SECURITY.md"):
        assert f"({page})" in README
