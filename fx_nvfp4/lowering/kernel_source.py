"""A Triton kernel with all that it calls as one piece of text, to stand in generated code and be compiled there.

Constants of the launch become lines above the kernel, and its parameters are what is left.
"""

from __future__ import annotations

import ast
import dis
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INT32_MAX = 2**31 - 1
_ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
}


def constants_of(kernel: Any) -> list[str]:
    """Names of the kernel's parameters that are constants."""
    return [p.name for p in _parameters(kernel) if p.annotation is tl.constexpr]


def parameters_of(kernel: Any) -> list[str]:
    """Names of those that are not."""
    return [p.name for p in _parameters(kernel) if p.annotation is not tl.constexpr]


def kernel_text(kernel: Any, name: str, constants: Mapping[str, Any], decorator: str) -> str:
    """The kernel under another name, decorated, below the functions that it calls and its constants.

    Args:
        constants: value of each of constants_of(kernel); a Triton function, or what Python can write and read.

    Raises:
        ValueError: the kernel reaches two different things under one name.
    """
    lines = _Definitions()
    for constant in constants_of(kernel):
        lines.add(constant, constants[constant])
    lines.add_what_is_used(kernel.fn)
    return f"{lines.text}\n\n{decorator}\n@triton.jit\n{_without_constants(kernel, name)}"


def specialise(
    kernel: Any, arguments: Mapping[str, Any], aligned: Callable[[str], bool]
) -> tuple[dict[str, str], dict[str, Any], tuple[int, ...]]:
    """(Triton's type of each parameter, the values that are part of the type, places of what 16 divides).

    As Triton's own launcher does: None, and integers that are 1, are constants unless the kernel forbids it.

    Args:
        arguments: value of each of parameters_of(kernel); tensors may be fake.
        aligned: whether the tensor of a parameter starts at a multiple of 16 bytes.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    fixed = set(getattr(kernel, "do_not_specialize", None) or ())
    for place, name in enumerate(parameters_of(kernel)):
        value = arguments[name]
        if isinstance(value, Tensor):
            types[name], divides = f"*{_ELEMENTS[value.dtype]}", aligned(name)
        elif value is None or (value == 1 and name not in fixed):
            types[name], divides = "constexpr", False
            constants[name] = value
        else:
            types[name] = "i32" if abs(value) <= _INT32_MAX else "i64"
            divides = value % 16 == 0 and name not in fixed
        if divides:
            divisible.append(place)
    return types, constants, tuple(divisible)


class _Definitions:
    """Lines of text, each below those that it needs."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self._parts)

    def add(self, name: str, value: Any) -> None:
        if name in self._known:
            known = self._known[name]
            if known is not value and not _same(known, value):
                raise ValueError(f"two things are called {name} in one kernel: {known} and {value}")
            return
        self._known[name] = value
        if not _is_function(value):
            # Triton reads globals that are marked so; its interpreter wants launch constants as they are.
            marked = not interprets() or isinstance(value, tl.constexpr)
            number = getattr(value, "value", value)
            if not isinstance(number, (int, float, str)):
                raise ValueError(f"{name} = {number!r} cannot be written into generated code; make it a tl.constexpr")
            self._parts.append(f"{name} = tl.constexpr({number!r})" if marked else f"{name} = {number!r}")
            return
        self.add_what_is_used(value.fn)
        own = value.fn.__name__
        if own == name:
            self._parts.append(f"\n\n@triton.jit\n{_source(value.fn)}")
        else:
            self.add(own, value)
            self._parts.append(f"{name} = {own}")

    def add_what_is_used(self, function: Any) -> None:
        """What a function finds in its module; the head of generated code has Triton itself."""
        read = [i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"]
        for name in dict.fromkeys(read):
            value = function.__globals__.get(name)
            if value is not None and value not in (triton, tl):
                self.add(name, value)


def interprets() -> bool:
    """Whether Triton interprets kernels, on tensors of a CPU too, instead of compiling them."""
    return not isinstance(_probe, triton.runtime.jit.JITFunction)


@triton.jit
def _probe() -> None:
    pass


def _is_function(value: Any) -> bool:
    return hasattr(value, "fn") and callable(value.fn)


def _same(one: Any, other: Any) -> bool:
    return bool(getattr(one, "value", one) == getattr(other, "value", other))


def _parameters(kernel: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(kernel.fn).parameters.values())


def _source(function: Any) -> str:
    """From def on, without decorators."""
    text = inspect.getsource(function)
    return text[text.index("def ") :]


def _without_constants(kernel: Any, name: str) -> str:
    """def of the kernel with fewer parameters, and its body as it is written."""
    text = _source(kernel.fn)
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    body = text.splitlines()[function.body[0].lineno - 1 :]
    return "\n".join([f"def {name}({', '.join(parameters_of(kernel))}):", *body, ""])
