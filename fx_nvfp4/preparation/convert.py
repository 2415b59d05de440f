"""torchao's packed parameters become NVFP4Weight, in place: codes are shared, swizzled scales laid out once."""

from __future__ import annotations

from torch import nn

from ..tensor import NVFP4Weight
from ..torchao_interop import is_torchao_nvfp4


def convert_torchao(model: nn.Module) -> list[str]:
    """Replace every NVFP4Tensor parameter; parameters that are tied stay tied. Returns their names."""
    converted: dict[int, nn.Parameter] = {}
    names = []
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not is_torchao_nvfp4(parameter.data):
                continue
            if id(parameter) not in converted:
                weight = NVFP4Weight.from_torchao(parameter.data)
                converted[id(parameter)] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
            module._parameters[key] = converted[id(parameter)]
            names.append(f"{path}.{key}" if path else key)
    return names
