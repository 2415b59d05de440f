"""tests/sanitize.py: kernels against their twins at edge shapes, and what it makes of compute-sanitizer's words.

There is no sanitizer without a GPU: its output is read from files in the format of version 2025.2, and a program in
its place shows that the whole way is gone, from the options to the exit status.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import sanitizer_cases
import torch
from sanitizer_output import parse, rows, together

from fx_nvfp4.kernels import dequantize as dequantize_kernels

SAMPLES = Path(__file__).parent / "data" / "compute_sanitizer"
SLOW = {"tiled: down alone", "tiled: up, down"}
KERNELS = [*sanitizer_cases.CANONICAL, *sanitizer_cases.TILED]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _poisoned():
    sanitize.poison_outputs()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.in_part(3)
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("kernel", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KERNELS])
def test_kernels_give_what_their_twins_give(kernel, device):
    found = list(sanitize.run_cases(device, [kernel], quick=True))
    assert len(found) > 3
    assert not [f"{c.shape}: {c.outcome}" for c in found if c.wrong]


@pytest.mark.usefixtures("_poisoned")
def test_outputs_that_are_not_written_are_noticed(monkeypatch, device):
    """Or the comparison guards nothing."""
    monkeypatch.setattr(
        dequantize_kernels,
        "dequantize",
        lambda qdata, *_: torch.empty(*qdata.shape[:-1], 2 * qdata.shape[-1], dtype=_[-1], device=qdata.device),
    )
    wrong = [c.wrong for c in sanitize.run_cases(device, ["dequantize"], quick=True)]
    assert wrong == [True, True, True, False]  # the last has no rows


def test_every_kernel_in_full_has_shapes_of_its_own():
    found = [(c.kernel, c.shape) for c in sanitizer_cases.cases()]
    assert len(found) == len(set(found)) > 1000
    quick = {(c.kernel, c.shape) for c in sanitizer_cases.cases(quick=True)}
    assert {kernel for kernel, _ in quick} == set(KERNELS)


def sample(name):
    return parse((SAMPLES / f"{name}.txt").read_text().splitlines(keepends=True))


def test_errors_belong_to_the_case_that_ran():
    found = sample("memcheck")
    assert [(c.kernel, len(c.records), c.wrong) for c in found.cases] == [
        *(("grouped", 2, True), ("grouped", 0, True), ("dequantize", 0, False)),
    ]
    assert found.cases[0].functions == ["grouped_kernel"]
    assert str(found.cases[0].records[0]) == "Invalid __global__ read of size 2 bytes in grouped_kernel"
    assert (found.total, found.elsewhere, found.clean) == (6, 4, False)
    lines = list(rows(found))
    assert lines[1] == ("grouped", "37 rows, spread, 33 x 48 float16", "right", "2 (grouped_kernel)")
    assert lines[2][2] == "WRONG: AssertionError: relative error nan"
    assert lines[-1] == ("(none)", "outside of cases, or not printed", "", "4")


def test_races_of_either_severity_count():
    found = sample("racecheck")
    assert (found.total, found.elsewhere, found.clean) == (2, 0, False)
    assert found.cases[0].functions == ["tiled_down_kernel_0d1d2", "tiled_up_kernel"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("initcheck", "Uninitialized __global__ memory read of size 4 bytes in place_kernel"),
        ("synccheck", "Barrier error detected. Divergent thread(s) in block. in place_kernel"),
    ],
)
def test_one_error(name, first):
    found = sample(name)
    assert (found.total, found.elsewhere, found.clean) == (1, 0, False)
    assert str(found.cases[0].records[0]) == first


def test_a_clean_run():
    found = sample("clean")
    assert found.clean
    assert (found.total, [c.wrong for c in found.cases]) == (0, [False, False])


def test_a_tool_that_has_seen_nothing_is_no_clean_run():
    found = sample("no_cuda")
    assert not found.clean
    assert found.total is None
    assert len(found.trouble) == 2


def test_of_several_runs_one_that_has_seen_nothing_is_no_clean_run():
    both = together([sample("clean"), sample("no_cuda")])
    assert (both.total, both.clean, len(both.cases)) == (None, False, 2)
    assert together([sample("no_cuda"), sample("clean")]).total is None
    assert together([sample("memcheck"), sample("racecheck")]).total == 8
    assert together([sample("clean"), sample("clean")]).clean


def test_shares_are_all_cases_and_none_twice():
    whole = [c.shape for c in sanitize.run_cases("cpu", ["routing"], quick=True)]
    parts = [[c.shape for c in sanitize.run_cases("cpu", ["routing"], True, share=(i, 3))] for i in range(3)]
    assert sorted(shape for part in parts for shape in part) == sorted(whole)
    assert len(set(whole)) == len(whole) > 3


def test_a_program_that_ends_early_is_no_clean_run():
    text = (SAMPLES / "clean.txt").read_text().splitlines()
    del text[4]  # what came of the second case
    found = parse(text)
    assert [c.outcome for c in found.cases] == ["right", "did not end"]
    assert not found.clean


# In the sanitizer's place: passes the program's lines on, and after a case that is named prints a record.
TOOL = f"""#!{sys.executable}
import os, subprocess, sys
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
options, command = sys.argv[1:], []
while options[0] != {sys.executable!r}:
    command.append(options.pop(0))
assert command[:2] == ["--tool", "memcheck"], command
assert command[command.index("--padding") + 1] == "128"
print("========= COMPUTE-SANITIZER")
done = subprocess.run(options, capture_output=True, text=True, check=True)
errors = 0
for line in done.stdout.splitlines():
    print(line)
    if line.startswith("case: ") and os.environ["AT"] in line:
        errors += 1
        print("========= Invalid __global__ read of size 1 bytes")
        print("=========     at dequantize_kernel+0x1c0 in dequantize.py:28")
print(f"========= ERROR SUMMARY: {{errors}} error{{'s' * (errors != 1)}}")
"""


@pytest.mark.in_part(4)
@pytest.mark.parametrize("jobs", ["1", "3"])
@pytest.mark.parametrize("at", ["33 x 48", "nothing"])
def test_the_whole_way(at, jobs, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "AT": at}
    command = [sys.executable, sanitize.__file__, "--tool", "memcheck", "--quick", "--kernel", "dequantize"]
    command += ["--jobs", jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    clean = at == "nothing"
    assert done.returncode == (0 if clean else 1), done.stderr[-2000:]
    *_, last = done.stdout.splitlines()
    wrong, errors = (0, 0) if clean else (1, 1)
    assert last.startswith(f"4 cases, {wrong} of them wrong or with errors, {errors} errors in all (memcheck, ")
    assert ("right   1 (dequantize_kernel)" in done.stdout) == (not clean)


def test_a_sanitizer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sanitize, "_usual_places", lambda: iter(()))
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.delenv("COMPUTE_SANITIZER", raising=False)
    with pytest.raises(SystemExit, match="compute-sanitizer is not on this machine: install the CUDA toolkit"):
        sanitize.find_sanitizer()


def test_the_libraries_of_the_wheel_lie_apart(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    for name in ("bin/compute-sanitizer", f"lib/{sanitize.LIBRARY}"):
        (tmp_path / name).touch()
    monkeypatch.setenv("COMPUTE_SANITIZER", str(tmp_path / "bin" / "compute-sanitizer"))
    assert sanitize.find_sanitizer()[1:] == ["--injection-path", str(tmp_path / "lib")]
