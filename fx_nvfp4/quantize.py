"""``quantize_``: a model's weights become NVFP4, in place and module by module, by torchao's signature."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torchao.quantization.transform_module import register_quantize_module_handler

from .quantization.config import NVFP4Config
from .quantization.pack import check_module, pack_module
from .quantization.record import Quantization, shorten
from .quantization.scales import shared_amax
from .quantization.targets import packable, quantizable, reason_to_leave
from .report import NVFP4Warning
from .tensor import NVFP4Weight

__all__ = ["NVFP4Config", "quantizable", "quantize_"]

_TOLD = 5  # weights that an error names
log = logging.getLogger("fx_nvfp4")
Filter = Callable[[nn.Module, str], bool]


def quantize_(
    model: nn.Module,
    config: NVFP4Config | None = None,
    filter_fn: Filter | None = quantizable,
    device: torch.types.Device = None,
) -> None:
    """Pack the weights of linear layers and of 3-D experts, in place, as torchao's function of this name does.

    torchao's own ``quantize_(model, NVFP4Config(), filter_fn=fx_nvfp4.quantizable)`` works too. This one also packs
    linear layers inside a module that holds experts itself, lets q, k and v, and gate and up, share a global scale,
    leaves weights alone that are tied to an embedding, and accounts for all of it in ``model.nvfp4_quantization``
    (:class:`fx_nvfp4.quantization.record.Quantization`).

    Args:
        model: weights float32, bfloat16 or float16. No second copy of them is made but of the one being packed.
        config: see :class:`NVFP4Config`; default weights alone.
        filter_fn: takes a module and its path, says whether to pack its weights. The default leaves out output
            heads, embeddings, routers, and sizes that are not whole blocks.
        device: where the model goes first, module by module: packing on a GPU is faster.

    Raises:
        ValueError: nothing was chosen, or a chosen weight cannot be packed; names it. Nothing is packed then, but
            where a weight is not finite.
        TypeError: a config of torchao's.
    """
    config = NVFP4Config() if config is None else config
    if not isinstance(config, NVFP4Config):
        raise TypeError(
            f"quantize_: config must be an NVFP4Config, got {type(config).__name__}: use torchao's quantize_"
        )
    filter_fn = quantizable if filter_fn is None else filter_fn
    tied = _Tied(model)
    record = Quantization(config)
    chosen = {m for path, m in model.named_modules() if packable(m) and filter_fn(m, path) and not tied.to_table(m)}
    if not chosen:
        raise ValueError(_nothing_chosen(model, filter_fn, tied))
    for path, module in model.named_modules():
        if module in chosen:
            check_module(module, config, path)
    shared = shared_amax(model, chosen.__contains__) if config.global_scale == "fused" else {}
    for path, module in model.named_modules():
        if device is not None:
            module._apply(lambda t: t.to(device), recurse=False)
        if module in chosen and not tied.reuse(module):
            names = pack_module(module, config, path, shared.get(module))
            record.packed += [f"{path}.{name}".strip(".") for name in names]
            tied.remember(module, names)
        record.left_alone.update(_left_alone(module, path, module in chosen, filter_fn, tied))
    _leave_the_fast_path(model)
    model.nvfp4_quantization = record  # type: ignore[assignment]
    log.info("%s", record)


def _nothing_chosen(model: nn.Module, filter_fn: Filter, tied: _Tied) -> str:
    """What is wrong with every weight there is."""
    packed = sum(isinstance(p.data, NVFP4Weight) for p in model.parameters())
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        reasons.update(_left_alone(module, path, False, filter_fn, tied))
    told = [f"{name}: {reason}" for name, reason in list(reasons.items())[:_TOLD]]
    told += [f"{len(reasons) - _TOLD} more"] if len(reasons) > _TOLD else []
    told += [f"{packed} weights are packed already"] if packed else []
    return (
        f"quantize_: no weight was chosen to be packed ({'; '.join(told) or 'the model has none of two dims or more'})"
    )


def _left_alone(module: nn.Module, path: str, chosen: bool, filter_fn: Filter, tied: _Tied) -> dict[str, str]:
    """Dense parameters of two or more dims that a module holds itself, with the reason why they stay dense."""
    dense = {
        name: p
        for name, p in module.named_parameters(recurse=False)
        if p.dim() > 1 and p.is_floating_point() and not isinstance(p.data, NVFP4Weight)
    }
    if chosen:
        reason = "beside packed weights"
    elif tied.to_table(module):
        reason = "tied to an embedding"
    else:
        reason = reason_to_leave(module, path) or "filter_fn"
    return {f"{path}.{name}".strip("."): reason for name in dense}


def _leave_the_fast_path(model: nn.Module) -> None:
    """Make PyTorch's own encoder layers call their linear layers: in inference one op reads their weights as dense."""
    for module in model.modules():
        if not any(isinstance(p.data, NVFP4Weight) for p in module.parameters()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # which it looks at first
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which that op alone takes


class _Tied:
    """Parameters that several modules hold stay one."""

    def __init__(self, model: nn.Module) -> None:
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        # Of the weights that may be packed, by what they were before that.
        dense = {m: {name: id(p) for name, p in packable(m)} for m in model.modules()}
        self._several = {m: {n: key for n, key in found.items() if owners[key] > 1} for m, found in dense.items()}
        self._packed: dict[int, nn.Parameter] = {}

    def to_table(self, module: nn.Module) -> bool:
        """Whether a linear layer's weight is an embedding's."""
        return not self._tables.isdisjoint(self._several.get(module, {}).values())

    def reuse(self, module: nn.Module) -> bool:
        """Give a module the packed weights of those that it is tied to; whether none is left to pack."""
        for name, key in self._several.get(module, {}).items():
            if key in self._packed:
                module.register_parameter(name, self._packed[key])
        return not packable(module)

    def remember(self, module: nn.Module, names: list[str]) -> None:
        """Keep what was packed for those tied to it."""
        of_several = self._several.get(module, {})
        self._packed.update({of_several[n]: module.get_parameter(n) for n in names if n in of_several})


@register_quantize_module_handler(NVFP4Config)
def _transform(module: nn.Module, config: NVFP4Config) -> nn.Module:
    """What torchao's quantize_ calls for each module that its filter chooses; it does not look inside that one."""
    if not pack_module(module, config):
        raise ValueError(
            f"quantize_: filter_fn chose a {type(module).__name__}, which holds no dense weight of a linear layer or "
            "of experts by itself; fx_nvfp4.quantizable is a filter that chooses those that do"
        )
    inside = [name for name, m in module.named_modules() if quantizable(m, name)]
    if inside:
        warnings.warn(
            f"torchao's quantize_ does not look inside the {type(module).__name__} that it packed: {shorten(inside)} "
            "stay dense. fx_nvfp4.quantize_ packs both",
            NVFP4Warning,
            stacklevel=2,
        )
    return module
