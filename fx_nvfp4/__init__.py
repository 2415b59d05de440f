"""Run NVFP4 mixture-of-experts models on hardware without FP4 units.

model = torch.compile(fx_nvfp4.load(path), backend="nvfp4_emu")
"""

from . import activation, dispatch, format, moe, ops
from .attention import group_queries
from .backend import nvfp4_emu
from .calibrate import calibrate
from .checkpoint import CheckpointError, load
from .explain import explain
from .layers import compile_layers
from .parallel.experts import sharded_parameters
from .parallel.linears import shard_linears
from .parallel.shard import shard_experts
from .parallel.sharded_state import load_sharded_state_dict, sharded_state_dict
from .prepack_model import prepack
from .prepare import prepare
from .quantize import NVFP4Config, quantizable, quantize_
from .report import NotEmulatedError, NVFP4Warning, Report
from .save import save
from .serialize import load_file, save_file
from .tensor import NVFP4Weight

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "NVFP4Config",
    "NVFP4Warning",
    "NVFP4Weight",
    "NotEmulatedError",
    "Report",
    "activation",
    "calibrate",
    "compile_layers",
    "dispatch",
    "explain",
    "format",
    "group_queries",
    "load",
    "load_file",
    "load_sharded_state_dict",
    "moe",
    "nvfp4_emu",
    "ops",
    "prepack",
    "prepare",
    "quantizable",
    "quantize_",
    "save",
    "save_file",
    "shard_experts",
    "shard_linears",
    "sharded_parameters",
    "sharded_state_dict",
]
