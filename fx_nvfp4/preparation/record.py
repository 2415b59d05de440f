"""What prepare did to a model, and what it left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


class Unsuited(Exception):  # noqa: N818 - an answer, not an error: caught where the record is written
    """Something that cannot be prepared: the reason, and what would make it possible."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


@dataclass(frozen=True)
class FusedList:
    """A list of experts that became one module of 3-D packed weights.

    Attributes:
        where: path of the list, now of the :class:`fx_nvfp4.fused.FusedExperts`.
        parent: path of the module whose forward was rewritten around it.
        experts, top_k: number of experts, and of those that a token chooses.
        activation: expression over g (gate) and u (up).
        names: new parameter name -> its names before, expert by expert (of biases and of packed tensors held as
            one parameter; a weight spelled in buffers is named by its codes).
    """

    where: str
    parent: str
    experts: int
    top_k: int
    activation: str
    names: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self.where}: {self.experts} experts, top {self.top_k}, {self.activation}: one fused module"


@dataclass(frozen=True)
class LeftAlone:
    """Experts that stay as they are."""

    where: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f". {self.advice}" if self.advice else "")


@dataclass
class Preparation:
    """The record of one call of :func:`fx_nvfp4.prepare`; prints as text, its fields are plain lists."""

    fused: list[FusedList] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    switched: list[str] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def names(self) -> dict[str, tuple[str, ...]]:
        """New parameter name -> the names before, one an expert: to translate state dicts and optimisers."""
        return {new: old for f in self.fused for new, old in f.names.items()}

    def __str__(self) -> str:
        lines = [
            f"prepare: {len(self.fused)} lists of experts fused, {len(self.converted)} torchao tensors converted, "
            f"{len(self.left_alone)} left alone"
        ]
        lines += [f"fused: {f}" for f in self.fused]
        lines += [f"converted: {name}" for name in self.converted]
        lines += [f"experts implementation: {text}" for text in self.switched]
        lines += [f"left alone: {a}" for a in self.left_alone]
        return "\n".join(lines)


def join(*parts: str) -> str:
    """A dotted path of those parts that are not empty."""
    return ".".join(p for p in parts if p)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put module at path, whatever container holds it."""
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = module
