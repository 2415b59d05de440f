"""Without a GPU the Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Triton reads the variable when a kernel is decorated, so it has to be set before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

    from triton_interpreter import repair

    repair()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> str:
    """Where tests run natively: the GPU if there is one."""
    return "cuda" if HAS_GPU else "cpu"
