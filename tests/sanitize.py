"""Every Triton kernel at edge shapes, against its plain PyTorch twin, by itself or under compute-sanitizer.

    python tests/sanitize.py                       # results alone; without a GPU in Triton's interpreter
    python tests/sanitize.py --tool memcheck       # on a GPU, under compute-sanitizer: memory that is not the kernel's
    python tests/sanitize.py --tool racecheck      # ... shared memory without a barrier between writing and reading
    python tests/sanitize.py --tool initcheck      # ... global memory that nobody has written
    python tests/sanitize.py --tool synccheck      # ... barriers that not all threads reach

It prints a table of kernels, shapes and errors, and exits with 1 if there is an error, a result that differs from the
twin's, or a tool that did not come to its end. A run without a tool first leaves compiled kernels in Triton's cache, so
that no time goes into them later. `--kernel NAME ...` runs some of the kernels, `--apart` each in a process of its
own, where one takes the others with it. `--jobs N` shares the cases out over N processes that run side by side.

The cases are in tests/sanitizer_cases.py. Outputs are filled with NaN before a kernel writes them, except under
initcheck, which would take that for an initialisation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Triton reads the variable when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_interpreter import repair

    repair()

from sanitizer_output import CASE, OUTCOME, RIGHT, Output, Ran, case_line, outcome_line, parse, rows, together

from fx_nvfp4.report_table import table

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_TOOL = "without a tool"
OPTIONS = (
    # A kernel that has failed does not take the next ones with it, and its errors come before the next case.
    *("--destroy-on-device-error", "kernel", "--force-blocking-launches"),
    *("--show-backtrace", "no", "--print-limit", "1000"),
    # The compilers that Triton starts run no kernels, and importing torch takes a while.
    *("--target-processes", "application-only", "--launch-timeout", "300"),
)
OPTIONS_OF_TOOL = {
    # Allocations apart from each other; and PyTorch asks for symbols that a driver may lack, which is no error here.
    "memcheck": ("--padding", "128", "--report-api-errors", "no"),
}
LIBRARY = "libsanitizer-collection.so"
HELP = "install the CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`, or give its path as COMPUTE_SANITIZER"


# In the process that runs kernels


def run_cases(
    device: str, kernels: list[str] | None, quick: bool, aloud: bool = False, share: tuple[int, int] = (0, 1)
) -> Iterator[Ran]:
    """Run cases one after the other.

    Args:
        aloud: say on standard output which one is running, and what came of it.
        share: (i, n) for every nth case, from the ith on.
    """
    import sanitizer_cases

    chosen = [case for case in sanitizer_cases.cases(quick) if not kernels or case.kernel in kernels]
    for case in chosen[share[0] :: share[1]]:
        if aloud:
            print(case_line(case.kernel, case.shape), flush=True)
        try:
            case.run(device)
            outcome = RIGHT
        except Exception as error:  # the next case may still say something
            outcome = f"WRONG: {type(error).__name__}: {str(error)[:300]}"
        if device == "cuda":
            torch.cuda.synchronize()
        if aloud:
            print(outcome_line(outcome), flush=True)
        yield Ran(case.kernel, case.shape, outcome)


def poison_outputs() -> None:
    """From now on memory that torch.empty and its like return holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def in_this_process(args: argparse.Namespace) -> int:
    """The exit status."""
    if args.under != "initcheck":
        poison_outputs()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    found = Output(list(run_cases(device, args.kernel, args.quick, bool(args.under), args.share)), total=0)
    if args.under:
        return 0  # whoever started this has read the lines
    return report(found, f"{device}, without a tool, {time.monotonic() - start:.0f} s")


# Under compute-sanitizer


def find_sanitizer() -> list[str]:
    """The command, with the folder of its libraries where that is another one."""
    named = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    for path in [Path(named)] if named else _usual_places():
        if path.is_file():
            libraries = path.parents[1] / "lib"  # where the wheel has them
            return [str(path), *(("--injection-path", str(libraries)) if (libraries / LIBRARY).is_file() else ())]
    raise SystemExit(f"compute-sanitizer is not on this machine: {HELP}")


def _usual_places() -> Iterator[Path]:
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            yield Path(root) / "bin" / "compute-sanitizer"
            yield Path(root) / "compute-sanitizer" / "compute-sanitizer"
    for folder in sys.path:
        yield Path(folder) / "nvidia" / "cuda_sanitizer_api" / "bin" / "compute-sanitizer"
        yield from Path(folder).glob("nvidia/cu*/bin/compute-sanitizer")


def under(tool: str, kernels: list[str] | None, args: argparse.Namespace, share: tuple[int, int]) -> Output:
    """Run this file under a tool, or under none, in one process; its lines are passed on as they come."""
    command = [sys.executable, str(Path(__file__)), "--under", tool, "--share", *map(str, share)]
    command += ["--quick"] * args.quick + (["--kernel", *kernels] if kernels else [])
    environment = dict(os.environ)
    if tool != NO_TOOL:
        command = [*find_sanitizer(), "--tool", tool, *OPTIONS, *OPTIONS_OF_TOOL.get(tool, ()), *command]
        # Every tensor an allocation of its own: within PyTorch's large ones the tools see no borders.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = []
    with started:
        assert started.stdout is not None
        for line in started.stdout:
            lines.append(line)
            if not line.startswith((CASE, OUTCOME + RIGHT)):
                print(line, end="", flush=True)
    found = parse(lines)
    if tool == NO_TOOL:
        found.total = 0 if started.returncode == 0 else None
    return found


def in_processes(args: argparse.Namespace) -> int:
    """The exit status."""
    import sanitizer_cases

    groups = [[k] for k in args.kernel or [*sanitizer_cases.CANONICAL, *sanitizer_cases.TILED]]
    status = 0
    for tool in args.tool or [NO_TOOL]:
        start = time.monotonic()
        for group in groups if args.apart else [args.kernel]:
            with ThreadPoolExecutor(args.jobs) as pool:
                shares = [(i, args.jobs) for i in range(args.jobs)]
                found = together(pool.map(lambda share: under(tool, group, args, share), shares))  # noqa: B023
            status |= report(found, f"{tool}, {time.monotonic() - start:.0f} s")
    return status


def report(found: Output, how: str) -> int:
    """Print the table; the exit status."""
    print("\n".join(table(list(rows(found)))))
    for case in found.cases:
        for line in [case.outcome] * (case.outcome != RIGHT) + [str(r) for r in case.records[:5]]:
            print(f"{case.kernel}, {case.shape}: {line}")
    for line in (*found.trouble, *map(str, found.outside)):
        print(line)
    if found.total is None:
        print("no summary was printed: compute-sanitizer did not work, or a process ended before its time")
    wrong = sum(c.wrong for c in found.cases)
    errors = "an unknown number of" if found.total is None else found.total
    print(f"{len(found.cases)} cases, {wrong} of them wrong or with errors, {errors} errors in all ({how})")
    return 0 if found.clean else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="+", choices=TOOLS, help="run under these tools of compute-sanitizer")
    parser.add_argument("--kernel", nargs="+", help="run these alone, by their names in the table")
    parser.add_argument("--quick", action="store_true", help="fewer dtypes and configurations")
    parser.add_argument("--apart", action="store_true", help="with --tool: a process for each kernel")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side, each with its share")
    parser.add_argument("--under", choices=(*TOOLS, NO_TOOL), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args()
    return in_processes(args) if args.tool or args.jobs > 1 else in_this_process(args)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
