"""State dicts of models in tiles: canonical, as they were before; a file of tiles was of no use to anyone else."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_nvfp4
from fx_nvfp4.layouts import is_tiled

MODEL = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Sequential(nn.Linear(128, 64))).bfloat16()
    fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(activations="none"))
    return model


def parts(state):
    return {
        f"{name}.{part}": getattr(tensor, part).clone().view(torch.uint8)
        for name, tensor in state.items()
        if isinstance(tensor, fx_nvfp4.NVFP4Weight)
        for part in ("qdata", "block_scale")
    }


def same(state, before):
    after = parts(state)
    return after.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in after.items())


def by_prepack(model):
    fx_nvfp4.prepack(model)


def by_compilation(model):
    run = torch.compile(model, backend="nvfp4_emu", options={"codegen": False, "prepack": "always"})
    with torch.no_grad():
        run(torch.ones(3, 64, dtype=torch.bfloat16))


def by_compilation_of_a_function_around_it(model):
    by_compilation(lambda x: model(x) + 1)


@pytest.mark.parametrize("tile", [by_prepack, by_compilation, by_compilation_of_a_function_around_it])
def test_weights_in_tiles_are_stored_as_they_were(tile):
    model = small()
    before = parts(model.state_dict())
    tile(model)
    assert all(is_tiled(m.weight.qdata) for m in model.modules() if isinstance(m, nn.Linear))
    for one in (model, copy.deepcopy(model)):
        assert same(one.state_dict(), before)
        assert all(is_tiled(m.weight.qdata) for m in one.modules() if isinstance(m, nn.Linear))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), before)
    other = small()
    other.load_state_dict(model.state_dict())
    assert same(other.state_dict(), before)


def test_parameters_themselves_are_given_to_who_asks_for_them():
    model = small()
    fx_nvfp4.prepack(model)
    assert all(t is model.get_parameter(name) for name, t in model.state_dict(keep_vars=True).items())


def test_hooks_do_not_add_up():
    model = small()
    for _ in range(3):
        fx_nvfp4.prepack(model)
    assert len(model[0]._state_dict_hooks) == 1


def test_a_checkpoint_that_is_loaded_into_tiles():
    pytest.importorskip("transformers")
    plain, tiled = (
        fx_nvfp4.load(MODEL, dtype=torch.bfloat16, progress=False, prepack=prepack) for prepack in (False, True)
    )
    assert any(is_tiled(p.qdata) for p in tiled.parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight))
    assert same(tiled.state_dict(), parts(plain.state_dict()))
