"""Experts over ranks give what one process gives: results and gradients, compiled and eager.

Guarded here: whole experts and parts of the intermediate dim; experts and blocks that do not divide evenly; all tokens
to one expert; slots of nobody; no token at all; tokens of each rank's own, of which one has none; a real checkpoint;
FSDP2 around packed weights; what is refused.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import shard_cases
import torch
from ranks import run_on_ranks
from torch import nn

import fx_nvfp4
from fx_nvfp4.checkpoints.reader import Reader
from fx_nvfp4.parallel.cut import share
from fx_nvfp4.tensor import PART_OF_K

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
MODEL = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"


def check(results, tolerance=1e-5):
    """Of every rank and case: what the shards gave is what one process gave."""
    assert results
    for rank, cases in enumerate(results):
        for name, (got, want) in cases.items():
            for g, w in zip(got, want, strict=True):
                assert g.shape == w.shape, (rank, name)
                if w.numel():
                    assert (g - w).abs().max() <= tolerance * max(float(w.abs().max()), 1e-6), (rank, name)


def on_gpus(ranks):
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    marks = [pytest.mark.gpu, pytest.mark.skipif(not enough, reason=f"needs {ranks} GPUs")]
    return pytest.param(ranks, "cuda", marks=marks)


@pytest.mark.parametrize(
    ("ranks", "device"), [(2, "cpu"), pytest.param(4, "cpu", marks=pytest.mark.slow), on_gpus(2), on_gpus(4)]
)
def test_shards_give_what_one_process_gives(ranks, device, tmp_path):
    results = run_on_ranks(shard_cases.every_case, ranks, tmp_path, device=device)
    sizes, whole = zip(*(cases.pop("parts") for cases in results), strict=True)
    assert torch.equal(torch.stack(sizes).sum(0), whole[0].expand(2))  # nothing twice, nothing lost
    assert max(s.max() for s in sizes) < 2 * whole[0] / ranks
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "device"), [(2, "cpu"), (4, "cpu"), on_gpus(2), on_gpus(4)])
def test_a_checkpoint_over_ranks(ranks, device, tmp_path):
    pytest.importorskip("transformers")
    # W4A4: an activation that a sum in another order moves past a boundary would show as 1e-2.
    check(run_on_ranks(shard_cases.checkpoint, ranks, tmp_path, str(MODEL), device=device), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "device"), [(2, "cpu"), on_gpus(2)])
def test_fsdp_around_packed_experts(ranks, device, tmp_path):
    check(run_on_ranks(shard_cases.fully_sharded, ranks, tmp_path, device=device))


@pytest.mark.parametrize(("ranks", "device"), [(2, "cpu"), on_gpus(2)])
def test_linear_layers_by_the_model_s_plan_and_by_one_s_own(ranks, device, tmp_path):
    pytest.importorskip("transformers")
    results = run_on_ranks(shard_cases.linear_layers, ranks, tmp_path, device=device)
    check([{"dense": cases.pop("dense")} for cases in results])
    # W4A4: an activation that a sum in another order moves past a boundary would show as 1e-2.
    check(results, 1e-4)


@pytest.mark.slow  # two ranks are among the cases above
def test_dense_linear_layers_over_four_ranks(tmp_path):
    check(run_on_ranks(shard_cases.dense_linear_layers, 4, tmp_path))


def mesh(ranks, ndim=1):
    return SimpleNamespace(ndim=ndim, size=lambda: ranks)


def test_what_is_no_mesh_is_told():
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh, got None: torch.distributed.init_device_mesh"):
        fx_nvfp4.shard_experts(shard_cases.fused(), None)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (shard_cases.fused, (mesh(7),), "6 experts are too few for 7 ranks"),
        (shard_cases.fused, (mesh(6), "intermediate"), "5 blocks of 16 .* too few for 6 ranks"),
        (shard_cases.fused, (mesh(2, ndim=2),), "mesh must have one dim"),
        (shard_cases.fused, (mesh(2), "rows"), "dim must be one of"),
        (shard_cases.fused, (mesh(2), "intermediate", "own"), "needs every token"),
        (lambda: shard_cases.fused(activations="dynamic"), (mesh(2), "intermediate"), "calibrate for static scales"),
        (lambda: nn.Linear(3, 3), (mesh(2),), r"holds no packed experts .*lists of packed experts, fx_nvfp4\.prepare"),
    ],
)
def test_refusals_say_what_to_do(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        fx_nvfp4.shard_experts(model(), *arguments)


def attention(rows=64, sinks=False):
    model = nn.Module()
    model.q_proj, model.head_dim = nn.Linear(32, rows), 32
    if sinks:
        model.sinks = nn.Parameter(torch.zeros(2))
    return model


def packed_pair(activations="none"):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(activations=activations))
    return model


@pytest.mark.parametrize(
    ("model", "ranks", "plan", "message"),
    [
        (packed_pair(), 2, None, "names no linear layer of the model"),
        (packed_pair(), 2, {"0": "colwise_gather_output"}, "names no linear layer of the model"),
        (packed_pair(), 5, {"0": "colwise"}, "0: 48 rows are no equal parts for 5 ranks"),
        (packed_pair(), 2, {"1": "rowwise"}, "1: 3 blocks of 16 in K are no equal parts for 2 ranks"),
        (packed_pair("dynamic"), 3, {"1": "rowwise"}, "1: its activations have a dynamic scale"),
        (attention(rows=32), 2, {"q_proj": "colwise"}, "q_proj: 32 rows are 1 heads of 32, no equal parts for 2 ranks"),
        (attention(sinks=True), 2, {"q_proj": "colwise"}, "q_proj: its attention holds sinks for all heads"),
    ],
)
def test_linear_layers_that_cannot_be_cut_are_named(model, ranks, plan, message):
    before = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        fx_nvfp4.shard_linears(model, mesh(ranks), plan)
    assert [p.shape for p in model.parameters()] == before


def test_a_part_of_k_is_not_calibrated():
    """Each rank found a scale of its own, and the logits were off by 7 %."""
    model = packed_pair("static")
    setattr(model[1].weight, PART_OF_K, True)
    message = r"holds a part of K of 1.weight.*calibrate the whole model, then shard it"
    with pytest.raises(ValueError, match=message), fx_nvfp4.calibrate(model):
        pass


def test_parameters_that_fsdp_leaves_alone():
    """It took biases of each rank's own experts for copies of one tensor, and mixed them."""
    some = SimpleNamespace(ndim=1, size=lambda: 2, get_local_rank=lambda: 0, get_group=lambda: None)
    model = nn.ModuleDict({"experts": shard_cases.fused(), "norm": nn.LayerNorm(4)})
    fx_nvfp4.shard_experts(model, some)
    own = fx_nvfp4.sharded_parameters(model)
    assert own == set(model.experts.parameters())
    assert {name for name, p in model.named_parameters() if p in own} >= {"experts.gate_up_proj_bias"}


