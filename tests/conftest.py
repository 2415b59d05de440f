"""Without a GPU the Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped."""

import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products gain nothing from more, and tests that run beside this one lose."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
