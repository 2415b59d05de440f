"""Checks of what the launchers hand to a kernel: a wrong shape would read outside the tensor."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Weight(NamedTuple):
    """Packed weights of E experts, as the kernels read them; the last dimension of each is contiguous."""

    qdata: Tensor  # uint8 [E, N, K/2]
    block_scale: Tensor  # uint8 [E, N, K/16], the bytes of float8_e4m3fn
    global_scale: Tensor  # float32 [E, N]

    @property
    def experts(self) -> int:
        return self.qdata.shape[0]

    @property
    def n(self) -> int:
        return self.qdata.shape[1]

    @property
    def k(self) -> int:
        return self.qdata.shape[2] * 2

    def strides(self) -> tuple[int, int, int, int, int]:
        """Strides over experts and rows: qdata's two, block_scale's two, global_scale's one."""
        qdata, scale = self.qdata, self.block_scale
        return qdata.stride(0), qdata.stride(1), scale.stride(0), scale.stride(1), self.global_scale.stride(0)


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raise a ValueError that names the tensor unless condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, found {found}")


def pack_weight(qdata: Tensor, block_scale: Tensor, global_scale: Tensor, strided_scale: bool = False) -> Weight:
    """Check the three tensors of a weight against each other; 2-D weights (and 1-D global scales) become one expert.

    strided_scale: the kernel takes a stride for global_scale's last dimension too.
    """
    if qdata.ndim == 2:
        qdata, block_scale, global_scale = (t.unsqueeze(0) for t in (qdata, block_scale, global_scale))
    require(qdata.ndim == 3, "qdata", tuple(qdata.shape), "2 or 3 dimensions, [.., N, K/2]")
    require(qdata.dtype == torch.uint8, "qdata", qdata.dtype, "uint8, two codes to a byte")
    experts, n, half_k = qdata.shape
    require(half_k % 8 == 0, "qdata", tuple(qdata.shape), "K/2 a multiple of 8 (K a multiple of 16)")
    require(block_scale.dtype in (torch.float8_e4m3fn, torch.uint8), "block_scale", block_scale.dtype, "float8_e4m3fn")
    scale_shape = (experts, n, half_k // 8)
    require(block_scale.shape == scale_shape, "block_scale", tuple(block_scale.shape), f"shape {scale_shape}")
    require(global_scale.dtype == torch.float32, "global_scale", global_scale.dtype, "float32")
    require(global_scale.shape == (experts, n), "global_scale", tuple(global_scale.shape), f"shape {(experts, n)}")
    weight = Weight(qdata, block_scale.view(torch.uint8), global_scale)
    for name, tensor in zip(Weight._fields, weight, strict=True):
        # A silent copy here would double an expert tensor of gigabytes at every call.
        require(
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or (strided_scale and name == "global_scale"),
            name,
            f"strides {tensor.stride()}",
            "a contiguous last dimension; call .contiguous() once, when the model is loaded",
        )
        require(tensor.device == qdata.device, name, tensor.device, f"device {qdata.device}")
    return weight


def check_input(x: Tensor, weight: Weight, ndim: int) -> Tensor:
    """Check x against the weight; returns it with a contiguous last dimension."""
    require(x.dtype in FLOAT_DTYPES, "x", x.dtype, "bfloat16, float16 or float32")
    require(x.ndim == ndim, "x", tuple(x.shape), f"{ndim} dimensions")
    require(x.shape[-1] == weight.k, "x", tuple(x.shape), f"K = {weight.k} in the last dimension")
    require(x.device == weight.qdata.device, "x", x.device, f"the weight's device {weight.qdata.device}")
    return x if x.stride(-1) == 1 else x.contiguous()


def check_out_scale(out_scale: Tensor | None, weight: Weight) -> tuple[Tensor | None, int]:
    """Check the factor of the accumulator, float32 [] or [E]; returns it with its stride over experts."""
    if out_scale is None:
        return None, 0
    require(out_scale.dtype == torch.float32, "out_scale", out_scale.dtype, "float32")
    require(out_scale.device == weight.qdata.device, "out_scale", out_scale.device, f"device {weight.qdata.device}")
    if out_scale.numel() == 1:
        return out_scale, 0
    require(out_scale.shape == (weight.experts,), "out_scale", tuple(out_scale.shape), f"[] or [{weight.experts}]")
    return out_scale, out_scale.stride(0)
