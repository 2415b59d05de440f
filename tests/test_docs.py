"""The pages under docs/: their code runs and prints what they show, but for last digits; links lead somewhere.

Every fenced block is one of: a session with prompts, a script, a command of ours with its output, a shell script, or no
code (text, a drawing). What is not run gives the reason in a comment before its fence.
"""

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fx_nvfp4 import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NO_CODE = ("text", "mermaid")
_FENCE = re.compile(r"^(?P<skip><!-- not run: .+ -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\$ python -m fx_nvfp4 (?P<command>.*)\n(?P<output>(?:.*\n)*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?%?")


def blocks(page, kind):
    return [m["body"] for m in _FENCE.finditer(page.read_text()) if m["kind"] == kind and not m["skip"]]


_SESSIONS = [p for p in PAGES if ">>> " in p.read_text()]
_SCRIPTS = [p for p in PAGES if any(">>> " not in body for body in blocks(p, "python"))]
_SHELL = [
    pytest.param(body, id=f"{p.stem}: {body.splitlines()[0]}", marks=[pytest.mark.slow] * ("examples/" in body))
    for p in PAGES
    for body in blocks(p, "bash")
]
_COMMANDS = [
    pytest.param(*_COMMAND.fullmatch(body).groups(), id=f"{p.stem}: {body.splitlines()[0]}")
    for p in PAGES
    for body in blocks(p, "console")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_is_of_a_kind_that_is_run(page):
    kinds = {m["kind"] for m in _FENCE.finditer(page.read_text())}
    assert kinds <= {"python", "console", "bash", *NO_CODE}


@pytest.mark.parametrize("page", _SESSIONS, ids=lambda p: p.stem)
def test_sessions_print_what_they_show(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = page.read_text().replace("```", "")  # a fence would count as output
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert session.examples
    output, flags = io.StringIO(), doctest.REPORT_UDIFF | doctest.ELLIPSIS
    results = doctest.DocTestRunner(optionflags=flags).run(session, out=output.write, clear_globs=False)
    assert not results.failed, output.getvalue()


@pytest.mark.parametrize("page", _SCRIPTS, ids=lambda p: p.stem)
def test_scripts_run(page, monkeypatch):
    """Blocks of a page follow each other, as a reader would run them."""
    monkeypatch.chdir(ROOT)
    names = {"__name__": page.stem}
    for body in blocks(page, "python"):
        if ">>> " not in body:
            exec(compile(body, str(page), "exec"), names)


def _long_commands():
    """Every command of ours that takes too long, or more than a test has: README's, and those that are not run."""
    for page in (ROOT / "README.md", *PAGES):
        for m in _FENCE.finditer(page.read_text()):
            if m["kind"] == "bash" and (m["skip"] or page.name == "README.md"):
                for line in m["body"].replace("\\\n", " ").splitlines():
                    if found := re.search(r"python (-m fx_nvfp4 (?!lm-eval).*|(?:benchmarks|examples)/.*)", line):
                        yield pytest.param(found[1], id=f"{page.stem}: {found[1][:60]}")


@pytest.mark.parametrize("command", list(_long_commands()))
def test_commands_that_are_not_run_have_the_options_that_they_are_given(command, monkeypatch):
    """An option that was renamed would go unnoticed; lm-eval's are the harness' own."""
    words = shlex.split(command, comments=True)
    if words[0] == "-m":
        monkeypatch.setattr(sys, "argv", ["fx_nvfp4"])
        assert cli._parser().parse_args(words[2:]).run
        return
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [str(ROOT / Path(words[0]).parent), *sys.path])
    names = {"__name__": "documented", "__doc__": "", "__file__": str(ROOT / words[0])}
    exec(compile((ROOT / words[0]).read_text(), words[0], "exec"), names)
    parse = names["parse_arguments"]
    assert parse(words[1:]) if parse.__code__.co_argcount else parse()


@pytest.mark.parametrize("script", _SHELL)
def test_shell_scripts_succeed(script):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    text = _FENCE.sub("", page.read_text())
    lost = [
        link for link in _LINK.findall(text) if not link.startswith(("http://", "https://")) and _is_lost(page, link)
    ]
    assert not lost


def _is_lost(page, link):
    name, _, heading = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return True
    return bool(heading) and heading not in _anchors(target)


def _anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
