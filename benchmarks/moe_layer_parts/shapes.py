"""The layers that are measured, and the least that any kernel has to read and to compute for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    """Routed experts of one layer: gate_up [E, 2 * intermediate, hidden], down [E, hidden, intermediate]."""

    title: str
    experts: int
    top: int
    hidden: int
    intermediate: int
    tokens: Sequence[int] = TOKENS

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Bytes of one packed expert: two codes a byte and a scale of one byte for 16 of them."""
        return self.expert_elements // 2 + self.expert_elements // 16

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of the products, over all slots."""
        return 2 * tokens * self.top * self.expert_elements

    def floor(self, tokens: int, experts_hit: float, rates: Rates) -> float:
        """Seconds below which no kernel can be that reads each weight once and multiplies in bf16."""
        return max(experts_hit * self.expert_bytes / rates.read, self.flops(tokens) / rates.matmul)


@dataclass(frozen=True)
class Rates:
    """What the device reaches: bytes read a second, and bf16 operations a second in a dense product."""

    read: float
    matmul: float

    def __str__(self) -> str:
        return f"{self.read * 1e-12:.3g} TB/s read, {self.matmul * 1e-12:.3g} TFLOP/s bf16"


SHAPES = {
    "qwen3-30b": Shape("Qwen3-30B-A3B", experts=128, top=8, hidden=2048, intermediate=768),
    "qwen3-235b": Shape("Qwen3-235B-A22B", experts=128, top=8, hidden=4096, intermediate=1536),
    "deepseek-v3": Shape("DeepSeek-V3", experts=256, top=8, hidden=7168, intermediate=2048),
    "mixtral-8x7b": Shape("Mixtral-8x7B", experts=8, top=2, hidden=4096, intermediate=14336),
    "gpt-oss-120b": Shape("gpt-oss-120b", experts=128, top=4, hidden=2880, intermediate=2880),
    "tiny": Shape("tiny", experts=8, top=2, hidden=128, intermediate=64, tokens=(4, 64, 256)),
}
