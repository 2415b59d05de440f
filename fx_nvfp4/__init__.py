"""Run NVFP4 mixture-of-experts models on hardware without FP4 units.

model = torch.compile(fx_nvfp4.load(path), backend="nvfp4_emu")
"""

from . import dispatch, format, ops
from .tensor import NVFP4Weight

__version__ = "0.1.0"
__all__ = ["NVFP4Weight", "dispatch", "format", "ops"]
