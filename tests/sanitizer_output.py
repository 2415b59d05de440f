"""What compute-sanitizer prints about a run of tests/sanitize.py, read into counts for each case.

The tool prints a record for each error, its first line not indented, and at the end how many there were::

    ========= Invalid __global__ read of size 2 bytes
    =========     at grouped_kernel+0x1c0 in tile.py:31
    =========     by thread (5,0,0) in block (2,0,0)
    ...
    ========= ERROR SUMMARY: 3 errors
    ========= ERROR SUMMARY: 1 errors were not printed. Use --print-limit option to adjust the number of printed errors

racecheck's last line is ``RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)``. Between the records are the
lines of the program itself, which names the case that it is about to run, and what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

PREFIX = "========="
CASE, OUTCOME = "case: ", "outcome: "
RIGHT = "right"
# Lines of the tool that are no error of a kernel: what it is, what it was told, and what came of the program.
_REMARKS = ("COMPUTE-SANITIZER", "LEAK SUMMARY", "ERROR SUMMARY", "RACECHECK SUMMARY")
_TROUBLE = (
    "Target application",
    "couldn't find exit code",
    "Unable to",
    "Internal Sanitizer",
    "process didn't terminate",
)
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: (\d+) hazards? displayed")
_FUNCTION = re.compile(r"([\w.$]+)(?:<.*>)?(?:\(.*\))?\+0x[0-9a-f]+")
_OLD_FUNCTION = re.compile(r"at 0x[0-9a-f]+ in (?:\S+:\d+:)?(\w+)")


def case_line(kernel: str, shape: str) -> str:
    return f"{CASE}{kernel} | {shape}"


def outcome_line(outcome: str) -> str:
    """On one line whatever it says."""
    return f"{OUTCOME}{' '.join(outcome.split())}"


@dataclass
class Record:
    """One error, as the tool prints it."""

    lines: list[str]

    def __str__(self) -> str:
        where = f" in {self.function}" if self.function else ""
        return f"{self.lines[0]}{where}"

    @property
    def function(self) -> str:
        """The kernel's function, "" where the record names none."""
        for line in self.lines:
            found = _FUNCTION.search(line) or _OLD_FUNCTION.search(line)
            if found:
                return found[1]
        return ""


@dataclass
class Ran:
    """A case, what came of it, and the errors that were printed while it ran."""

    kernel: str
    shape: str
    outcome: str = "did not end"
    records: list[Record] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.outcome != RIGHT or bool(self.records)

    @property
    def functions(self) -> list[str]:
        """The kernels' functions that errors are in."""
        return sorted({r.function for r in self.records if r.function})


@dataclass
class Output:
    """A whole run. `total` is the tool's own count of errors; None where it printed none, and so has not worked."""

    cases: list[Ran] = field(default_factory=list)
    outside: list[Record] = field(default_factory=list)  # before the first case
    trouble: list[str] = field(default_factory=list)  # what the tool says of itself and of the program
    total: int | None = None

    @property
    def elsewhere(self) -> int:
        """Errors that the tool counts and no case has: those outside of cases, and those not printed."""
        return max(0, (self.total or 0) - sum(len(c.records) for c in self.cases))

    @property
    def clean(self) -> bool:
        return self.total == 0 and bool(self.cases) and not self.trouble and not any(c.wrong for c in self.cases)


def parse(lines: Iterable[str]) -> Output:
    """Read what program and tool have printed."""
    output = Output()
    record: Record | None = None
    for line in lines:
        if not line.startswith(PREFIX):
            _read_program(output, line)
            continue
        text = line.removeprefix(PREFIX).removeprefix(" ").rstrip()
        if not text.strip():
            record = None
        elif record is not None and text.startswith(" "):
            record.lines.append(text.strip())
        elif not _read_remark(output, text.strip()):
            record = Record([text.strip()])
            (output.cases[-1].records if output.cases else output.outside).append(record)
    return output


def _read_program(output: Output, line: str) -> None:
    if line.startswith(CASE):
        kernel, _, shape = line.removeprefix(CASE).strip().partition(" | ")
        output.cases.append(Ran(kernel, shape))
    elif line.startswith(OUTCOME) and output.cases:
        output.cases[-1].outcome = line.removeprefix(OUTCOME).strip()


def _read_remark(output: Output, text: str) -> bool:
    """Whether a line that begins something is no error of a kernel."""
    summary = _SUMMARY.match(text)
    if summary:
        output.total = (output.total or 0) + int(summary[1] or summary[2])
    if text.startswith(_REMARKS):
        return True
    if any(trouble in text for trouble in _TROUBLE):
        output.trouble.append(text)
        return True
    return False


def together(outputs: Iterable[Output]) -> Output:
    """Of several runs one; what it counts is unknown where one of them has not counted."""
    whole = Output(total=0)
    for output in outputs:
        whole.cases += output.cases
        whole.outside += output.outside
        whole.trouble += output.trouble
        whole.total = None if None in (whole.total, output.total) else whole.total + output.total
    return whole


def rows(output: Output) -> Iterator[tuple[str, str, str, str]]:
    """kernel, shape, result, errors, the header first."""
    yield "kernel", "shape", "result", "errors"
    for case in output.cases:
        where = f" ({', '.join(case.functions)})" if case.functions else ""
        yield case.kernel, case.shape, case.outcome[:80], f"{len(case.records)}{where}"
    if output.elsewhere:
        yield "(none)", "outside of cases, or not printed", "", str(output.elsewhere)
