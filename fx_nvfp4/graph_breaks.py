"""Where Dynamo ended a graph, and which packed weights that hides from the pass."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import torch

from .lowering import compat
from .report import GraphBreak

_PLACE = re.compile(r"in user code at (.+):(\d+)\n")
_TITLE = re.compile(r"^([^\n]+)\n  Explanation:", re.MULTILINE)
_HINT = re.compile(r"^  Hint: (.+)$", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]+)", line (\d+), in (\S+)', re.MULTILINE)
_LIMIT = re.compile(r"hit config\.(\w+) \((\d+)\)\n +function: '[^']*' \((.+):(\d+)\)\n +last reason: ([^\n]*)")
_SKIPPED = "Skipping the function"
_NO_HELP = ("report an issue", "caused by an earlier graph break")  # in hints that tell a user nothing


@dataclass(frozen=True)
class _Found:
    """A graph break, the frames (file, line) of the call stack that led there, outermost first, and whether Dynamo
    gave the whole function up."""

    graph_break: GraphBreak
    stack: tuple[tuple[str, int], ...]
    skips: bool


class BreakLog:
    """The graph breaks that Dynamo met while :meth:`listen` was open."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], _Found] = {}

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        with compat.graph_break_log(self._add):
            yield

    def breaks(self, model: object, unused: Sequence[str]) -> list[GraphBreak]:
        """All graph breaks, each with those weights of ``unused`` (names in model) that it is likely to hide.

        A break belongs to the innermost module whose code is on its call stack, and a weight is hidden by the break
        that belongs to the closest module around it.
        """
        hides: dict[tuple[str, int], list[str]] = {}
        if isinstance(model, torch.nn.Module):
            owners = self._owners({type(m) for m in model.modules()})
            for name in unused:
                place = next((owners[k] for k in _kinds_around(model, name) if k in owners), None)
                if place is not None:
                    hides.setdefault(place, []).append(name)
        return [
            dataclasses.replace(found.graph_break, hides=tuple(hides.get(place, ())))
            for place, found in self._found.items()
        ]

    def _owners(self, kinds: set[type]) -> dict[type, tuple[str, int]]:
        """Module class -> the break that belongs to it; one that gives a whole function up comes first."""
        owners: dict[type, tuple[str, int]] = {}
        for place, found in sorted(self._found.items(), key=lambda item: not item[1].skips):
            for frame in reversed(found.stack):
                inside = [kind for kind in kinds if _in_code(kind, *frame)]
                for kind in inside:
                    owners.setdefault(kind, place)
                if inside:
                    break
        return owners

    def _add(self, message: str) -> None:
        limit = _LIMIT.search(message)
        if limit:
            self._add_limit(*limit.groups())
            return
        place = _PLACE.search(message)
        if place is None:
            return
        file, line = place[1], int(place[2])
        stack = tuple((f, int(n)) for f, n, _ in _FRAME.findall(message)) or ((file, line),)
        known = self._found.get((file, line))
        if known is None or len(stack) > len(known.stack):
            title, hints = _TITLE.search(message), _HINT.findall(message)
            reason = title[1] if title else message.partition("Reason: ")[2].partition("\n")[0]
            skips = _SKIPPED in message
            if skips:
                reason += ", and its whole function runs uncompiled"
            helpful = tuple(dict.fromkeys(h for h in hints if not any(text in h for text in _NO_HELP)))
            code = linecache.getline(file, line).strip()
            self._found[file, line] = _Found(GraphBreak(_short(file), line, code, reason, helpful), stack, skips)

    def _add_limit(self, option: str, limit: str, file: str, line: str, why: str) -> None:
        """A function that Dynamo recompiled too often: from then on it runs as it is."""
        place = file, int(line)
        code = next(
            (text for n in range(5) if (text := linecache.getline(file, place[1] + n).strip())[:4] == "def "), ""
        )
        reason = f"compiled {limit} times, then given up, as it differs from call to call: {why.strip()}"
        hint = f"raise torch._dynamo.config.{option}, or keep what differs out of what is compiled"
        self._found[place] = _Found(GraphBreak(_short(file), place[1], code, reason, (hint,)), (place,), True)


def _kinds_around(model: torch.nn.Module, name: str) -> Iterator[type]:
    """Classes of the modules around a parameter, the innermost first."""
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        yield type(model.get_submodule(".".join(path[:depth])))


def _short(file: str) -> str:
    """A path relative to the working directory or to site-packages, if it lies there."""
    path = Path(file)
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return file.rpartition("/site-packages/")[2]


def _in_code(kind: type, file: str, line: int) -> bool:
    """Whether a line belongs to a method of a module's class or of its bases, torch.nn.Module's left out."""
    bases = [c for c in kind.__mro__ if issubclass(c, torch.nn.Module) and not c.__module__.startswith("torch.nn.")]
    for method in (m for base in bases for m in vars(base).values()):
        code = getattr(method, "__code__", None)
        if isinstance(code, CodeType) and code.co_filename == file and code.co_firstlineno <= line <= _last_line(code):
            return True
    return False


def _last_line(code: CodeType) -> int:
    inner = [_last_line(c) for c in code.co_consts if isinstance(c, CodeType)]
    return max([code.co_firstlineno, *inner, *(n for _, _, n in code.co_lines() if n is not None)])
