"""Adapters beside frozen packed weights, as examples/lora.py trains them.

Guarded here: the loss falls; gradients are those of the dequantised model, compiled and eager; what forward keeps for
backward is packed parts and activations; peft's own adapters, where it is installed.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import NVFP4Weight

EXAMPLE = Path(__file__).parents[1] / "examples" / "lora.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lora():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(params=["eager", "compiled"])
def way(request):
    torch._dynamo.reset()
    if request.param == "eager":
        return lambda model: model
    return lambda model: torch.compile(model, backend="nvfp4_emu", fullgraph=True, options={"codegen": False})


@pytest.fixture
def setting(lora):
    """The example's model after a few steps, when no adapter is zero any more, with inputs and targets."""
    torch.manual_seed(0)
    model, target = lora.build()
    x = torch.randn(40, lora.HIDDEN)
    y = target(x)
    lora.train(model, model, x, y, steps=3)
    return model, x, y


def test_the_loss_falls_and_packed_weights_stay(lora, way):
    torch.manual_seed(0)
    model, target = lora.build()
    x = torch.randn(64, lora.HIDDEN)
    codes = model.experts.down_proj.data.qdata.clone()
    losses = lora.train(way(model), model, x, target(x), steps=30)
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model.experts.down_proj.data.qdata, codes)


def test_gradients_are_those_of_the_dequantised_model(lora, way, setting):
    model, x, y = setting
    dense = lora.dequantized(model)
    got, want = lora.gradients(way(model), model, x, y), lora.gradients(dense, dense, x, y)
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 0
        assert (g - w).abs().max() <= 2e-5 * w.abs().max()


def test_what_is_kept_for_backward_is_packed_or_an_activation(lora, way, setting):
    model, x, y = setting
    run, kept = way(model), []
    run(x)  # compiles
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = F.mse_loss(run(x), y)
    loss.backward()
    assert len([t for t in kept if is_packed(t)]) >= 2
    trained = {p.data_ptr() for p in model.parameters() if not isinstance(p.data, NVFP4Weight)}
    rows = lora.TOP_K * len(x)
    for tensor in kept:
        if is_packed(tensor) or tensor.data_ptr() in trained or tensor.numel() < lora.HIDDEN**2:
            continue
        # An activation has a row for each token or each of its experts, whose adapters are the widest of them.
        assert tensor.shape[0] in (len(x), rows), tensor.shape
        assert tensor.numel() <= rows * 2 * lora.INNER * lora.RANK, tensor.shape


def is_packed(tensor):
    return isinstance(tensor, NVFP4Weight) or tensor.dtype in (torch.uint8, torch.float8_e4m3fn)


def test_peft_adapters_train_beside_packed_linears():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).requires_grad_(False)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(NVFP4Weight.from_dense(layer.weight.data), requires_grad=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x, run = torch.randn(16, 64), torch.compile(adapted, backend="nvfp4_emu", options={"codegen": False})
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 4
    got = torch.autograd.grad(run(x).square().sum(), trained)
    for layer in (model[0], model[2]):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.dequantize(), requires_grad=False)
    want = torch.autograd.grad(adapted(x).square().sum(), trained)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
