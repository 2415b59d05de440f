"""State dicts of sharded models by way of torch.distributed.checkpoint, into models that are cut in another way.

Guarded here: by experts and by the intermediate dim, each into the other, into one process and a mesh of one; parts
that torch.chunk would not make; rows that hold gate and up, one after the other and in turns; biases that the first
rank alone has; weights in tiles; linear layers, packed and dense; a real checkpoint; FSDP2 beside it; what is refused.
"""

import contextlib
import copy
import itertools

import pytest
import shard_states
import torch
from ranks import run_on_ranks
from shard_states import Model, load, plain, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fx_nvfp4

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@contextlib.contextmanager
def one_rank(meeting):
    """A mesh of one rank, which is this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with one_rank(tmp_path / "meeting") as found:
        yield found


GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]
CONCATENATED = {"layout": "concatenated"}
EVERY_KIND = [
    *({"layout": "interleaved"}, {"layout": "separate", "activations": "none"}, {"layout": "plain"}),
    {"layout": "concatenated", "inner": 192, "tiled": True},
]


@pytest.mark.parametrize(
    ("ranks", "kinds", "device"),
    [
        (2, [CONCATENATED], "cpu"),
        pytest.param(2, EVERY_KIND, "cpu", marks=pytest.mark.slow),
        # torch.chunk leaves nothing to the last rank
        pytest.param(4, [CONCATENATED, *EVERY_KIND], "cpu", marks=pytest.mark.slow),
        pytest.param(2, [CONCATENATED, *EVERY_KIND], "cuda", marks=GPUS),
    ],
)
def test_what_ranks_save_others_load(ranks, kinds, device, tmp_path):
    results = run_on_ranks(shard_states.round_trips, ranks, tmp_path, str(tmp_path), kinds, device=device)
    for name, dim in results[0]:
        assert all(torch.equal(found[name, dim], results[0][name, dim]) for found in results)
    if CONCATENATED not in kinds:
        return
    for dim in shard_states.DIMS:
        model = Model(seed=1)  # whole, in a process that knows of no other
        load(model, f"{tmp_path}/concatenated-{dim}")
        assert same(plain(model), plain(Model()))
    with one_rank(tmp_path / "alone") as mesh:
        for source, dim in itertools.product(shard_states.DIMS, shard_states.DIMS):
            model = shard_states.cut(mesh, dim, seed=1)
            load(model, f"{tmp_path}/concatenated-{source}")
            assert same(plain(model), plain(Model()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "GptOss"])
def test_models_of_transformers(kind, tmp_path):
    pytest.importorskip("transformers")
    results = run_on_ranks(shard_states.real_models, 2, tmp_path, kind, str(tmp_path))
    assert all(torch.equal(found, results[1][name]) for name, found in results[0].items())


@pytest.mark.slow
def test_experts_beside_what_fsdp_shards(tmp_path):
    run_on_ranks(shard_states.around_fsdp, 2, tmp_path, str(tmp_path / "saved"))


def test_a_mesh_of_one(mesh, tmp_path):
    shard_states.round_trips(0, 1, "cpu", str(tmp_path), [{"layout": "separate"}])


def test_a_copy_of_a_sharded_model(mesh):
    model = shard_states.cut(mesh, "intermediate")
    state, copied = map(fx_nvfp4.sharded_state_dict, (model, copy.deepcopy(model)))
    assert same(copied, state)
    assert all(a.placements == state[n].placements for n, a in copied.items() if isinstance(a, DTensor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("experts.down_proj.qdata"), r"lacks experts\.down_proj\.qdata, .*sharded_state_dict\(model\)"),
        (lambda s: s.pop("norm.weight"), r"lacks norm\.weight"),
        (lambda s: s.update(other=torch.zeros(1)), r"has other, which the model lacks: fill what"),
        (
            lambda s: s.update({"experts.gate_up_proj.global_scale": torch.zeros(5, 2, 80)}),
            r"experts\.gate_up_proj\.global_scale: expected a DTensor torch\.float32 \[5, 2, 80\], "
            r"\(Shard\(dim=0\),\) on DeviceMesh.*, found a plain tensor torch\.float32 \[5, 2, 80\]: fill what",
        ),
        (
            lambda s: s.update({"packed.0.weight.qdata": s["packed.2.weight.qdata"]}),
            r"packed\.0\.weight\.qdata: expected a DTensor torch\.uint8 \[128, 32\], .* found .* \[64, 64\], "
            r"\(Shard\(dim=1\)",
        ),
        (
            lambda s: s.update({"whole.weight.block_scale_bytes": torch.zeros(64, 4)}),
            r"whole\.weight\.block_scale_bytes: expected a plain tensor torch\.uint8 \[64, 4\], found .*float32",
        ),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm\.bias: expected .* \[64\], found .* \[3\]"),
        (lambda s: s.update({"norm.bias": None}), r"norm\.bias: expected .* \[64\], found None"),
    ],
)
def test_states_that_do_not_fit_are_refused_whole(change, message, mesh):
    model = shard_states.cut(mesh, "expert")
    state = fx_nvfp4.sharded_state_dict(shard_states.cut(mesh, "expert", seed=1))
    change(state)
    with pytest.raises(ValueError, match=f"load_sharded_state_dict: .*{message}"):
        fx_nvfp4.load_sharded_state_dict(model, state)
    assert same(plain(model), plain(shard_states.cut(mesh, "expert")))


def test_a_state_of_a_sharded_model_for_one_that_is_not(mesh):
    state = fx_nvfp4.sharded_state_dict(shard_states.cut(mesh, "expert"))
    with pytest.raises(ValueError, match=r"qdata: expected a plain tensor .*, found a DTensor .*of this model"):
        fx_nvfp4.load_sharded_state_dict(Model(), state)


def test_a_layer_that_was_quantised_after_it_was_sharded(mesh):
    """Its ranks' global scales differ, and one of them would have stood for all."""
    model = shard_states.cut(mesh, "expert")
    fx_nvfp4.quantize_(model, filter_fn=lambda module, path: path == "dense.0")
    with pytest.raises(ValueError, match=r"dense\.0\.weight: it was sharded dense and is packed now.* then shard it"):
        fx_nvfp4.sharded_state_dict(model)


def test_a_model_that_is_not_sharded_has_plain_tensors():
    state = fx_nvfp4.sharded_state_dict(Model())
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert {name: list(t.shape) for name, t in state.items() if name.startswith("experts.gate_up_proj")} == {
        "experts.gate_up_proj.qdata": [5, 2, 80, 32],
        "experts.gate_up_proj.block_scale_bytes": [5, 2, 80, 4],
        "experts.gate_up_proj.global_scale": [5, 2, 80],
        "experts.gate_up_proj.act_scale": [5],
        "experts.gate_up_proj_bias": [5, 2, 80],
    }
