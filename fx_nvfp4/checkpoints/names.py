"""Where a checkpoint tensor belongs: its parameter, and the expert and rows in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>w[123]|(?:gate|up|down)_proj)\.(?P<leaf>weight|bias)"
)
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
# Scales of an FP8 KV cache, as ModelOpt and compressed-tensors name them.
_KV_SCALE = re.compile(r".+\.(k|v)_scale|.+\.(k|v)_proj\.output_scale")


@dataclass(frozen=True)
class Place:
    """A parameter of the model, or part of it: one expert's weight, or the gate or up rows of it."""

    parameter: str
    expert: int | None = None
    half: str | None = None

    def rows(self, interleaved: bool, count: int) -> slice:
        """The output rows, of count in all, that belong to this place."""
        if self.half is None:
            return slice(None)
        if interleaved:
            return slice(0 if self.half == "gate" else 1, None, 2)
        return slice(0, count // 2) if self.half == "gate" else slice(count // 2, None)


class Names:
    """Maps checkpoint names to places.

    Args:
        rename: transformers' renaming of checkpoint names.
        parameters: the names that the model has.
        base_prefix: name of the base model inside it; checkpoints of the base model leave it out.
    """

    def __init__(self, rename: Callable[[str], str], parameters: Collection[str], base_prefix: str) -> None:
        self._rename, self._parameters, self._prefix = rename, parameters, base_prefix

    def place(self, name: str) -> Place | None:
        """Where the tensor of that name (a weight, bias, buffer) belongs; None: nowhere in this model."""
        renamed = self._rename(name)
        for candidate in (renamed, f"{self._prefix}.{renamed}", renamed.removeprefix(f"{self._prefix}.")):
            place = self._exact(candidate)
            if place is not None:
                return place
        return None

    def _exact(self, name: str) -> Place | None:
        if name in self._parameters:
            return Place(name)
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        suffix = "" if match["leaf"] == "weight" else "_bias"
        expert, role = int(match["index"]), _ROLES[match["projection"]]
        fused, single = (f"{match['experts']}.{p}_proj{suffix}" for p in ("gate_up", role))
        if role in ("gate", "up") and fused in self._parameters:
            return Place(fused, expert, role)
        return Place(single, expert) if single in self._parameters else None


def is_kv_scale(name: str) -> bool:
    """Whether a tensor is a scale of a quantised KV cache."""
    return _KV_SCALE.fullmatch(name) is not None


def layer_index(name: str) -> int:
    """The number of the decoder layer that a tensor is of, -1 if it is of none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def sibling(name: str, expert: int) -> str:
    """The name of the same tensor of another expert."""
    return re.sub(r"(\.experts)\.\d+\.", rf"\1.{expert}.", name)
