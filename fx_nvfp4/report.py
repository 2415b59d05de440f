"""What was emulated, what was not, and why: the record that every compilation leaves."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from .report_table import render

SCHEMA = 1  # of to_dict(); a change that breaks readers counts it up
ROOT = "(model)"  # how a site outside of any submodule is called


class NVFP4Warning(UserWarning):
    """A packed weight is not emulated as NVFP4, or far slower than it could be, or a part of the format is left out."""


class NotEmulatedError(RuntimeError):
    """As :class:`NVFP4Warning`, under ``options={"strict": True}``."""


@dataclass(frozen=True)
class Match:
    """One matrix product that runs as an NVFP4 op.

    Attributes:
        where: module path, e.g. "model.layers.0.mlp.experts".
        weight: name of the codes or of the packed parameter, as far as the graph tells.
        op: linear, batched, indexed, grouped, input_grad or moe (see :mod:`fx_nvfp4.ops`).
        experts: number of experts, 0 for a plain linear.
        n, k: output and input features of one weight.
        x: shape of the left operand; symbolic sizes by their names.
        dtype: dtype of the activations and of the result.
        activations: "W4A16", "W4A4 static", "W4A4 static per-expert" or "W4A4 dynamic", then the dialect.
        activations_from: what decided so: "tensor", "spelled" by the model (", as written" where its own roundings are
            kept), "option", or "" where activations are not quantised.
        source: "packed tensor", or the exact formula by which the graph spelled the dequantisation.
        notes: what a user may want to change, e.g. codes that are laid out anew at each call.
        rows: rows of x that one weight is expected to multiply, as the kernels estimate it; 0 if not known.
        device: where it runs, "cpu" or "cuda".
        config: kernel and launch parameters, and how they were chosen.
        milliseconds: measured time of that configuration; None if nothing was measured.
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
    rows: int = 0
    device: str = ""
    config: str = ""
    milliseconds: float | None = None
    activations_from: str = ""

    def row(self) -> tuple[str, ...]:
        weight = f"{self.experts} x " if self.experts else ""
        shapes = f"{weight}{self.n} x {self.k}", f"{self.x} {self.dtype}"
        decided = f" ({self.activations_from})" if self.activations_from else ""
        return self.where, self.op, *shapes, self.activations + decided, self.source


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
        weights: names of the packed weights that a lifted block took in.
    """

    where: str
    lifted: bool
    experts: int = 0
    top_k: int = 0
    activation: str = ""
    style: str = ""
    reason: str = ""
    advice: str = ""
    weights: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.summary()}"

    def summary(self) -> str:
        """What became of it, without its name."""
        if not self.lifted:
            return self.reason + (f". {self.advice}" if self.advice else "")
        return f"top {self.top_k} of {self.experts} experts, {self.activation}, from {self.style} products"


@dataclass(frozen=True)
class GraphBreak:
    """A line at which Dynamo ended a graph, or gave a function up.

    Attributes:
        file, line, code: the line of the user's model.
        reason: Dynamo's, in one line.
        hints: Dynamo's, what would make it one graph.
        hides: packed weights that run outside of all graphs because of it, as far as the call stack tells.
    """

    file: str
    line: int
    code: str
    reason: str
    hints: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}{f' `{self.code}`' if self.code else ''}: {self.reason}"


@dataclass
class Cost:
    """Seconds.

    Attributes:
        stages: of the pass, by what it did: "recognise", "lift", "rewrite", "verify", ...
        compilation: of the backend around it, the pass included: AOTAutograd, Inductor and its code generation.
    """

    stages: dict[str, float] = field(default_factory=dict)
    compilation: float = 0.0

    @property
    def total(self) -> float:
        """The whole pass."""
        return sum(self.stages.values())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def add(self, other: Cost) -> None:
        for name, seconds in other.stages.items():
            self.stages[name] = self.stages.get(name, 0.0) + seconds
        self.compilation += other.compilation


@dataclass
class Report:
    """Sites of one or more compiled graphs. Prints as a table; its fields are plain lists.

    Attributes:
        matched, refused, blocks: the sites.
        breaks: where Dynamo ended a graph; only :func:`fx_nvfp4.explain` fills it.
        notes: what concerns no single site.
        graphs: number of compiled graphs.
        cost: time that the pass took.
    """

    matched: list[Match] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: list[GraphBreak] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    @property
    def seconds(self) -> float:
        """Time that the pass took."""
        return self.cost.total

    @property
    def weights(self) -> set[str]:
        """Names of the packed weights that run as NVFP4."""
        return {m.weight for m in self.matched} | {w for b in self.blocks if b.lifted for w in b.weights}

    def extend(self, other: Report) -> None:
        """Add the sites of another graph."""
        self.matched += other.matched
        self.refused += other.refused
        self.blocks += other.blocks
        self.breaks += other.breaks
        self.notes += [n for n in other.notes if n not in self.notes]
        self.graphs += other.graphs
        self.cost.add(other.cost)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; "schema" says of which layout."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Report:
        """Back from :meth:`to_dict`.

        Raises:
            ValueError: it is of another schema.
        """
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"a report of schema {raw.get('schema')!r}: this fx_nvfp4 reads schema {SCHEMA}")
        return cls(
            matched=[_record(Match, m) for m in raw["matched"]],
            refused=[_record(Refusal, r) for r in raw["refused"]],
            blocks=[_record(Block, b) for b in raw["blocks"]],
            notes=list(raw["notes"]),
            graphs=raw["graphs"],
            breaks=[_record(GraphBreak, b) for b in raw["breaks"]],
            cost=_record(Cost, raw["cost"]),
        )

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls.from_dict(json.loads(text))

    def table(self, full: bool = False) -> str:
        """The report as text.

        Args:
            full: a line for every site, with its weight and kernel; otherwise equal sites of repeated layers share
                one, as "model.layers.{0..47}.mlp.experts".
        """
        return render(self, full)

    def __str__(self) -> str:
        return self.table()


_Record = TypeVar("_Record")


def _record(kind: type[_Record], raw: Mapping[str, Any]) -> _Record:
    """A dataclass from JSON, whose lists are tuples there."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in raw.items() if name in known})


def module_path(source: str) -> str:
    """Dynamo's source of a module or parameter as a dotted path: "L['self'].layers[0].mlp" -> "layers.0.mlp"."""
    path = re.sub(r"\._(modules|parameters|buffers|orig_mod)\b", "", source)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    path = re.sub(r"^(L|G)\.", "", path)
    return re.sub(r"^(self|fn|mod)(\.|$)", "", path) or ROOT
