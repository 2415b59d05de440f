"""Without a GPU the Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped."""

import gc
import os
import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Cores are busy with other tests: no pool of compilers beside each of them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Nor threads that wait for each other: small products gain nothing from them. test_cpu.py takes several.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

if not HAS_GPU:
    # Triton reads the variable when a kernel is decorated, so it has to be set before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

    from triton_interpreter import repair

    repair()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _leave_in_part_to_slow(items)
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _leave_in_part_to_slow(items: list[pytest.Item]) -> None:
    """Of tests marked in_part(n), one case in n runs always, by a draw that is the same each time; others are slow."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("in_part") and not item.get_closest_marker("slow"):
            cases[item.nodeid.split("[")[0]].append(item)
    for name, of_one in cases.items():
        n = of_one[0].get_closest_marker("in_part").args[0]
        kept = set(random.Random(name).sample(range(len(of_one)), -(-len(of_one) // n)))
        for i, item in enumerate(of_one):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_configure() -> None:
    """Tests ask for fresh caches, but what C++ compiles to is a matter of its text and flags: each is compiled once."""
    from torch._inductor import codecache  # imports triton, for which the variable has to be set

    for name in ("CppCodeCache", "CppPythonBindingsCodeCache"):
        if cache := getattr(codecache, name, None):
            cache.cache_clear = staticmethod(lambda: None)


def pytest_collection_finish() -> None:
    """Modules and tests stay, and compilers make many objects: without this, a tenth of the time is spent looking."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extensions report at exit what was never freed


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
