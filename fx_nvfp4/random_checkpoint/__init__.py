"""Checkpoints with random weights in the exact layout of published ones, at any size: to try loading and speed on.

``python -m fx_nvfp4 make-checkpoint FOLDER --like modelopt`` writes one.
"""

from .qwen3_moe import LAYOUTS, Sizes
from .write import write_checkpoint

__all__ = ["LAYOUTS", "Sizes", "write_checkpoint"]
