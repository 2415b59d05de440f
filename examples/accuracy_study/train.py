"""Training: AdamW, a warm-up and a cosine, with transformers' loss that keeps the experts evenly used."""

import math
import time
from typing import Any

import torch

from .presets import Preset
from .text import Text

_WARM_UP = 0.05  # of all steps
_LOG = 20  # lines


def train(model: Any, text: Text, preset: Preset, device: torch.device, seed: int) -> None:
    """Train in place; on a GPU products run in bfloat16."""
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step / preset.steps))
    start, every = time.perf_counter(), max(1, preset.steps // _LOG)
    for step in range(preset.steps):
        ids = text.windows(preset.batch, preset.context, seed=seed * 1_000_003 + step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            output = model(ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % every == 0 or step == preset.steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:>5} of {preset.steps}, loss {output.loss.item():.3f}, {seconds:.0f} s", flush=True)


def _rate(done: float) -> float:
    """Share of the learning rate when that share of the steps is done: up in a line, down in a cosine to a tenth."""
    return min(done / _WARM_UP, 0.55 + 0.45 * math.cos(math.pi * done)) + 1e-3
