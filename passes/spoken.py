"""The report in the model's own words: graph inputs by the names of the parameters and buffers that they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Node

from fx_nvfp4.report import Report

# As AOTAutograd numbers what a graph is given.
_INPUT = re.compile(r"\b(?:arg\d+_\d+|primals_\d+)\b")


def spoken(report: Report, names: Mapping[Node, str]) -> Report:
    """The report with the graph inputs in its texts called what ``names`` calls them, where it does."""
    known = {node.name: name for node, name in names.items()}

    def say(text: str) -> str:
        return _INPUT.sub(lambda found: known.get(found[0], found[0]), text)

    return replace(
        report,
        matched=[replace(m, notes=tuple(map(say, m.notes))) for m in report.matched],
        refused=[replace(r, reason=say(r.reason), advice=say(r.advice)) for r in report.refused],
        blocks=[replace(b, reason=say(b.reason), advice=say(b.advice)) for b in report.blocks],
        notes=list(map(say, report.notes)),
    )
