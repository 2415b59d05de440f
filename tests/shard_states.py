"""What the ranks of test_sharded_state.py run: models cut one way, saved, and loaded into models cut another way."""

import itertools
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from quantized_models import transformers_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fx_nvfp4
from fx_nvfp4 import NVFP4Weight
from fx_nvfp4.fused import DOWN_NAME, UP_NAMES, FusedExperts

EXPERTS, HIDDEN, INNER = 5, 64, 80  # over two ranks: 2 and 3 experts and blocks, where torch.chunk has 3 and 2
MODEL = Path(__file__).parent / "data" / "modelopt_mixtral_w4a4"
DIMS = ("expert", "intermediate")
LINEARS = {"packed.0": "colwise", "packed.2": "rowwise", "dense.0": "colwise", "dense.2": "rowwise"}


class Model(nn.Module):
    """Experts with biases, linear layers, packed and dense, and what nobody cuts, packed and dense."""

    def __init__(self, layout="concatenated", activations="static", inner=INNER, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        rows = inner * (2 if layout in ("concatenated", "interleaved") else 1)
        shapes = {**dict.fromkeys(UP_NAMES[layout], (EXPERTS, rows, HIDDEN)), DOWN_NAME: (EXPERTS, HIDDEN, inner)}
        scale = torch.rand(EXPERTS).double() * 1e-2 + 1e-2 if activations == "static" else None
        weights = {n: NVFP4Weight.from_dense(torch.randn(s) * 0.3, activations, scale) for n, s in shapes.items()}
        biases = {n: torch.randn(s[:2]) for n, s in shapes.items()}
        activation = "silu(u)" if layout == "plain" else "silu(g) * u"
        self.experts = FusedExperts(weights, biases, activation, layout)
        self.packed = nn.Sequential(nn.Linear(HIDDEN, 128), nn.SiLU(), nn.Linear(128, HIDDEN))
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.whole = nn.Linear(HIDDEN, HIDDEN)
        fx_nvfp4.quantize_(self)
        self.dense = nn.Sequential(nn.Linear(HIDDEN, 12), nn.SiLU(), nn.Linear(12, HIDDEN))
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.eval().requires_grad_(False)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.norm(self.whole(self.dense(self.packed(self.experts(x, ids, weights)))))


def cut(mesh, dim, tiled=False, **kwargs):
    """A model of which each rank has a part."""
    model = fx_nvfp4.shard_experts(Model(**kwargs).to(mesh.device_type), mesh, dim)
    fx_nvfp4.shard_linears(model, mesh, LINEARS)
    if tiled:
        left = fx_nvfp4.prepack(model).left
        assert ("experts.down_proj" in left) == (dim == "intermediate"), left
    return model


def run(model):
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(5))
    return model(x.to(model.norm.weight.device))


def plain(model):
    """All tensors that a model holds on this rank, packed weights by their parts."""
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        parts = value.__tensor_flatten__()[0] if isinstance(value, NVFP4Weight) else []
        found |= {f"{name}.{part}": getattr(value, part) for part in parts} or {name: value}
    return found


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(found, wanted):
    """Whether tensors of the same names have the same bytes."""
    assert found.keys() == wanted.keys()
    found, wanted = ({n: local(t) for n, t in tensors.items()} for tensors in (found, wanted))
    pairs = {name: (t.contiguous().flatten(), wanted[name].contiguous().flatten()) for name, t in found.items()}
    differ = [n for n, (a, b) in pairs.items() if not torch.equal(a.view(torch.uint8), b.view(torch.uint8))]
    assert not differ, differ
    return True


def load(model, path):
    """What a user does; the memory of the model stays where it is."""
    where = {name: local(t).data_ptr() for name, t in plain(model).items()}
    state = fx_nvfp4.sharded_state_dict(model)
    dcp.load(state, checkpoint_id=path)
    fx_nvfp4.load_sharded_state_dict(model, state)
    assert where == {name: local(t).data_ptr() for name, t in plain(model).items()}


