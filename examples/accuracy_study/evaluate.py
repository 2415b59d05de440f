"""Perplexity and multiple choice of a compiled model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4

from .questions import ANSWER, Questions

Compiled = Callable[..., Any]


def compile_emulated(module: nn.Module, options: dict[str, Any]) -> Compiled:
    """Compiled by our backend; a packed weight that is not emulated raises."""
    return torch.compile(module, backend="nvfp4_emu", options={"strict": True, **options})


def check_emulated(model: nn.Module, ids: Tensor, layers: int) -> None:
    """Raise RuntimeError unless explain() finds every packed weight emulated, and one lifted block a layer."""
    report = fx_nvfp4.explain(model, ids)
    packed = {name for name, p in model.named_parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight)}
    lifted = sum(block.lifted for block in report.blocks)
    if report.refused or report.weights != packed or lifted != (layers if packed else 0):
        raise RuntimeError(f"not all of the model is emulated:\n{report}")


def losses(compiled: Compiled, windows: Tensor, batch: int, device: torch.device) -> Tensor:
    """Negative log likelihood of every byte but the first, [N, T - 1], of windows [N, T]."""
    found = []
    for ids in windows.split(batch):
        full = F.pad(ids, (0, 0, 0, batch - len(ids))).to(device)  # of one shape, so that one graph serves
        logits = compiled(full).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.mT, full[:, 1:], reduction="none")[: len(ids)].cpu())
    return torch.cat(found)


def choices(compiled: Compiled, questions: Questions, batch: int, device: torch.device) -> Tensor:
    """The likeliest answer to each question, [Q]; all are of one length."""
    found = losses(compiled, questions.ids.flatten(0, 1), batch, device)[:, -ANSWER:].sum(dim=-1)
    return found.view(questions.ids.shape[:2]).argmin(dim=-1)
