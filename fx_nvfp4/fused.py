"""Experts fused into one module of 3-D packed weights, what :func:`fx_nvfp4.prepare` puts in place of their list."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .activation import parse
from .tensor import NVFP4Weight

# layout -> the parameters that hold up products, gate first
UP_NAMES = {
    "separate": ("gate_proj", "up_proj"),
    "concatenated": ("gate_up_proj",),
    "interleaved": ("gate_up_proj",),
    "plain": ("up_proj",),
}
DOWN_NAME = "down_proj"
BIAS = "_bias"


class FusedExperts(nn.Module):
    """E experts as stacked packed weights, computed by one ``torch.ops.fx_nvfp4.moe`` per call.

    Parameters are ``gate_proj`` and ``up_proj``, or ``gate_up_proj``, or ``up_proj`` alone, [E, I, K]; ``down_proj``
    [E, H, I]; and, where experts have them, biases of the same names with ``_bias`` appended, [E, I] and [E, H].

    Args:
        weights: packed 3-D weights by those names.
        biases: stacked biases by the names of their weights. The op has no gradient for them: in training mode they
            must be frozen, else the forward raises.
        activation: expression over g (gate) and u (up), see :mod:`fx_nvfp4.activation`.
        layout: "separate", "concatenated", "interleaved" or "plain", how the up weights hold gate and up rows.
        weighted: "output": the routing weight multiplies the result; "input": it multiplies x.

    Raises:
        ValueError: names do not fit the layout, the activation is no expression, or what gate and up round alike
            differs.
    """

    def __init__(
        self,
        weights: Mapping[str, NVFP4Weight],
        biases: Mapping[str, Tensor],
        activation: str,
        layout: str,
        weighted: str = "output",
    ) -> None:
        super().__init__()
        names = (*UP_NAMES[layout], DOWN_NAME)
        if set(weights) != set(names) or not set(biases) <= set(names):
            raise ValueError(
                f"FusedExperts: layout {layout!r} has the weights {names}, got {sorted(weights)} "
                f"and biases of {sorted(biases)}"
            )
        parse(activation)
        _check_rounding(weights, UP_NAMES[layout])
        self.down_proj: NVFP4Weight
        self.down_proj_bias: Tensor | None
        self.activation, self.layout, self.weighted = activation, layout, weighted
        for name in names:
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))
        for name in names:
            bias = biases.get(name)
            stacked = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
            self.register_parameter(name + BIAS, stacked)

    def __len__(self) -> int:
        return self.down_proj.shape[0]

    def extra_repr(self) -> str:
        (e, h, i), k = self.down_proj.shape, self._up()[0].shape[-1]
        return f"{e} experts, {k} -> {i} -> {h}, {self.activation}, {self.layout}, {self.down_proj.describe()}"

    def _up(self) -> list[NVFP4Weight]:
        return [getattr(self, name) for name in UP_NAMES[self.layout]]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, K], ids [T, A] (a slot whose id is outside 0..E-1 adds nothing), weights [T, A] -> [T, H]."""
        up = self._up()
        learning = [n for n, p in self.named_parameters() if p.requires_grad]
        if learning and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"FusedExperts: {learning[0]} requires a gradient, which the fused op does not compute. Freeze it with "
                "requires_grad_(False), or train the experts before prepare()"
            )
        bias = [getattr(self, name + BIAS) for name in UP_NAMES[self.layout]]
        down = self.down_proj
        static = up[0].act_scale is not None
        return torch.ops.fx_nvfp4.moe(
            x,
            ids,
            weights,
            [w.qdata for w in up],
            [w.block_scale for w in up],
            [w.global_scale for w in up],
            down.qdata,
            down.block_scale,
            down.global_scale,
            self.activation,
            self.layout,
            None if bias[0] is None else bias,
            self.down_proj_bias,
            [w.act_scale for w in up] if static else None,
            down.act_scale,
            up[0].activations,
            down.activations,
            next((w.dialect for w in (*up, down) if w.activations != "none"), down.dialect),
            self.weighted,
        )


def _check_rounding(weights: Mapping[str, NVFP4Weight], up: tuple[str, ...]) -> None:
    """Raise where the weights ask for more than the op has: one mode for what enters gate and up, one dialect."""
    modes = {name: weights[name].activations for name in up}
    dialects = {name: w.dialect for name, w in weights.items() if w.activations != "none"}
    for what, found in (("activations of gate and up", modes), ("dialects", dialects)):
        if len(set(found.values())) > 1:
            raise ValueError(f"FusedExperts: {what} differ, {found}: the op rounds them alike; quantise them alike")
