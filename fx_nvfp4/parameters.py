"""Exchanging a model's parameters in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def replace_parameters(model: nn.Module, replace: Callable[[str, Tensor], Tensor | None]) -> list[str]:
    """Replace each parameter by what replace(name, value) gives; None leaves it. Those that are tied stay tied.

    Returns:
        Names of the replaced parameters, all of those that are tied.
    """
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter | None]] = {}
    names = []
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{key}" if path else key
            if id(parameter) not in replaced:
                new = replace(name, parameter.data)
                new = None if new is None else nn.Parameter(new, requires_grad=parameter.requires_grad)
                replaced[id(parameter)] = parameter, new
            _, new = replaced[id(parameter)]
            if new is not None:
                module._parameters[key] = new
                names.append(name)
    return names
