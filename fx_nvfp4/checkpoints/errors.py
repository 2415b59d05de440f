"""The error of every checkpoint that cannot be loaded as it is."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: the message names file or tensor, what was found, what was expected
    and what to do."""


def mismatch(where: str | Path, found: object, expected: object, fix: str) -> CheckpointError:
    """The error for one file or tensor, in the one wording that all of them share."""
    return CheckpointError(f"{where}: found {found}, expected {expected}; {fix}")
