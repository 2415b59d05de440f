"""torchao's packed parameters become NVFP4Weight, in place: codes are shared, swizzled scales laid out once."""

from __future__ import annotations

from torch import Tensor, nn

from ..parameters import replace_parameters
from ..tensor import NVFP4Weight
from ..torchao_interop import is_torchao_nvfp4


def convert_torchao(model: nn.Module) -> list[str]:
    """Replace every NVFP4Tensor parameter; parameters that are tied stay tied. Returns their names."""

    def convert(name: str, value: Tensor) -> Tensor | None:
        return NVFP4Weight.from_torchao(value) if is_torchao_nvfp4(value) else None

    return replace_parameters(model, convert)
