"""Gives a module other forwards, made from graphs: a class of its own whose source text can be read and pickled."""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from .record import Unsuited

Variant = tuple[bool, int]  # (training, dims of the input)
_serial = itertools.count()
_classes: dict[tuple[type[nn.Module], tuple[tuple[Variant, str], ...]], type[nn.Module]] = {}


class Prepared:
    """First base of a prepared module's class: chooses the forward for the mode and the input's rank."""

    _variants: Mapping[Variant, Any]
    _sources: tuple[tuple[Variant, str], ...]
    _defaults: Mapping[str, Any]
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self._hidden_states(args, kwargs)
        run = self._variants.get((self.training, x.dim()))
        if run is None:
            modes = ", ".join(f"{'training' if t else 'eval'} with {d}-D inputs" for t, d in self._variants)
            raise RuntimeError(
                f"{type(self).__name__}: fused by fx_nvfp4.prepare for {modes}; called in "
                f"{'training' if self.training else 'eval'} mode with x {list(x.shape)}. Call prepare() in the mode "
                "that you run the model in"
            )
        return run(self, x)

    def _hidden_states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The first of the arguments that the original forward takes; the others must have their defaults."""
        names = list(self._defaults)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given.pop(names[0], None)
        others = [n for n, v in given.items() if n not in names or _differ(v, self._defaults[n])]
        if x is None or others or len(args) > len(names):
            raise TypeError(
                f"{type(self).__name__}: fused by fx_nvfp4.prepare for {names[0]} alone, got "
                f"{len(args)} arguments{''.join(f', {n}' for n in others)}. Leave these out, or this module as it was"
            )
        return x

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (original_class(type(self)), self._sources), self.__dict__


def original_class(cls: type[Any]) -> type[nn.Module]:
    """The class that a prepared one was made from; any other class as it is."""
    return cls.__mro__[2] if issubclass(cls, Prepared) else cls


def _differ(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def source_of(graph: fx.Graph) -> str:
    """The graph as the text of ``def forward(self, x)``; raises `Unsuited` where no text says it."""
    code = graph.python_code("self")
    foreign = set(code.globals) - set(_namespace())
    if foreign:
        raise Unsuited(f"its forward calls {', '.join(sorted(foreign))}, which no text names")
    return code.src.strip() + "\n"


def prepared_class(base: type[nn.Module], sources: tuple[tuple[Variant, str], ...]) -> type[nn.Module]:
    """base with these forwards; equal arguments give the same class, so that equal layers share code."""
    base = original_class(base)
    key = base, sources
    if key not in _classes:
        _classes[key] = _prepared_class(base, sources)
    return _classes[key]


def _prepared_class(base: type[nn.Module], sources: tuple[tuple[Variant, str], ...]) -> type[nn.Module]:
    variants = {variant: _function(base, text) for variant, text in sources}
    defaults = {name: p.default for name, p in list(inspect.signature(base.forward).parameters.items())[1:]}
    names = {
        "_variants": variants,
        "_sources": sources,
        "_defaults": defaults,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (Prepared, base), names)


def _restore(base: type[nn.Module], sources: tuple[tuple[Variant, str], ...]) -> nn.Module:
    prepared = prepared_class(base, sources)
    return prepared.__new__(prepared)


def _function(base: type[nn.Module], text: str) -> Any:
    """Compile text; tracebacks and Dynamo's messages show its lines."""
    name = f"<fx_nvfp4.prepare {base.__name__} {next(_serial)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = dict(_namespace())
    exec(compile(text, name, "exec"), namespace)
    return namespace["forward"]


@functools.cache
def _namespace() -> Mapping[str, Any]:
    """What fx's text may name: torch and some builtins."""
    return {**fx.Graph().python_code("self").globals, "getattr": getattr}