def test_unknown_modules_of_experts_are_refused():
    module = nn.Module()
    module.w = nn.Parameter(fx_nvfp4.NVFP4Weight.from_dense(torch.randn(4, 16, 16)), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts: Module holds packed experts .*FusedExperts"):
        fx_nvfp4.shard_experts(nn.ModuleDict({"experts": module}), mesh(2))


def test_dynamic_scales_of_a_part_of_k_are_refused():
    """The option made weight-only weights round by the largest activation that this rank saw, in silence."""
    two = SimpleNamespace(ndim=1, size=lambda: 2, get_local_rank=lambda: 0, get_group=lambda: None)
    w = fx_nvfp4.shard_experts(shard_cases.fused(), two, "intermediate").down_proj
    run = torch.compile(lambda x: x @ w.mT, backend="nvfp4_emu", options={"activations": "nvfp4", "codegen": False})
    with torch.no_grad(), pytest.raises(Exception, match="sharded by its intermediate dim"):
        run(torch.randn(w.shape[0], 3, w.shape[2]))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["new_zeros", "empty_like"])
def test_engines_that_would_copy_packed_weights_are_told_what_to_do(name):
    """FSDP2 makes its shards with one, distribute_tensor with the other."""
    weight = fx_nvfp4.NVFP4Weight.from_dense(torch.randn(16, 16))
    make = {"new_zeros": lambda: weight.new_zeros(3, 16), "empty_like": lambda: torch.empty_like(weight)}[name]
    with pytest.raises(NotImplementedError, match="ignored_params"):
        make()


def tiny_model(folder, kind):
    """A checkpoint with experts one by one, or stacked in 3-D with biases and, stored so, transposed."""
    if kind == "one by one":
        return MODEL
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(activations="static", global_scale="fused"))
    with fx_nvfp4.calibrate(model):
        model(torch.arange(48).view(2, 24))
    fx_nvfp4.save(model, folder, "modelopt")
    return folder


@pytest.mark.parametrize("kind", ["one by one", "stacked"])
def test_each_rank_reads_its_own_experts(kind, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    folder, read = tiny_model(tmp_path, kind), []
    into = Reader.read_into
    monkeypatch.setattr(
        Reader, "read_into", lambda r, t, part, start=0: read.append(part.nbytes) or into(r, t, part, start)
    )
    whole = fx_nvfp4.load(folder, progress=False)
    everything, experts = sum(read), whole.model.layers[0].mlp.experts
    names = [name for name, _ in experts.named_parameters()]
    of_experts = sum(t.nbytes for t in experts.state_dict().values() if not hasattr(t, "qdata"))
    of_experts += sum(
        t.qdata.nbytes + t.block_scale.nbytes for t in experts.state_dict().values() if hasattr(t, "qdata")
    )
    of_experts *= len(whole.model.layers)
    for rank in range(3):
        read.clear()
        some = SimpleNamespace(ndim=1, size=lambda: 3, get_local_rank=lambda rank=rank: rank)
        model = fx_nvfp4.load(folder, progress=False, mesh=some)
        mine = share(experts.down_proj.shape[0], rank, 3)
        got = model.model.layers[0].mlp.experts
        assert got.num_experts == len(mine)
        for name in names:
            want, part = getattr(experts, name).data[mine.start : mine.stop], getattr(got, name).data
            for attribute in part.__tensor_flatten__()[0] if isinstance(part, fx_nvfp4.NVFP4Weight) else [None]:
                pair = (part, want) if attribute is None else (getattr(part, attribute), getattr(want, attribute))
                assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in pair)), (name, attribute)
        left = of_experts * (1 - len(mine) / experts.down_proj.shape[0])
        assert sum(read) <= everything - 0.99 * left


def test_a_part_is_neither_saved_as_a_model_nor_sharded_again(tmp_path):
    pytest.importorskip("transformers")
    some = SimpleNamespace(ndim=1, size=lambda: 2, get_local_rank=lambda: 0)
    model = fx_nvfp4.load(MODEL, progress=False, mesh=some)
    with pytest.raises(ValueError, match="holds a part of the model alone"):
        fx_nvfp4.save(model, tmp_path)
    with pytest.raises(ValueError, match="sharded already"):
        fx_nvfp4.shard_experts(model, some)


def test_shares_are_even_and_whole():
    for count, ranks in ((6, 4), (5, 5), (128, 8), (7, 2)):
        shares = [share(count, rank, ranks) for rank in range(ranks)]
        assert [i for s in shares for i in s] == list(range(count))
        assert {len(s) for s in shares} <= {count // ranks, -(-count // ranks)}
