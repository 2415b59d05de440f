"""Compiles a deep model layer by layer, so that layers that are alike share one compilation, also with a cache."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_nvfp4_compiled_layer"


def compile_layers(model: nn.Module, **how: Any) -> int:
    """Compile each decoder layer of a transformers model in place of the whole model; what is between them stays eager.

    A compilation of the whole model takes time for every layer, this for every kind of layer: what the layers differ
    in are tensors, which generated code takes as inputs. What keeps `layer.compile()` from sharing code where there is
    a cache is the layer's number, by which it finds its part of the cache; here each layer is handed its part alone.
    `torch._dynamo.config.recompile_limit` is raised for good, as layers that are not alike count against it.

    Args:
        model: has a list of layers, as `model.get_decoder().layers`, that are called with a cache, if any, of
            transformers. A model compiled so already is compiled anew.
        how: as for `torch.compile`; backend="nvfp4_emu" if not given.

    Returns:
        The number of layers. With CUDA graphs of torch's (mode="reduce-overhead") each has its own.

    Raises:
        TypeError: no list of layers was found; compile the whole model then.
        ValueError: a layer has a forward of its own, as hooks that move weights give it, and not its class's.
    """
    layers = _layers(model)
    for number, layer in enumerate(layers):
        if not _is_ours(vars(layer).get("forward")):
            raise ValueError(
                f"compile_layers: layer {number} ({type(layer).__name__}) has a forward of its own, which is not its "
                "class's (accelerate's hooks, a patch?), and would not run: remove it, or torch.compile the whole model"
            )
    limit = torch._dynamo.config.recompile_limit
    # Layers that are not alike count as recompilations of one function; beyond the limit they would run uncompiled.
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(layers))
    how.setdefault("backend", "nvfp4_emu")
    compiled = {kind: torch.compile(kind.forward, **how) for kind in {type(layer) for layer in layers}}
    for number, layer in enumerate(layers):
        # A bound method, which deepcopy binds to the copy.
        layer.forward = types.MethodType(_with_its_part(compiled[type(layer)], number), layer)
    return len(layers)


def uncompile_layers(model: nn.Module) -> None:
    """Undo :func:`compile_layers`."""
    for layer in _layers(model):
        if _is_ours(vars(layer).get("forward")):
            layer.__dict__.pop("forward", None)


class LayerCache:
    """One layer's part of a transformers cache, which looks at no number of a layer when keys and values are added.

    That no number is read is what lets layers share code: torch.compile guards what is read.
    """

    def __init__(self, cache: Any, number: int) -> None:
        self.cache, self.layer = cache, cache.layers[number]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # all else is the whole cache's, found by the layer's number
        return getattr(self.cache, name)


def _with_its_part(compiled: Callable[..., Any], number: int) -> Callable[..., Any]:
    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_its_part(a, number) for a in args)
        return compiled(layer, *args, **{name: _its_part(a, number) for name, a in kwargs.items()})

    setattr(forward, _MARK, True)
    return forward


def _is_ours(forward: Any) -> bool:
    """Whether a layer's own forward is what :func:`compile_layers` gave it, or there is none."""
    return forward is None or hasattr(getattr(forward, "__func__", None), _MARK)


def _its_part(argument: Any, number: int) -> Any:
    """The layer's part of a cache that has it already, and moves none to another device meanwhile; all else as it is.

    A cache is known by what it does: the name by which layers take it is another from release to release.
    """
    layers = getattr(argument, "layers", None)
    if isinstance(layers, list) and number < len(layers) and hasattr(argument, "update"):
        return argument if getattr(argument, "offloading", False) else LayerCache(argument, number)
    return argument


def _layers(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(
            f"{type(model).__name__} has no list of layers, model.get_decoder().layers: use torch.compile on the model"
        )
    return layers
