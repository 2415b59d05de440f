"""docs/reach.md names tests that exist, and every test of compile features and odd input has its line there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reach.md").read_text()
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


def test_named_tests_exist():
    named = re.findall(r"tests/(\w+\.py)(?:::(\w+))?", TEXT)
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if test and test not in names_in(file)]
    assert not missing
    assert all((ROOT / "tests" / file).is_file() for file, _ in named)


@pytest.mark.parametrize("file", ["test_compile_features.py", "test_hardening.py"])
def test_every_feature_has_its_line(file):
    named = {test for found, test in re.findall(r"tests/(\w+\.py)::(\w+)", TEXT) if found == file}
    assert names_in(file) - named - BESIDE == set()


def test_readme_links_to_the_pages():
    readme = (ROOT / "README.md").read_text()
    for page in ("docs/reach.md", "docs/targets.md", "SECURITY.md"):
        assert f"({page})" in readme
