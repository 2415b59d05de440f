"""The pages under docs/: their code blocks print what they show, and so do their commands, but for last digits."""

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

import pytest

from fx_nvfp4 import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_CONSOLE = re.compile(r"^```console\n\$ python -m fx_nvfp4 (?P<command>.*)\n(?P<output>(?:.*\n)*?)```$", re.MULTILINE)
_COMMANDS = [
    pytest.param(match["command"], match["output"], id=f"{page.stem}: {match['command']}")
    for page in PAGES
    for match in _CONSOLE.finditer(page.read_text())
]
_NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?%?")


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.stem)
def test_code_blocks_print_what_they_show(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text().replace("```", "")  # a fence would count as output
    blocks = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert blocks.examples
    output = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.REPORT_UDIFF).run(blocks, out=output.write, clear_globs=False)
    assert not results.failed, output.getvalue()


@pytest.mark.parametrize(("command", "shown"), _COMMANDS)
def test_commands_print_what_pages_show(command, shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(shlex.split(command)) == 0
    shown_lines, lines = shown.splitlines(), printed.getvalue().splitlines()
    # The last line names the machine.
    assert [_words(line) for line in lines[:-1]] == [_words(line) for line in shown_lines[:-1]]
    apart = [pair for pair in zip(_numbers(lines), _numbers(shown_lines), strict=True) if not _close(*pair)]
    assert not apart


def _words(line):
    return " ".join(re.sub(r"-{2,}", "--", _NUMBER.sub("#", line)).split())


def _numbers(lines):
    """Of all lines but the last, with the percent sign where there is one."""
    return [n.replace(",", "") for line in lines[:-1] for n in _NUMBER.findall(line)]


def _close(number, shown):
    """Errors depend a little on the order in which a machine adds."""
    if shown[-1] == "%":
        return abs(float(number[:-1]) - float(shown[:-1])) < 1
    return abs(float(number) - float(shown)) <= 0.5 * float(shown)
