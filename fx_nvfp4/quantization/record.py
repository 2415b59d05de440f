"""What quantize_ did to a model, and what it left alone."""

from __future__ import annotations

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
        for reason in dict.fromkeys(self.left_alone.values()):
            names = [name for name, r in self.left_alone.items() if r == reason]
            lines.append(f"left alone ({reason}): {shorten(names)}")
        return "\n".join(lines)


def shorten(names: list[str]) -> str:
    """The first names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
