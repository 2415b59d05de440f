"""What the ranks of test_parallel.py run: each case returns what a rank found, and a single process, of the same."""

import copy
import functools
import itertools

import pytest
import torch
from quantized_models import transformers_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fx_nvfp4
from fx_nvfp4 import NVFP4Config, NVFP4Weight
from fx_nvfp4.backend import collect_reports
from fx_nvfp4.fused import DOWN_NAME, UP_NAMES, FusedExperts

E, H, INNER, A = 6, 32, 80, 2  # on four ranks: experts 1, 2, 1, 2 and blocks of 16 in the intermediate dim 1, 1, 1, 2


def fused(layout="concatenated", activations="none", weighted="output", bias=True, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    rows = 2 * INNER if layout in ("concatenated", "interleaved") else INNER
    shapes = {**dict.fromkeys(UP_NAMES[layout], (E, rows, H)), DOWN_NAME: (E, H, INNER)}
    scale = (torch.rand(E, generator=generator) * 1e-3 + 1e-3).double() if activations == "static" else None
    weights = {n: NVFP4Weight.from_dense(randn(*shape), activations, scale) for n, shape in shapes.items()}
    biases = {n: randn(*shape[:2]) for n, shape in shapes.items()} if bias else {}
    activation = "silu(u)" if layout == "plain" else "silu(g) * u"
    return FusedExperts(weights, biases, activation, layout, weighted).requires_grad_(False).to(device)


def routing(kind, tokens, seed=0, device="cpu"):
    """x, ids and weights of which experts get as many tokens as chance gives them, all, or none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator)
    weights = torch.rand(tokens, A, generator=generator)
    ids = torch.randint(0, E, (tokens, A), generator=generator)
    if kind == "one expert":
        ids = torch.full((tokens, A), E - 1)
    if kind == "nobody":
        ids = torch.where(torch.rand(tokens, A, generator=generator) < 0.5, ids, torch.tensor([-1, E])[ids % 2])
    return x.to(device), ids.to(device), weights.to(device)


SHARED = [
    ("expert", "concatenated", "none", "output"),
    ("expert", "interleaved", "static", "output"),
    ("expert", "separate", "dynamic", "output"),
    ("expert", "plain", "none", "input"),
    ("intermediate", "concatenated", "static", "output"),
    ("intermediate", "interleaved", "none", "input"),
    ("intermediate", "separate", "static", "output"),
    ("intermediate", "plain", "none", "output"),
]
KINDS = ("chance", "one expert", "nobody")


def pair(whole, sharded, x, ids, weights, trained=True):
    """Results and gradients of both."""
    both = []
    for run in (sharded, whole):
        leaves = [t.clone().requires_grad_(trained) for t in (x, weights)]
        y = run(leaves[0], ids, leaves[1])
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device)
        grads = torch.autograd.grad((y * seed).sum(), leaves) if trained else []
        both.append([y.detach(), *grads])
    return tuple(both)


def compiled(run, device, fullgraph=True):
    return torch.compile(run, backend="nvfp4_emu", options={"codegen": device == "cuda"}, fullgraph=fullgraph)


def every_case(rank, ranks, device):
    """{case: (what the shards gave, what one process gave)}."""
    mesh = init_device_mesh(device, (ranks,))
    found = {}
    for dim, layout, activations, weighted in SHARED:
        whole = fused(layout, activations, weighted, device=device)
        sharded = fx_nvfp4.shard_experts(copy.deepcopy(whole), mesh, dim)
        for kind in KINDS:
            found[f"shared {dim} {layout} {kind}"] = pair(whole, sharded, *routing(kind, 9, device=device))
        none = routing("chance", 0, device=device)
        found[f"shared {dim} {layout} no token"] = pair(whole, sharded, *none, trained=False)
    for weighted, kind in itertools.product(("output", "input"), KINDS):
        found[f"own {weighted} {kind}"] = own_tokens(rank, ranks, device, mesh, weighted, kind)
    wrap = functools.partial(compiled, device=device, fullgraph=False)
    found["own compiled"] = own_tokens(rank, ranks, device, mesh, "output", "chance", wrap)
    found["parts"] = parts(rank, ranks, mesh)
    found["compiled"] = compiled_block(device, mesh)
    return found


def own_tokens(rank, ranks, device, mesh, weighted, kind, wrap=lambda module: module):
    """Rank 1 has no tokens, the others 2, 7, 9, ...; one process has those of all."""
    whole = fused(activations="static", weighted=weighted, device=device)
    sharded = fx_nvfp4.shard_experts(copy.deepcopy(whole), mesh, tokens="own")
    tokens = [0 if r == 1 else 3 * r + 2 for r in range(ranks)]
    return pair(whole, wrap(sharded), *routing(kind, tokens[rank], seed=rank, device=device))


def parts(rank, ranks, mesh):
    """Sizes of the codes that the rank holds; of one process, its even share."""
    sizes = []
    for dim in ("expert", "intermediate"):
        module = fx_nvfp4.shard_experts(fused(), mesh, dim)
        codes = [p.data.qdata for p in (module.gate_up_proj, module.down_proj)]
        assert all(c.untyped_storage().nbytes() == c.numel() for c in codes)
        sizes.append(sum(c.numel() for c in codes))
    return torch.tensor(sizes), torch.tensor(
        sum(p.data.qdata.numel() for p in (fused().gate_up_proj, fused().down_proj))
    )


def compiled_block(device, mesh):
    """One graph with one block, forward and backward."""
    whole = fused(activations="static", bias=False, device=device)
    sharded = fx_nvfp4.shard_experts(copy.deepcopy(whole), mesh)
    with collect_reports() as report:
        result = pair(whole, compiled(sharded, device), *routing("chance", 9, device=device))
    assert [m.op for m in report.matched].count("moe") == 2, report
    assert not report.refused, report
    return result


def checkpoint(rank, ranks, device, folder):
    """A real model: as one, sharded either way, and with each rank reading its experts alone."""
    mesh = init_device_mesh(device, (ranks,))
    prompt = torch.arange(2, 26, device=device).view(2, 12)
    load = lambda **kwargs: fx_nvfp4.load(folder, device, torch.float32, progress=False, **kwargs)  # noqa: E731
    whole = load()
    models = {
        "expert": fx_nvfp4.shard_experts(load(), mesh),
        "read": load(mesh=mesh),
        "own": fx_nvfp4.shard_experts(load(), mesh, tokens="own"),
    }
    if ranks == 2:  # of its 48 there are 3 blocks of 16
        models["intermediate"] = fx_nvfp4.shard_experts(load(), mesh, "intermediate")
    found = {}
    with torch.no_grad():
        for name, model in models.items():
            torch._dynamo.reset()
            mine = prompt + rank if name == "own" else prompt
            want = whole(mine).logits
            with collect_reports() as report:
                found[name] = compiled(model, device, fullgraph=name != "own")(mine).logits, want
            assert not report.refused, report
            # With one expert a rank, what masks the others' rows is not told from an activation.
            assert name == "own" or ranks == 4 or len([b for b in report.blocks if b.lifted]) == 2, report
    return found


def linear_layers(rank, ranks, device):
    """Attention and experts of a transformers model, by its own tp_plan: logits, and gradients of the embeddings."""
    mesh = init_device_mesh(device, (ranks,))
    whole = transformers_model("Qwen3Moe", torch.float32, num_hidden_layers=1).to(device)
    fx_nvfp4.quantize_(whole, NVFP4Config(activations="static"))
    ids = torch.arange(2, 26, device=device).view(2, 12)
    with torch.no_grad(), fx_nvfp4.calibrate(whole):
        whole(ids)
    sharded = fx_nvfp4.shard_experts(copy.deepcopy(whole), mesh)
    fx_nvfp4.shard_linears(sharded, mesh)
    attention, there = (m.model.layers[0].self_attn for m in (sharded, whole))
    for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
        part, all_of_it = (getattr(module, name).weight.data for module in (attention, there))
        assert part.shape[dim] * ranks == all_of_it.shape[dim]
        assert part.qdata.untyped_storage().nbytes() * ranks == all_of_it.qdata.nbytes
    found = {}
    with torch.no_grad(), collect_reports() as report:
        found["compiled"] = compiled(sharded, device)(ids).logits, whole(ids).logits
    assert not report.refused, report
    assert [m.op for m in report.matched].count("linear") == 4, report
    embedded = whole.get_input_embeddings()(ids).detach()
    both = []
    for model in (sharded, whole):
        x = embedded.clone().requires_grad_()
        both.append(torch.autograd.grad(model(inputs_embeds=x).logits.square().sum(), x))
    found["gradients"] = tuple(both)
    return found | dense_linear_layers(rank, ranks, device)


def dense_linear_layers(rank, ranks, device):
    """Dense ones with biases, by a plan of the user's."""
    mesh = init_device_mesh(device, (ranks,))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8)).to(device)
    sharded = fx_nvfp4.shard_linears(copy.deepcopy(whole), mesh, {"0": "colwise", "2": "rowwise"})
    x = torch.randn(5, 16, device=device)
    return {"dense": ([sharded(x)], [whole(x)])}


def fully_sharded(rank, ranks, device):
    """FSDP2 around packed experts that it leaves alone: an adapter's gradients, summed over the ranks' own tokens."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (ranks,))
    torch.manual_seed(0)
    model = Adapted().to(device)
    want = copy.deepcopy(model)
    fx_nvfp4.shard_experts(model, mesh, tokens="own")
    fully_shard(model, mesh=mesh, ignored_params=fx_nvfp4.sharded_parameters(model))
    batches = [routing("chance", 5, seed=r, device=device) for r in range(ranks)]
    model(*batches[rank]).square().sum().backward()
    sum(want(*batch).square().sum() for batch in batches).div(ranks).backward()
    with pytest.raises(NotImplementedError, match="ignored_params"):
        fully_shard(Adapted().to(device), mesh=mesh)
    return {"adapter": ([model.a.grad.full_tensor()], [want.a.grad])}


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = fused()
        self.a = nn.Parameter(torch.randn(H, H, generator=torch.Generator().manual_seed(1)) * 0.1)

    def forward(self, x, ids, weights):
        return self.experts(x + x @ self.a, ids, weights)
