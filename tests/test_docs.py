"""README and docs/: their code runs and prints what they show, but for last digits; links lead somewhere.

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
import torch
from checkpoint_files import SMALL
from quantized_models import ListOfExperts, token_ids, tokens, transformers_model
from safetensors.torch import load_file

import fx_nvfp4
from fx_nvfp4 import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
NO_CODE = ("text", "mermaid")
# The reason is of one line: one that could go on would reach to the next mark, and hide the blocks between.
_FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
_COMMAND = re.compile(r"\$ python -m fx_nvfp4 (?P<command>.*)\n(?P<output>(?:.*\n)*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?%?")


def blocks(page, kind):
    return [m["body"] for m in _FENCE.finditer(page.read_text()) if m["kind"] == kind and not m["skip"]]


_SESSIONS = [p for p in PAGES if ">>> " in p.read_text()]
_SCRIPTS = [p for p in PAGES if any(">>> " not in body for body in blocks(p, "python"))]
_SHELL = [
    pytest.param(body, id=f"{p.stem}: {body.splitlines()[0]}", marks=[pytest.mark.slow] * ("examples/" in body))
    for p in (README, *PAGES)
    for body in blocks(p, "bash")
]
# Of those that measure faithfulness, the one on a checkpoint takes a tenth of the time of that on whole sweeps.
_SWEEPS = "$ python -m fx_nvfp4 faithfulness --device cpu"
_COMMANDS = [
    pytest.param(
        *_COMMAND.fullmatch(body).groups(),
        id=f"{p.stem}: {body.splitlines()[0]}",
        marks=[pytest.mark.slow] * body.startswith(_SWEEPS),
    )
    for p in (README, *PAGES)
    for body in blocks(p, "console")
]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(page):
    """Fences and marks are counted by a looser rule than that which finds what to run, so that none is passed over."""
    text = page.read_text()
    found = list(_FENCE.finditer(text))
    assert len(re.findall(r"^[\s>*-]*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    assert {m["kind"] for m in found} <= {"python", "console", "bash", *NO_CODE}
    marked = [m for m in found if m["skip"]]
    assert text.count("<!-- not run: ") == len(marked)
    named = re.findall(r"[\w.]+/[\w./]*\w", " ".join(m["skip"] for m in marked))
    assert all((ROOT / name).exists() for name in named)
    # A page is one session, with all its prompts: a marked block can have none, nor can a script.
    assert not any(">>> " in m["body"] for m in marked)
    assert all(body.startswith(">>> ") for body in blocks(page, "python") if ">>> " in body)


def run_session(text, page, names):
    session = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), 0)
    assert session.examples
    output, flags = io.StringIO(), doctest.REPORT_UDIFF | doctest.ELLIPSIS
    results = doctest.DocTestRunner(optionflags=flags).run(session, out=output.write, clear_globs=False)
    assert not results.failed, output.getvalue()


@pytest.mark.parametrize("page", _SESSIONS, ids=lambda p: p.stem)
def test_sessions_print_what_they_show(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    run_session(page.read_text().replace("```", ""), page, {})  # a fence would count as output


@pytest.mark.parametrize("page", _SCRIPTS, ids=lambda p: p.stem)
def test_scripts_run(page, monkeypatch):
    """Blocks of a page follow each other, as a reader would run them."""
    monkeypatch.chdir(ROOT)
    names = {"__name__": page.stem}
    for body in blocks(page, "python"):
        if ">>> " not in body:
            exec(compile(body, str(page), "exec"), names)


def _readme_sections():
    """README's python blocks by the heading that they stand under."""
    text, sections = README.read_text(), {}
    for m in _FENCE.finditer(text):
        if m["kind"] == "python" and not m["skip"]:
            heading = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: m.start()]), re.MULTILINE)[-1]
            sections.setdefault(heading, []).append(m["body"])
    return sections


# README speaks of a large checkpoint and of GPUs. What a test has instead:
_IN_PLACE_OF = {
    '"Qwen3-30B-A3B-NVFP4"': f'"{SMALL}"',
    'device="cuda"': 'device="cpu", dtype=torch.float32, progress=False',
    '"cuda", (8,)': '"cpu", (1,)',
}


# What the reader of a section has before its first block, and what must hold after its last one.


@contextlib.contextmanager
def _a_prompt(names, monkeypatch):
    names["input_ids"] = load_file(SMALL / "reference.safetensors")["input_ids"]
    yield
    assert names["logits"].shape[:2] == names["input_ids"].shape


@contextlib.contextmanager
def _a_list_of_packed_experts(names, monkeypatch):
    names["model"] = ListOfExperts()
    fx_nvfp4.quantize_(names["model"], fx_nvfp4.NVFP4Config())
    expected = names["model"](tokens())
    yield
    assert not isinstance(names["model"].experts, torch.nn.ModuleList)
    torch.testing.assert_close(names["model"](tokens()), expected)


@contextlib.contextmanager
def _a_dense_model_and_data(names, monkeypatch):
    names |= {"model": transformers_model("Mixtral"), "data": [token_ids()]}
    yield
    loaded = fx_nvfp4.load("my-model-NVFP4", progress=False)
    assert torch.equal(loaded(token_ids()).logits, names["model"](token_ids()).logits)


@contextlib.contextmanager
def _one_rank(names, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        yield
        with torch.compiler.set_stance("force_eager"):  # docs/several_gpus.md runs it compiled
            assert names["model"](token_ids()).logits.shape[:2] == token_ids().shape
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


_READERS = {
    "fx_nvfp4": _a_prompt,
    "Expert lists": _a_list_of_packed_experts,
    "Quantise your own": _a_dense_model_and_data,
    "Several GPUs": _one_rank,
}


def test_readme_has_the_sections_and_words_that_are_spoken_of_here():
    sections = _readme_sections()
    assert sections.keys() == _READERS.keys()
    code = "".join(body for bodies in sections.values() for body in bodies)
    assert all(words in code for words in _IN_PLACE_OF)


@pytest.mark.parametrize("heading", _READERS)
def test_readme_runs(heading, monkeypatch, tmp_path):
    """Blocks of a section follow each other, after the import that opens README; a session may come after a script."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # one section saves a model
    torch._dynamo.reset()
    names = {"__name__": "README", "torch": torch, "fx_nvfp4": fx_nvfp4}
    with torch.no_grad(), _READERS[heading](names, monkeypatch):
        for body in _readme_sections()[heading]:
            for words, instead in _IN_PLACE_OF.items():
                body = body.replace(words, instead)
            if ">>> " in body:
                run_session(body, README, names)
            else:
                exec(compile(body, str(README), "exec"), names)


def _long_commands():
    """Every command of ours among those that are not run."""
    for page in (README, *PAGES):
        for m in _FENCE.finditer(page.read_text()):
            if m["kind"] == "bash" and m["skip"]:
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


@pytest.mark.parametrize("page", [*PAGES, README, ROOT / "CHANGELOG.md"], ids=lambda p: p.stem)
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
