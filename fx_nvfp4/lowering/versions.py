"""The releases of torch that :mod:`.compat` was tested with, and the private names that it needs of any other."""

from __future__ import annotations

import importlib
from operator import attrgetter

import torch

OLDEST, NEWEST = (2, 11), (2, 14)
# module:attribute of what the backend cannot do without; other names that compat.py uses serve debugging.
NAMES = (
    "torch._inductor.custom_graph_pass:CustomGraphPass",
    "torch._inductor.config:joint_custom_pre_pass",
    "torch._inductor.config:force_disable_caches",
    "torch._inductor.compile_fx:compile_fx",
    "torch._inductor.decomposition:select_decomp_table",
    "torch._inductor.runtime.cache_dir_utils:cache_dir",
    "torch._functorch._aot_autograd.descriptors:PlainAOTInput",
    "torch._functorch._aot_autograd.descriptors:SubclassGetAttrAOTInput",
    "torch._logging:trace_structured",
    "functorch.compile:make_boxed_func",
)


def is_tested() -> bool:
    """Whether this torch is one of those; a nightly build counts as the release that it leads to."""
    parts = torch.__version__.split(".")[:2]
    if not all(part.isdigit() for part in parts):
        return False
    return OLDEST <= tuple(map(int, parts)) <= NEWEST


def missing_names() -> list[str]:
    """Those of NAMES that this torch does not have."""
    return [name for name in NAMES if not _exists(*name.split(":"))]


def tested() -> str:
    """The tested releases in words."""
    return f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"


def _exists(module: str, attribute: str) -> bool:
    try:
        attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True
