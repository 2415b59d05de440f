"""What a run measured, and its file."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

import fx_nvfp4

from .shapes import Rates

SCHEMA = 1  # of the file


def _environment() -> dict[str, str]:
    """Versions and the date."""
    packages = ("triton", "transformers", "vllm", "triton_kernels")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "fx_nvfp4": fx_nvfp4.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Cell:
    """One variant on one layer and number of tokens; times in microseconds.

    microseconds: None where it failed, and ``reason`` says why.
    error: relative, against exact products.
    floor: from the rates right after the cell, floor_at_start: from those at the start of the run.
    device_state: see :data:`moe_layer_parts.device_state.FIELDS`.
    """

    shape: str
    variant: str
    format: str
    tokens: int
    microseconds: float | None = None
    error: float | None = None
    floor: float | None = None
    floor_at_start: float | None = None
    experts_hit: float | None = None
    rates: Rates | None = None
    device_state: str = ""
    reason: str = ""

    @property
    def of_floor(self) -> float | None:
        """Which part of the time the floor is."""
        return None if self.microseconds is None or self.floor is None else self.floor / self.microseconds

    def __str__(self) -> str:
        what = f"{self.shape}, {self.tokens} tokens, {self.variant}"
        if self.microseconds is None:
            return f"{what}: - {self.reason}"
        return f"{what}: {self.microseconds:.1f} us, {self.of_floor:.0%} of the floor, error {self.error:.1e}"


@dataclass
class Run:
    """All cells, in the order in which they were measured."""

    device: str
    at_start: Rates
    cells: list[Cell] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=_environment)

    def save(self, file: str | Path) -> None:
        """As JSON."""
        raw = {"schema": SCHEMA, **dataclasses.asdict(self)}
        Path(file).write_text(json.dumps(raw, indent=1) + "\n")

    @classmethod
    def saved(cls, file: str | Path) -> Run:
        """What :meth:`save` wrote; ValueError for another schema."""
        raw = json.loads(Path(file).read_text())
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"{file}: expected schema {SCHEMA} of a run of moe_layer.py, found {raw.get('schema')}")
        cells = [Cell(**{**cell, "rates": cell["rates"] and Rates(**cell["rates"])}) for cell in raw["cells"]]
        return cls(raw["device"], Rates(**raw["at_start"]), cells, raw["environment"])