def round_trips(rank, ranks, device, folder, kinds, dims=DIMS):
    """Save each kind of model cut by each dim; load it into others, cut by each. Returns what models of seed 0 give."""
    mesh, found = init_device_mesh(device, (ranks,)), {}
    for kind in kinds:
        name = "-".join(map(str, kind.values()))
        uncut = fx_nvfp4.sharded_state_dict(Model(**{k: v for k, v in kind.items() if k != "tiled"}).to(device))
        for source in dims:
            model = cut(mesh, source, **kind)
            state = fx_nvfp4.sharded_state_dict(model)
            assert same({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}, uncut)
            assert all(state[n].shape == t.shape for n, t in uncut.items())
            dcp.save(state, checkpoint_id=f"{folder}/{name}-{source}")
            found[name, source] = run(model)
        for source, dim in itertools.product(dims, dims):
            model, wanted = cut(mesh, dim, seed=1, **kind), cut(mesh, dim, **kind)
            load(model, f"{folder}/{name}-{source}")
            assert same(plain(model), plain(wanted))
            assert torch.equal(run(model), found[name, dim])
    return found


def real_models(rank, ranks, device, kind, out):
    """A model of transformers cut in each way, saved, and loaded into zeros that are cut in each way.

    Returns {way: logits}.
    """
    mesh, found = init_device_mesh(device, (ranks,)), {}
    ids = torch.arange(2, 26).view(2, 12)

    ways = {
        "expert": lambda: fx_nvfp4.shard_experts(whole(kind), mesh),
        "intermediate": lambda: fx_nvfp4.shard_experts(whole(kind), mesh, "intermediate"),
        "whole": lambda: whole(kind),
    }
    if kind == "checkpoint":
        ways["read"] = lambda: whole(kind, mesh=mesh)
        ways["tiles, linears"] = lambda: fx_nvfp4.shard_linears(
            fx_nvfp4.shard_experts(whole(kind, prepack=True), mesh), mesh
        )
    with torch.no_grad():
        for name, make in ways.items():
            model = make()
            found[name] = model(ids).logits
            dcp.save(fx_nvfp4.sharded_state_dict(model), checkpoint_id=f"{out}/{name}")
        for source, name in itertools.product(ways, ways):
            model = ways[name]()
            for tensor in plain(model).values():
                tensor.zero_()
            load(model, f"{out}/{source}")
            assert torch.equal(model(ids).logits, found[name]), (source, name)
    return found


def around_fsdp(rank, ranks, device, out):
    """FSDP2's own DTensors go along with ours."""
    mesh, made = init_device_mesh(device, (ranks,)), []
    for seed in (0, 1):
        model = Adapted(seed).to(device)
        fx_nvfp4.shard_experts(model, mesh, tokens="own")
        made.append(fully_shard(model, mesh=mesh, ignored_params=fx_nvfp4.sharded_parameters(model)))
    wanted, model = made
    state = fx_nvfp4.sharded_state_dict(wanted)
    assert {n for n, t in state.items() if not isinstance(t, DTensor)} == set()
    dcp.save(state, checkpoint_id=out)
    load(model, out)
    assert same(plain(model), plain(wanted))


class Adapted(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.experts = Model(seed=seed).experts
        self.adapter = nn.Parameter(torch.randn(HIDDEN, HIDDEN))


def whole(kind, **kwargs):
    """The checkpoint in tests/data, or "GptOss", whose experts are stored transposed, with the up weights dense."""
    if kind == "checkpoint":
        return fx_nvfp4.load(MODEL, dtype=torch.float32, progress=False, **kwargs)
    model = transformers_model(kind, torch.float32, num_local_experts=EXPERTS)
    fx_nvfp4.quantize_(model)
    for layer in model.model.layers[:1]:
        experts = layer.mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.dequantize(), requires_grad=False)
    return model
