"""Exchanging a model's parameters in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn


def replace_parameters(model: nn.Module, replace: Callable[[str, Tensor], Tensor | None]) -> list[str]:
    """Replace each parameter by what replace(name, value) gives; None leaves it. Those that are tied stay tied.

    Returns:
        Names of the replaced parameters, all of those that are tied.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    # Those that are tied, old and new: the old ones are kept, so that no other object gets their ids. All else is freed
    # as it is replaced.
    tied: dict[int, tuple[nn.Parameter, nn.Parameter | None]] = {}
    names = []
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{key}" if path else key
            if id(parameter) in tied:
                _, new = tied[id(parameter)]
            else:
                value = replace(name, parameter.data)
                new = None if value is None else nn.Parameter(value, requires_grad=parameter.requires_grad)
                if owners[id(parameter)] > 1:
                    tied[id(parameter)] = parameter, new
            if new is not None:
                module._parameters[key] = new
                names.append(name)
    return names
