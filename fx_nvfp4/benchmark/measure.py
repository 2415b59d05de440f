"""Times every way, one after the other, so that one model is in memory at a time."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from ..checkpoint import load
from .timing import time_generation
from .ways import WAYS, Way

SCHEMA = 1  # of Study.to_dict(); a change that breaks readers counts it up


@dataclass(frozen=True)
class Settings:
    """What is generated.

    Attributes:
        tokens: lengths of the prompts, each timed on its own.
        new_tokens: steps of decoding.
        batch: prompts at a time.
        repeats: generations that are timed, after one that compiles.
        activations: "checkpoint", or "none" to run the packed way weight-only.
        mode: torch.compile's, for all ways.
        ways: names in :data:`ways.WAYS`.
    """

    tokens: Sequence[int] = (128, 1024)
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 3
    activations: str = "checkpoint"
    mode: str = "default"
    ways: Sequence[str] = tuple(WAYS)

    def __post_init__(self) -> None:
        for name, value in (("new_tokens", self.new_tokens), ("batch", self.batch), ("repeats", self.repeats)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.ways or not set(self.ways) <= set(WAYS):
            raise ValueError(f"ways must be of {list(WAYS)}, got {list(self.ways)}")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens must be at least 1, got {list(self.tokens)}")


@dataclass(frozen=True)
class Row:
    """One way on prompts of one length.

    Attributes:
        way: see :mod:`ways`.
        tokens: of a prompt.
        prefill, decode: median seconds of the forward pass over the prompts, and over one new token each.
        prefill_least, decode_least: the least; on a machine that others use it says more.
        first: seconds of the first generation, compilation included.
        size: bytes of the model's parameters and buffers.
    """

    way: str
    tokens: int
    prefill: float
    prefill_least: float
    decode: float
    decode_least: float
    first: float
    size: int


@dataclass(frozen=True)
class Study:
    """All rows, and what was measured where."""

    rows: list[Row]
    model: str
    settings: Settings
    device: str
    torch: str

    def row(self, way: str, tokens: int) -> Row:
        """KeyError if that was not measured."""
        found = [r for r in self.rows if (r.way, r.tokens) == (way, tokens)]
        if not found:
            raise KeyError(f"{way}, {tokens} tokens")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


@torch.no_grad()
def measure(
    folder: Path,
    settings: Settings,
    device: torch.device,
    name: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> Study:
    """Time a checkpoint in bfloat16; each finished row is told to progress."""
    rows = []
    for way in (WAYS[name] for name in settings.ways):
        model = load(folder, device, torch.bfloat16, activations=settings.activations, progress=False)
        way.convert(model)
        for tokens in settings.tokens:
            rows.append(_time(model, way, tokens, settings, device))
            progress(f"{way.name}, {tokens} tokens: {rows[-1].first:.1f} s for the first generation")
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Study(rows, name or folder.name, settings, where, torch.__version__)


def _time(model: Any, way: Way, tokens: int, settings: Settings, device: torch.device) -> Row:
    torch._dynamo.reset()  # each length is compiled for itself: none gets code for sizes of any kind
    options = {**torch._inductor.list_mode_options(settings.mode), **dict(way.options)}
    forward, model.forward = model.forward, torch.compile(model.forward, backend=way.backend, options=options)
    try:
        prompt = _prompt(model, settings.batch, tokens, device)
        times = time_generation(model, prompt, settings.new_tokens, settings.repeats)
    finally:
        model.forward = forward
    return Row(
        way.name,
        tokens,
        prefill=statistics.median(times.prefill),
        prefill_least=min(times.prefill),
        decode=statistics.median(times.decode),
        decode_least=min(times.decode),
        first=times.first,
        size=_size(model),
    )


def _prompt(model: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _size(model: torch.nn.Module) -> int:
    """A packed parameter counts with the tensors that it consists of."""
    parts = []
    for tensor in (*model.parameters(), *model.buffers()):
        names = getattr(tensor.data, "tensor_data_names", None)
        parts += [tensor] if names is None else [getattr(tensor.data, name) for name in names]
    return sum(part.numel() * part.element_size() for part in parts)
