"""Sizes of the model, of its training and of its evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A byte-level model and how much it trains and is asked.

    Attributes:
        layers, experts, top, hidden, inner, heads, kv_heads, head_dim: of the model.
        context: bytes in a window.
        batch: windows in a step of training, and in a call of evaluation.
        steps, learning_rate: of the training.
        text_bytes: how much text is read, at most.
        windows: held-out windows for perplexity.
        questions: with four answers each.
        calibration: windows of training text that static activation scales come from.
        variants: names of those that are measured; none: all.
    """

    layers: int
    experts: int
    top: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    text_bytes: int
    windows: int
    questions: int
    calibration: int
    variants: tuple[str, ...] = ()


PRESETS = {
    # Seconds: shows that everything runs; the model learns hardly more than which bytes are frequent.
    "tiny": Preset(
        layers=2,
        experts=8,
        top=2,
        hidden=64,
        inner=32,
        heads=2,
        kv_heads=1,
        head_dim=32,
        context=64,
        batch=16,
        steps=30,
        learning_rate=5e-3,
        text_bytes=1 << 20,
        windows=32,
        questions=16,
        calibration=32,
        variants=("bf16", "W4A16, mse", "W4A4 static, mse"),
    ),
    # Ten to twenty minutes on one core, most of them training.
    "cpu": Preset(
        layers=3,
        experts=8,
        top=2,
        hidden=192,
        inner=128,
        heads=6,
        kv_heads=2,
        head_dim=32,
        context=128,
        batch=32,
        steps=1500,
        learning_rate=3e-3,
        text_bytes=1 << 24,
        windows=512,
        questions=512,
        calibration=128,
    ),
    # Some sixty million parameters.
    "gpu": Preset(
        layers=6,
        experts=16,
        top=2,
        hidden=512,
        inner=384,
        heads=8,
        kv_heads=4,
        head_dim=64,
        context=256,
        batch=64,
        steps=2000,
        learning_rate=1e-3,
        text_bytes=1 << 25,
        windows=1024,
        questions=2048,
        calibration=256,
    ),
}
