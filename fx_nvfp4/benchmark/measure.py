"""Times every way, one after the other, so that one model is in memory at a time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from ..attention import GROUPED, group_queries
from ..layers import compile_layers, uncompile_layers
from .loading import Loading, measured_load, model_bytes, release
from .recorded import Recorded
from .timing import time_generation
from .ways import WAYS, Way, experts_of

SCHEMA = 3  # of Study.to_dict(); a change that breaks readers counts it up


@dataclass(frozen=True)
class Settings:
    """What is generated.

    Attributes:
        tokens: lengths of the prompts, each timed on its own.
        new_tokens: steps of decoding.
        batch: numbers of prompts at a time, each timed on its own.
        repeats: generations that are timed, after one that compiles.
        activations: "checkpoint", or "none" to run the packed way weight-only.
        mode: torch.compile's, for all ways.
        ways: names in :data:`ways.WAYS`.
        by_layer: compile the layers, which are alike, and not the model as a whole; for all ways.
        record: "steps" of decoding, or "all" passes, prefill too: each is one CUDA graph; for all ways, on a GPU.
        attention: transformers' name of an implementation, or "sdpa_grouped" (:func:`fx_nvfp4.group_queries`), for all
            ways; "" for what the model has by itself.
    """

    tokens: Sequence[int] = (128, 1024)
    new_tokens: int = 32
    batch: Sequence[int] = (1,)
    repeats: int = 3
    activations: str = "checkpoint"
    mode: str = "default"
    ways: Sequence[str] = tuple(WAYS)
    by_layer: bool = False
    record: str = ""
    attention: str = ""

    def __post_init__(self) -> None:
        for name, value in (("new_tokens", self.new_tokens), ("repeats", self.repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.ways or not set(self.ways) <= set(WAYS):
            raise ValueError(f"ways must be of {list(WAYS)}, got {list(self.ways)}")
        for name, values in (("tokens", self.tokens), ("batch", self.batch)):
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {list(values)}")
        if self.record not in ("", "steps", "all"):
            raise ValueError(f'record must be "steps" or "all", got {self.record!r}')
        try:
            graphs = torch._inductor.list_mode_options(self.mode).get("triton.cudagraphs")
        except RuntimeError as error:
            raise ValueError(f"mode: {error}") from error
        if self.record and graphs:
            raise ValueError(f"mode {self.mode} records CUDA graphs by itself (cudagraphs={graphs}): give no record")


@dataclass(frozen=True)
class Row:
    """One way on so many prompts of one length.

    Attributes:
        way: see :mod:`ways`.
        batch: prompts at a time.
        tokens: of a prompt.
        prefill, decode: median seconds of the forward pass over the prompts, and over one new token each.
        prefill_least, decode_least: the least; on a machine that others use it says more.
        first: seconds of the first generation, compilation included.
        size: bytes of the model's parameters and buffers.
        peak: most bytes that were allocated on a CUDA device from the first generation on, the model and what CUDA
            graphs keep included; 0 elsewhere.
    """

    way: str
    batch: int
    tokens: int
    prefill: float
    prefill_least: float
    decode: float
    decode_least: float
    first: float
    size: int
    peak: int


@dataclass(frozen=True)
class Study:
    """All rows, what loading the checkpoint took, and what was measured where."""

    rows: list[Row]
    loading: Loading
    model: str
    settings: Settings
    device: str
    torch: str

    def row(self, way: str, batch: int, tokens: int) -> Row | None:
        """None if that was not measured."""
        return next((r for r in self.rows if (r.way, r.batch, r.tokens) == (way, batch, tokens)), None)

    @property
    def prompts(self) -> list[tuple[int, int]]:
        """(batch, tokens) of every measurement, in order."""
        return list(dict.fromkeys((r.batch, r.tokens) for r in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


@torch.no_grad()
def measure(
    folder: Path,
    settings: Settings,
    device: torch.device,
    name: str = "",
    progress: Callable[[Study], None] = lambda study: None,
) -> Study:
    """Time a checkpoint in bfloat16; progress sees what there is after each row."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    study: Study | None = None
    for way in (WAYS[name] for name in settings.ways):
        model, loading = measured_load(folder, device, settings.activations, way.prepack)
        study = study or Study([], loading, name or folder.name, settings, where, torch.__version__)
        way.convert(model)
        if settings.attention:
            attend(model, settings.attention)
        for batch, tokens in itertools.product(settings.batch, settings.tokens):
            study.rows.append(_time(model, way, batch, tokens, settings, device))
            progress(study)
        del model
        torch._dynamo.reset()  # gives back what CUDA graphs hold
        release(device)
    assert study is not None  # there is a way: Settings looks
    return study


def attend(model: Any, implementation: str) -> None:
    """Let a model attend by an implementation; ValueError as group_queries says."""
    if implementation == GROUPED:
        group_queries(model)
    else:
        model.set_attn_implementation(implementation)


def _time(model: Any, way: Way, batch: int, tokens: int, settings: Settings, device: torch.device) -> Row:
    torch._dynamo.reset()  # each length is compiled for itself: none gets code for sizes of any kind
    release(device)
    forward = model.forward
    try:
        _compile(model, way, settings)
        prompt = _prompt(model, batch, tokens, device)
        with experts_of(way, model):
            times = time_generation(model, prompt, settings.new_tokens, settings.repeats)
    finally:
        model.forward = forward
        if settings.by_layer:
            uncompile_layers(model)
    return Row(
        way.name,
        batch,
        tokens,
        prefill=statistics.median(times.prefill),
        prefill_least=min(times.prefill),
        decode=statistics.median(times.decode),
        decode_least=min(times.decode),
        first=times.first,
        size=model_bytes(model),
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def _compile(model: Any, way: Way, settings: Settings) -> None:
    how: dict[str, Any] = {
        "backend": way.backend,
        "options": {**torch._inductor.list_mode_options(settings.mode), **dict(way.options)},
    }
    if settings.by_layer:
        compile_layers(model, **how)
    else:
        model.forward = torch.compile(model.forward, **how)
    if settings.record:
        model.forward = Recorded(model.forward, prompts=settings.record == "all")


def _prompt(model: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
