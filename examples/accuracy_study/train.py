"""Training: AdamW, a warm-up and a cosine, and a loss that keeps the experts of every layer evenly used."""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from .presets import Preset
from .text import Text

_WARM_UP = 0.05  # of all steps
_BALANCE = 0.01  # weight of the loss that evens out the experts
_LOG = 20  # lines


def train(model: Any, text: Text, preset: Preset, device: torch.device, seed: int) -> None:
    """Train in place, float32 weights; on a GPU the products are of bfloat16."""
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step / preset.steps))
    start, every = time.perf_counter(), max(1, preset.steps // _LOG)
    for step in range(preset.steps):
        ids = text.windows(preset.batch, preset.context, seed=seed * 1_000_003 + step).to(device)
        loss, balance = _losses(model, ids, torch.float32 if device.type == "cpu" else torch.bfloat16)
        (loss + _BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % every == 0 or step == preset.steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:>5} of {preset.steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def _losses(model: Any, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood of a byte, and how unevenly the experts are used, the mean of all layers.

    transformers adds up the experts of equal number in all layers before it compares them, so that some may starve.
    """
    weights: dict[str, nn.Parameter | Tensor] = {name: p.to(dtype) for name, p in model.named_parameters()}
    output = functional_call(model, weights, (ids,), {"labels": ids, "output_router_logits": True})
    experts, top = model.config.num_experts, model.config.num_experts_per_tok
    uneven = [load_balancing_loss_func((logits,), experts, top) for logits in output.router_logits]
    return output.loss, torch.stack(uneven).mean()


def _rate(done: float) -> float:
    """Share of the learning rate when that share of the steps is done: up in a line, down in a cosine to a tenth."""
    return min(done / _WARM_UP, 0.55 + 0.45 * math.cos(math.pi * done)) + 1e-3
