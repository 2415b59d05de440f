"""Proof by comparison: a prepared forward against the original, with made-up experts and with the real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .record import Unsuited, replace_module
from .recorder import only_rows, replaced_forwards, seeded

Forward = Callable[[nn.Module, Tensor], Any]


def synthetic(experts: int | Tensor, rows: Tensor, hidden: int) -> Tensor:
    """Made-up experts: rows [.., K] -> [.., H], different for every expert (one, or ids [..]) and differentiable."""
    ids = torch.as_tensor(experts, device=rows.device).unsqueeze(-1)
    index = (torch.arange(hidden, device=rows.device) + ids) % rows.shape[-1]
    return rows.gather(-1, index.expand(*rows.shape[:-1], hidden)) * (0.5 + ids % 7 / 7).to(rows.dtype)


class SyntheticExperts(nn.Module):
    """All made-up experts at once, as :class:`fx_nvfp4.fused.FusedExperts` would be called."""

    def __init__(self, hidden: int, weighted: str) -> None:
        super().__init__()
        self.hidden, self.weighted = hidden, weighted

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        if self.weighted == "input":
            y = synthetic(ids, rows * weights.unsqueeze(-1).to(x.dtype), self.hidden).float()
        else:
            y = synthetic(ids, rows, self.hidden).float() * weights.unsqueeze(-1).float()
        return y.sum(dim=1).to(x.dtype)


def check_synthetic(
    module: nn.Module,
    experts: list[nn.Module],
    path: str,
    forward: Forward,
    inputs: Sequence[Tensor],
    hidden: int,
    weighted: str,
) -> None:
    """Compare forward(module, x) with the module's own, all experts made up; in training mode gradients too.

    Raises:
        Unsuited: they differ.
    """
    container = module.get_submodule(path)
    replacement = SyntheticExperts(hidden, weighted)
    made_up = [lambda *a, e=e, **k: synthetic(e, only_rows(a, k), hidden) for e in range(len(experts))]
    own = {id(p) for expert in experts for p in expert.parameters()}
    learning = [p for p in module.parameters() if p.requires_grad and p.is_floating_point() and id(p) not in own]
    trained = learning if module.training else None
    for x in inputs:
        with replaced_forwards(experts, made_up):
            expected = _run(module.forward, x, trained)
        replace_module(module, path, replacement)
        try:
            actual = _run(partial(forward, module), x, trained)
        finally:
            replace_module(module, path, container)
        _compare(expected, actual, x)


def _run(run: Callable[[Tensor], Any], x: Tensor, trained: list[nn.Parameter] | None) -> list[Tensor]:
    """Output tensors; with trained parameters also the gradients of the first with respect to x and to them."""
    with seeded(x.device), torch.set_grad_enabled(trained is not None):
        if trained is None:
            return _outputs(run(x.clone()))
        leaf = x.clone().requires_grad_()
        outputs = _outputs(run(leaf * 1.0))
        if not outputs[0].requires_grad:
            return outputs
        gradients = torch.autograd.grad(outputs[0].float().square().sum(), [leaf, *trained], allow_unused=True)
    return outputs + [torch.zeros(()) if g is None else g for g in gradients]


def _outputs(out: Any) -> list[Tensor]:
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def _compare(expected: list[Tensor], actual: list[Tensor], x: Tensor) -> None:
    if [t.shape for t in expected] != [t.shape for t in actual]:
        raise Unsuited(f"the fused forward gives other shapes for an input {list(x.shape)}")
    for a, b in zip(expected, actual, strict=True):
        bound = 16 * torch.finfo(x.dtype).eps * (float(a.detach().abs().max()) if a.numel() else 0.0)
        want, got = a.detach().double(), b.detach().double()
        if a.dtype != b.dtype or not torch.allclose(want, got, rtol=0, atol=bound, equal_nan=True):
            raise Unsuited(
                f"the fused forward differs from the original for an input {list(x.shape)}",
                "what it does depends on more than the experts chosen (an expert's capacity, detached weights)",
            )


def real_outputs(run: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """What a forward gives, without gradients."""
    with torch.no_grad():
        results = []
        for x in inputs:
            with seeded(x.device):
                results.append(_outputs(run(x.clone())))
        return results


def check_real(expected: list[list[Tensor]], actual: list[list[Tensor]], quantized_activations: bool) -> None:
    """Compare outputs with the real experts, by norm: rounding differs, and a rounded activation may fall either way.

    Raises:
        Unsuited: the first output differs by more than that.
    """
    errors = []
    for a, b in zip(expected, actual, strict=True):
        want, got = a[0].double(), b[0].double()
        errors.append(float((want - got).norm() / want.norm().clamp_min(1e-30)))
    eps = torch.finfo(expected[0][0].dtype).eps
    bound = 0.1 if quantized_activations else max(4 * eps, 1e-4)
    if not all(error <= bound for error in errors):
        raise Unsuited(
            f"fused experts give another result: relative error {max(errors):.2g}, at most {bound:.2g} allowed",
            "experts with the same parts must compute the same function",
        )


def check_expert(fused: nn.Module, expert: int, x: Tensor, expected: list[list[Tensor]], quantized: bool) -> None:
    """Compare one of the fused experts with what it gave alone.

    Raises:
        Unsuited: it differs.
    """
    ids = torch.full((len(x), 1), expert, device=x.device)
    with torch.no_grad():
        y = fused(x, ids, torch.ones(len(x), 1, dtype=x.dtype, device=x.device))
    check_real(expected, [[y]], quantized)
