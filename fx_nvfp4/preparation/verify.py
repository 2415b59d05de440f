"""Proof by comparison: a prepared forward against the original, with made-up experts and with the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .record import Unsuited, replace_module
from .recorder import only_rows, replaced_forwards

Forward = Callable[[nn.Module, Tensor], Any]


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in every block, and the caller's generators untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def synthetic(expert: int, rows: Tensor, hidden: int) -> Tensor:
    """A made-up expert: rows [S, K] -> [S, H], different for every expert and differentiable."""
    index = torch.arange(hidden, device=rows.device).add(expert) % rows.shape[-1]
    return rows[..., index] * (0.5 + (expert % 7) / 7)


class SyntheticExperts(nn.Module):
    """All made-up experts at once, as :class:`fx_nvfp4.fused.FusedExperts` would call them."""

    def __init__(self, count: int, hidden: int, weighted: str) -> None:
        super().__init__()
        self.count, self.hidden, self.weighted = count, hidden, weighted

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.hidden, dtype=torch.float32)
        for e in range(self.count):
            for a in range(ids.shape[1]):
                share, chosen = weights[:, a, None], (ids[:, a, None] == e)
                if self.weighted == "input":
                    y = synthetic(e, (x * share.to(x.dtype)), self.hidden).float()
                else:
                    y = synthetic(e, x, self.hidden).float() * share.float()
                out = out + torch.where(chosen, y, 0.0)
        return out.to(x.dtype)


def check_synthetic(
    module: nn.Module, experts: list[nn.Module], path: str, forward: Forward, inputs: Sequence[Tensor], hidden: int, weighted: str
) -> None:
    """Compare forward(module, x) with the module's own, all experts made up; in training mode gradients too.

    Raises:
        Unsuited: they differ.
    """
    container = module.get_submodule(path)
    replacement = SyntheticExperts(len(experts), hidden, weighted)
    made_up = [lambda *a, e=e, **k: synthetic(e, only_rows(a, k), hidden) for e in range(len(experts))]
    for x in inputs:
        with replaced_forwards(experts, made_up):
            expected = _run(module, module, x)
        replace_module(module, path, replacement)
        try:
            actual = _run(forward, module, x)
        finally:
            replace_module(module, path, container)
        _compare(expected, actual, x)


def _run(run: Callable[..., Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output tensors; in training mode also the gradients of the first with respect to x and the parameters."""
    arguments = (x.clone(),) if run is module else (module, x.clone())
    trained = [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
    with seeded(x.device), torch.set_grad_enabled(module.training):
        if not module.training:
            return _outputs(run(*arguments))
        leaf = arguments[-1].requires_grad_()
        arguments = (*arguments[:-1], leaf * 1.0)
        outputs = _outputs(run(*arguments))
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
        if a.dtype != b.dtype or not torch.allclose(a.detach().double(), b.detach().double(), rtol=0, atol=bound, equal_nan=True):
            raise Unsuited(
                f"the fused forward differs from the original for an input {list(x.shape)}",
                "what the forward does depends on more than the experts chosen (capacity, token dropping, detached weights)",
            )


def real_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """What the module gives with its own experts, without gradients."""
    with torch.no_grad():
        results = []
        for x in inputs:
            with seeded(x.device):
                results.append(_outputs(module(x.clone())))
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
