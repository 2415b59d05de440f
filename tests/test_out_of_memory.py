"""Where memory runs out, or anything else fails half way, weights and models are as they were.

Failures are simulated at each step of permuting in turn, and while a checkpoint is read.
"""

import gc
import os
import sys

import pytest
import torch
from checkpoint_files import SMALL
from routed_model import Routed, tokens
from test_tensor import E, K, N, make_weight, same

import fx_nvfp4
from fx_nvfp4 import tiling
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.checkpoints import assemble, transfer
from fx_nvfp4.layouts import is_tiled

module = sys.modules["fx_nvfp4.prepack"]  # fx_nvfp4.prepack is the function
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def short():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")


class Failing:
    """A function that raises at one of its calls, a new error each time: each keeps the frames that it went through."""

    def __init__(self, function, call, error=short):
        self.function, self.left, self.error = function, call, error

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise self.error()
        return self.function(*args)


class After:
    """A method at whose call number so and so the user's interrupt comes once it is done."""

    def __init__(self, function, call):
        self.function, self.left = function, call

    def __get__(self, instance, owner=None):
        def call(*args, **kwargs):
            result = self.function(instance, *args, **kwargs)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        return call


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 16 * K)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("error", [short, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["_shuffle", "_scales_by_lane"])
@pytest.mark.parametrize("call", [1, 2, 7])
def test_a_weight_that_cannot_be_permuted_to_the_end_is_put_back(monkeypatch, call, step, error, inference):
    with torch.inference_mode(inference):
        weight = make_weight()
    before, place = weight.clone(), weight.qdata.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(module, step, Failing(getattr(module, step), call, error))
        with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt)):
            weight.tile_()
    assert same(weight, before)
    assert weight.qdata.data_ptr() == place
    assert same(weight.tile_(), before.tiled())


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_at_any_write_leaves_the_weight(monkeypatch, at):
    """Half of the rows that were being written stayed tiles, under the dtype of codes."""
    weight = make_weight()
    before = weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", After(torch.Tensor.copy_, at))
        with pytest.raises(KeyboardInterrupt):
            weight.tile_()
    assert same(weight, before)


def test_an_interrupt_after_all_writes_leaves_the_weight(monkeypatch):
    weight = make_weight()
    before = weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(module.Rewriting, "write", After(module.Rewriting.write, 1))
        with pytest.raises(KeyboardInterrupt):
            weight.tile_()
    assert same(weight, before)
    assert same(weight.tile_(), before.tiled())


def test_a_weight_in_the_middle_of_a_storage_is_put_back():
    weight = make_weight((2 * E, N, K))[E:]
    want = weight.dequantize()
    shapes = weight.qdata.shape, weight.block_scale.shape
    words, scales = tiling._reinterpreted(weight)
    assert words.storage_offset() > 0
    module.write_tiles(weight.qdata, weight.block_scale, words, scales)
    weight.qdata.data, weight.block_scale.data = words, scales
    assert torch.equal(weight.dequantize(), want)
    tiling.untile_(weight, *shapes)
    assert weight.qdata.shape == shapes[0]
    assert torch.equal(weight.dequantize(), want)


def test_copies_in_tiles_never_write_to_their_source(monkeypatch):
    weight = make_weight()
    before = weight.clone()
    monkeypatch.setattr(module, "_shuffle", Failing(module._shuffle, 2))
    with pytest.raises(torch.OutOfMemoryError):
        weight.tiled()
    assert same(weight, before)


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6])
@torch.no_grad()
def test_experts_stay_together_where_memory_runs_out(monkeypatch, call):
    """Four pieces for each weight of the block: the second has begun when memory is short, and others wait."""
    model = Routed()
    before, want = {n: getattr(model.experts, n).clone() for n in EXPERTS}, model(tokens(5))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_shuffle", Failing(module._shuffle, call))
        done = fx_nvfp4.prepack(model)
    assert sorted(done.left) == sorted(f"experts.{n}" for n in EXPERTS)
    assert "no memory to permute it (CUDA out of memory. Tried to allocate 2.00 GiB.)" in done.left["experts.up_proj"]
    assert all(same(getattr(model.experts, n), before[n]) for n in EXPERTS)
    assert done.converted == ["head.weight"]
    torch.testing.assert_close(model(tokens(5)), want)
    assert sorted(fx_nvfp4.prepack(model).converted) == sorted(done.left)
    torch.testing.assert_close(model(tokens(5)), want)


@torch.no_grad()
def test_another_error_is_raised_and_experts_stay_together(monkeypatch):
    model = Routed()
    want = model(tokens(5))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_shuffle", Failing(module._shuffle, 6, lambda: RuntimeError("device lost")))
        with pytest.raises(RuntimeError, match="device lost"):
            fx_nvfp4.prepack(model)
    assert not any(is_tiled(getattr(model.experts, n).qdata) for n in EXPERTS)
    torch.testing.assert_close(model(tokens(5)), want)


@torch.no_grad()
def test_compiling_goes_on_with_what_cannot_be_permuted(monkeypatch):
    model = Routed()
    want = model(tokens(5))
    monkeypatch.setattr(module, "_shuffle", lambda codes: Failing(None, 1)())
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False, "prepack": "always"})
    with collect_reports() as report:
        torch.testing.assert_close(run(tokens(5)), want)
    assert "not in tiles: no memory to permute it" in report.notes[0]
    assert not is_tiled(model.head.weight.qdata)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("where", ["allocating", "reading"])
def test_a_load_that_fails_leaves_nothing_behind(monkeypatch, where):
    pytest.importorskip("transformers")
    model = fx_nvfp4.load(SMALL, progress=False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model(ids).logits
    files, dtype = len(os.listdir("/proc/self/fd")), torch.get_default_dtype()
    owner, name = (assemble.Assembler, "_empty") if where == "allocating" else (transfer.Mover, "move")
    failing = Failing(getattr(owner, name), 20)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args: failing(*args))
        with pytest.raises(torch.OutOfMemoryError):
            fx_nvfp4.load(SMALL, progress=False)
    assert torch.get_default_dtype() == dtype
    gc.collect()  # the error's frames refer to each other
    assert len(os.listdir("/proc/self/fd")) <= files
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
        assert torch.equal(fx_nvfp4.load(SMALL, progress=False)(ids).logits, want)
