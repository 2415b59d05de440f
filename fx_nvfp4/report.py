"""What was emulated, what was not, and why: the record that every compilation leaves."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field

ROOT = "(model)"  # how a site outside of any submodule is called


class NVFP4Warning(UserWarning):
    """A packed weight is not emulated as NVFP4, or something that belongs to the format is left out."""


class NotEmulatedError(RuntimeError):
    """As :class:`NVFP4Warning`, under ``options={"strict": True}``."""


@dataclass(frozen=True)
class Match:
    """One matrix product that runs as an NVFP4 op.

    Attributes:
        where: module path, e.g. "model.layers.0.mlp.experts".
        weight: name of the codes or of the packed parameter, as far as the graph tells.
        op: linear, batched, indexed or grouped (see :mod:`fx_nvfp4.ops`).
        experts: number of experts, 0 for a plain linear.
        n, k: output and input features of one weight.
        x: shape of the left operand; symbolic sizes by their names.
        dtype: dtype of the activations and of the result.
        activations: "W4A16", "W4A4 static", "W4A4 static per-expert" or "W4A4 dynamic", then the dialect.
        source: "packed tensor", or the exact formula by which the graph spelled the dequantisation.
        notes: what a user may want to change, e.g. codes that are laid out anew at each call.
    """

    where: str
    weight: str
    op: str
    experts: int
    n: int
    k: int
    x: str
    dtype: str
    activations: str
    source: str
    notes: tuple[str, ...] = ()

    def row(self) -> tuple[str, ...]:
        weight = f"{self.experts} x " if self.experts else ""
        shapes = f"{weight}{self.n} x {self.k}", f"{self.x} {self.dtype}"
        return self.where, self.op, *shapes, self.activations, self.source


@dataclass(frozen=True)
class Refusal:
    """Something that holds packed weights and is not emulated.

    Attributes:
        where: module path or node.
        node: the graph node, or "" where there is none.
        reason: which rule did not hold, with what was found.
        advice: what would make it match.
        dequantized: whether the packed weight ends up dense in the graph.
    """

    where: str
    node: str
    reason: str
    advice: str = ""
    dequantized: bool = True

    def __str__(self) -> str:
        node = f" ({self.node})" if self.node else ""
        return f"{self.where}{node}: {self.reason}" + (f". {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Block:
    """A mixture-of-experts block around the products: one op now, or the reason why its products stay apart.

    Attributes:
        where: module path of its first product.
        lifted: whether it runs as one ``fx_nvfp4.moe`` op.
        experts, top_k: number of experts, and of those that a token chooses; 0 if not known.
        activation: expression over g (gate) and u (up), e.g. "silu(g) * u"; "" if not known.
        style: how the model laid out its products, e.g. "grouped", "indexed", "dense".
        reason, advice: of a block that is not lifted, which rule did not hold, and what would make it hold.
    """

    where: str
    lifted: bool
    experts: int = 0
    top_k: int = 0
    activation: str = ""
    style: str = ""
    reason: str = ""
    advice: str = ""

    def __str__(self) -> str:
        if not self.lifted:
            return f"{self.where}: {self.reason}" + (f". {self.advice}" if self.advice else "")
        return (
            f"{self.where}: top {self.top_k} of {self.experts} experts, {self.activation}, from {self.style} products"
        )


@dataclass
class Report:
    """Sites of one or more compiled graphs. Prints as a table; its fields are plain lists."""

    matched: list[Match] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0

    def extend(self, other: Report) -> None:
        """Add the sites of another graph."""
        self.matched += other.matched
        self.refused += other.refused
        self.blocks += other.blocks
        self.notes += [n for n in other.notes if n not in self.notes]
        self.graphs += other.graphs

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        raw = json.loads(text)
        matched = [Match(**{**m, "notes": tuple(m["notes"])}) for m in raw["matched"]]
        refused, blocks = [Refusal(**r) for r in raw["refused"]], [Block(**b) for b in raw["blocks"]]
        return cls(matched, refused, blocks, raw["notes"], raw["graphs"])

    def __str__(self) -> str:
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        lines = [f"nvfp4_emu: {len(self.matched)} NVFP4 products in {graphs}, {len(self.refused)} refused"]
        header = ("module", "op", "weight", "activations in", "format", "recognised from")
        lines += _table([header, *(m.row() for m in self.matched)]) if self.matched else []
        lines += [f"refused: {r}" for r in self.refused]
        lines += [f"{'block' if b.lifted else 'not lifted'}: {b}" for b in self.blocks]
        lines += [f"note: {m.where}: {n}" for m in self.matched for n in m.notes]
        return "\n".join(lines + [f"note: {n}" for n in self.notes])


def module_path(source: str) -> str:
    """Dynamo's source of a module or parameter as a dotted path: "L['self'].layers[0].mlp" -> "layers.0.mlp"."""
    path = re.sub(r"\._(modules|parameters|buffers)\b", "", source)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    path = re.sub(r"^(L|G)\.", "", path)
    return re.sub(r"^(self|fn|mod)(\.|$)", "", path) or ROOT


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
