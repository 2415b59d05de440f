"""What quantize_ did to a model, and what it left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .config import NVFP4Config


@dataclass
class Quantization:
    """The record of one call of :func:`fx_nvfp4.quantize_`, as ``model.nvfp4_quantization``; prints as text.

    Attributes:
        packed: names of the parameters that were packed.
        left_alone: names of the other parameters with two or more dims, with the reason.
    """

    config: NVFP4Config
    packed: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"quantize_: {len(self.packed)} weights packed, {len(self.left_alone)} left alone; {self.config}"]
        for reason, count in Counter(self.left_alone.values()).items():
            names = [name for name, r in self.left_alone.items() if r == reason]
            lines.append(f"left alone ({reason}): {shorten(names, count)}")
        return "\n".join(lines)


def shorten(names: list[str], count: int | None = None) -> str:
    """The first names, and how many there are."""
    count = len(names) if count is None else count
    return ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
