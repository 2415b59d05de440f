"""Golden vectors: what NVIDIA's conversions and each producer's own code make of the same inputs.

`inputs` holds x in three dtypes, five global scales as divisors (`gs`) and a label for each block; one file per
producer holds, per dtype and global scale, the block-scale bytes, codes (255: no E2M1 value) and values.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "golden"
DTYPES = ("f32", "bf16", "f16")
GLOBAL_SCALES = range(5)
PRODUCERS = {
    "hardware": "hw",
    "vllm": "vllm_ref",
    "compressed-tensors": "compressed_tensors",
    "modelopt": "modelopt_qtensor",
    "torchao": "torchao",
}


@cache
def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def case(dialect: str, dtype: str, i: int) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """(x, global scale as a float64 multiplier, expected scale, codes, qdq), or None where the producer has none."""
    expected = load(PRODUCERS[dialect])
    keys = {part: f"{dtype}.gs{i}.{part}" for part in ("scale", "codes", "qdq")}
    if keys["scale"] not in expected:
        return None
    scale = 1.0 / load("inputs")["gs"][i].double()
    return load("inputs")[f"x_{dtype}"], scale, {part: expected[key] for part, key in keys.items()}


def equal_with_signs(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN to NaN and zeros by their signs."""
    same = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((same | (a.isnan() & b.isnan())).all())
