"""Under a torch of another version: one warning, and right numbers, whatever of its private names is gone.

By a changed torch.__version__; names that are gone, a pass that fails, an Inductor that fails. For packed tensors, a
block that calls the op itself, and dequantisation that the model spells.
"""

import warnings

import pytest
import torch
from routed_model import DEVICE, Routed, tokens
from spelled_models import SpelledMoE

from fx_nvfp4 import NotEmulatedError, NVFP4Warning, backend, untested
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.lowering import versions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    untested._warn_once.cache_clear()


@pytest.fixture(params=["2.10.1", "2.15.0.dev20261101+cpu", "3.0.0"])
def other(request, monkeypatch):
    monkeypatch.setattr(torch, "__version__", request.param)
    return request.param


@pytest.fixture
def lacking(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(versions, "NAMES", (*versions.NAMES, "torch._inductor:gone", "torch._gone.module:name"))


@pytest.fixture
def failing(monkeypatch):
    def fail(self, graph):
        raise AttributeError("'Node' object has no attribute 'meta'")

    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(backend.EmulationPass, "__call__", fail)


MODELS = {"packed": Routed, "spelled": lambda: SpelledMoE("dense", torch.float32).to(DEVICE)}


def said(model, calls=2, **options):
    """Our warnings of a model that gives right numbers."""
    run = torch.compile(model, backend="nvfp4_emu", options={"force_disable_caches": True, **options})
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in range(3, 3 + calls):
            torch.testing.assert_close(run(tokens(count)), model.reference(tokens(count)), rtol=1e-4, atol=1e-4)
    return [str(w.message) for w in caught if issubclass(w.category, NVFP4Warning)]


def test_this_torch_is_tested_and_has_every_name():
    assert versions.is_tested()
    assert versions.missing_names() == []
    assert said(Routed(), codegen=False) == []


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0", "2.14.1+cu130"])
def test_tested_versions(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert versions.is_tested()


@pytest.mark.parametrize("version", ["2.9.0", "2.15.0", "3.1", "unknown", "1.13.0"])
def test_untested_versions(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert not versions.is_tested()


@pytest.mark.in_part(6)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_one_warning_and_all_is_emulated(other, model):
    with collect_reports() as report:
        (warning,) = said(model(), codegen=False)
    assert f"torch {other} is none of the releases that it was tested with, {versions.tested()}" in warning
    assert report.matched
    assert not report.refused


@pytest.mark.in_part(4)
@pytest.mark.parametrize("codegen", [True, False])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.usefixtures("lacking")
def test_names_that_are_gone(model, codegen):
    with collect_reports() as report:
        (warning,) = said(model(), codegen=codegen)
    assert "It lacks torch._inductor:gone, torch._gone.module:name: packed tensors still run NVFP4 ops" in warning
    assert not report.graphs


@pytest.mark.in_part(2)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.usefixtures("failing")
def test_a_pass_that_fails(model):
    first, second = said(model(), codegen=False)
    assert "is none of the releases" in first
    assert "Recognising NVFP4 failed" in second
    assert "has no attribute 'meta'" in second


@pytest.mark.usefixtures("lacking")
def test_an_inductor_that_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("compile() takes other arguments")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    first, second = said(Routed())
    assert "It lacks" in first
    assert "Inductor failed (TypeError: compile() takes other arguments); the graph runs op by op" in second


@pytest.mark.parametrize("broken", ["lacking", "failing"])
def test_strict_raises_instead(request, broken):
    request.getfixturevalue(broken)
    with pytest.raises(Exception, match=r"It lacks torch._inductor:gone|no attribute 'meta'") as error:
        said(Routed(), strict=True)
    if broken == "lacking":
        assert isinstance(getattr(error.value, "inner_exception", error.value), NotEmulatedError)


def test_training_without_the_pass(lacking):
    model = Routed()
    run = torch.compile(model, backend="nvfp4_emu")

    def gradient(call):
        x = tokens(4).requires_grad_()
        return torch.autograd.grad(call(x).square().sum(), x)[0]

    with pytest.warns(NVFP4Warning, match="It lacks"):
        got = gradient(run)
    torch.testing.assert_close(got, gradient(model.reference), rtol=1e-4, atol=1e-4)


def test_a_torch_within_the_range_fails_loudly(monkeypatch):
    """There, what fails is a bug, and is to be seen."""

    def fail(self, graph):
        raise AttributeError("a bug of ours")

    monkeypatch.setattr(backend.EmulationPass, "__call__", fail)
    with pytest.raises(Exception, match="a bug of ours"):
        said(Routed())
