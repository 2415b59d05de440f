"""The code that Inductor writes for the launch of a Triton kernel: its definition, once, and the call.

On a GPU Inductor's own launcher compiles the kernel, in its pool of compilers, and starts it. On a CPU, where Triton
interprets, a stand-in calls it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codegen.common import TensorArg
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.codegen.triton_utils import config_of
from torch._inductor.runtime.hints import AttrsDescriptorWrapper, DeviceProperties
from torch._inductor.runtime.triton_heuristics import FixedGrid

from ..kernels.launch import Launch
from .kernel_source import kernel_text, specialise

_NAME = "KERNEL_NAME"
_INTERPRETED = """import torch
import triton
import triton.language as tl
from fx_nvfp4.lowering.launch_code import interpreted
"""
_COMPILED = """@triton_heuristics.user_autotune(
    configs={configs!r},
    inductor_meta={inductor_meta!r},
    triton_meta={triton_meta!r},
    filename=__file__,
    custom_kernel=True,
)"""


def start(
    wrapper: Any,
    launch: Launch,
    arguments: Mapping[str, Any],
    operands: Mapping[str, Any],
    device: torch.device,
    comment: Callable[[str], None],
) -> None:
    """Write the launch into a wrapper of Inductor's, and the kernel's definition before it if it has none yet.

    Args:
        comment: writes what stands above the call of a kernel, by its name.
        arguments: by parameter; tensors are fake.
        operands: what stands for those tensors in Inductor's graph.
    """
    raw = {name: operands.get(name, value) for name, value in arguments.items()}
    # A parameter that is None has a place all the same, and nobody reads what stands there.
    values = [v.codegen_reference() if n in operands else -1 if v is None else v for n, v in raw.items()]
    grid = [launch.programs, 1, 1]
    if device.type == "cpu":
        dtypes = [v.dtype if isinstance(v, Tensor) else None for v in arguments.values()]
        name = _define(wrapper, launch, device, f"@interpreted({dtypes})", _INTERPRETED)
        comment(name)
        given = [v if a is not None else None for v, a in zip(values, arguments.values(), strict=True)]
        wrapper.writeline(f"{name}.run({', '.join(map(str, [*given, *grid]))})")
        return
    triton_meta, inductor_meta = _meta(launch, arguments, operands, device)
    # Triton's defaults, which Inductor's launcher does not know of every device.
    settings = {"num_warps": 4, "num_stages": 3 if torch.version.hip is None else 2}
    settings.update({n: v for n, v in launch.constants.items() if n in settings})
    decorator = _COMPILED.format(configs=[settings], inductor_meta=inductor_meta, triton_meta=triton_meta)
    name = _define(wrapper, launch, device, decorator, TritonKernel.gen_common_triton_imports())
    comment(name)
    wrapper.generate_kernel_call(
        name,
        [*values, *grid],
        arg_types=[*(v.get_dtype() if n in operands else int for n, v in raw.items()), int, int, int],
        raw_args=[*raw.values(), *grid],
        raw_keys=[*raw, "", "", ""],
        triton_meta=triton_meta,
        inductor_meta={**inductor_meta, "kernel_name": name},
        device=device,
    )


def _meta(
    launch: Launch, arguments: Mapping[str, Any], operands: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what Triton is told of the kernel, what Inductor's launcher is told)."""

    def aligned(name: str) -> bool:
        o = operands[name]
        found = config_of([TensorArg(name, o.get_name(), o.get_dtype(), o.get_layout().offset)])
        return any(["tt.divisibility", 16] in attributes for attributes in found.values())

    types, constants, divisible = specialise(launch.kernel, arguments, aligned)
    triton_meta = {
        "signature": types,
        "device": DeviceProperties.create(device),
        "constants": constants,
        "configs": [AttrsDescriptorWrapper(divisible, ())],
        "launch_pdl": launch.constants.get("launch_pdl", False),
    }
    common = TritonKernel.inductor_meta_common()
    return triton_meta, {"kernel_name": _NAME, **FixedGrid.setup_grid_as_args(), **common}


def _define(wrapper: Any, launch: Launch, device: torch.device, decorator: str, imports: str) -> str:
    """The kernel's name in generated code, where it stands once however often it is launched.

    Branches and partitions of a graph have wrappers of their own, whose kernels all stand in one module.
    """
    root = wrapper
    while getattr(root, "parent_wrapper", None) is not None:
        root = root.parent_wrapper
    known: dict[str, str] = root.__dict__.setdefault("fx_nvfp4_kernels", {})
    text = textwrap.dedent(imports) + kernel_text(launch.kernel, _NAME, launch.constants, decorator)
    if text not in known:
        function = launch.kernel.fn
        known[text] = name = f"{function.__name__}_{len(known)}"
        source = text.replace(_NAME, name).replace("\\", "\\\\").replace("'''", "\\'\\'\\'")
        body = f"async_compile.triton({name!r}, '''\n{source}''', device_str={device.type!r})"
        wrapper.define_kernel(name, body, f"# From {function.__module__}, with {_written(launch.constants)}")
    return known[text]


def _written(constants: Mapping[str, Any]) -> str:
    return ", ".join(f"{n}={v}" for n, v in constants.items() if isinstance(v, (int, str)))


class InterpretedLauncher:
    """Stands for Inductor's launcher where Triton interprets kernels, on tensors of a CPU."""

    def __init__(self, kernel: Any, dtypes: Sequence[torch.dtype | None]) -> None:
        self._kernel = kernel
        self._dtypes = dtypes

    def run(self, *arguments: Any) -> None:
        *given, programs, _, _ = arguments
        self._kernel[(programs,)](*(_pointer(v, dtype) for v, dtype in zip(given, self._dtypes, strict=True)))


def interpreted(dtypes: Sequence[torch.dtype | None]) -> Callable[[Any], InterpretedLauncher]:
    """Decorator: the kernel with a launcher; dtypes are those of the elements that its parameters point to."""
    return lambda kernel: InterpretedLauncher(kernel, dtypes)


def _pointer(value: Any, dtype: torch.dtype | None) -> Any:
    """What is at a tensor's address, in the dtype that the kernel reads it as."""
    if dtype is None or value is None or value.dtype == dtype:
        return value
    offset = value.storage_offset() * value.element_size() // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(value.untyped_storage(), offset, (1,), (1,))  # type: ignore[call-overload]
