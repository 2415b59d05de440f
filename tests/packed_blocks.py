"""MoE blocks that call the ops of fx_nvfp4 themselves, in several spellings, and what a compilation makes of them."""

import torch
from torch import nn
from torch.nn import functional as F

from fx_nvfp4 import format as nvfp4
from fx_nvfp4.backend import collect_reports

T, E, A, H, WIDTH = 7, 6, 3, 64, 48


ops = torch.ops.fx_nvfp4


def pack(*shape, seed):
    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    scale = dense.abs().amax(dim=(-1, -2)) / nvfp4.TWO_LEVEL_MAX
    qdata, block_scale = nvfp4.quantize(dense, scale[..., None, None])
    return qdata, block_scale.view(torch.uint8), scale[..., None].expand(shape[:-1]).contiguous()


class Block(nn.Module):
    """Packed experts and a router; `body(module, x, weights, ids)` is the block, `route(module, x)` the routing."""

    def __init__(self, body, route=None, dtype=torch.float32, experts=E, rows=2 * WIDTH):
        super().__init__()
        self.body, self.choose = body, route or top_k
        for name, shape, seed in (("up", (experts, rows, H), 0), ("down", (experts, H, WIDTH), 1)):
            for part, value in zip("qsg", pack(*shape, seed=seed), strict=True):
                self.register_buffer(f"{name}_{part}", value)
        random = torch.Generator().manual_seed(2)
        self.router = nn.Parameter(torch.randn(experts, H, generator=random).to(dtype), requires_grad=False)
        self.up_bias = nn.Parameter(torch.randn(experts, rows, generator=random).to(dtype), requires_grad=False)
        self.down_bias = nn.Parameter(torch.randn(experts, H, generator=random).to(dtype), requires_grad=False)

    def forward(self, x):
        return self.body(self, x, *self.choose(self, x))

    def up(self, op, x, *args, **kwargs):
        return op(x, self.up_q, self.up_s, self.up_g, *args, **kwargs)

    def down(self, op, x, *args, **kwargs):
        return op(x, self.down_q, self.down_s, self.down_g, *args, **kwargs)

    def expert(self, e, x):
        """One expert's weights, selected from all."""
        h = swiglu(ops.linear(x, self.up_q[e], self.up_s[e], self.up_g[e]))
        return ops.linear(h, self.down_q[e], self.down_s[e], self.down_g[e])


def top_k(m, x):
    weights, ids = F.linear(x, m.router).float().softmax(dim=-1).topk(A, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), ids


def swiglu(y):
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def share(m, weights, ids):
    return torch.zeros(len(ids), len(m.up_q), dtype=weights.dtype).scatter(1, ids, weights)


def indexed(m, x, weights, ids, act=swiglu, combine=None):
    """Every slot a row: the style that most tests below vary."""
    flat = ids.flatten()
    y = m.down(ops.indexed, act(m.up(ops.indexed, x.repeat_interleave(ids.shape[1], dim=0), flat)), flat)
    y = y.view(*ids.shape, H)
    return (y * weights.unsqueeze(-1)).sum(dim=1) if combine is None else combine(y, weights)


def grouped(m, x, weights, ids, offs=None, back="index_put", act=swiglu):
    """Rows sorted by expert; counts and the way back are spelled in as many ways as there are."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = (OFFSETS[offs] if offs else one_hot_offsets)(flat, len(m.up_q))
    rows = x[order // ids.shape[1]]
    y = m.down(ops.grouped, act(m.up(ops.grouped, rows, ends)), ends)
    weight = weights.flatten()[order].unsqueeze(-1)
    if back == "index_add":
        return torch.zeros_like(x).index_add(0, order // ids.shape[1], y * weight)
    if back == "scatter_add":
        index = (order // ids.shape[1]).unsqueeze(-1).expand(-1, H)
        return torch.zeros_like(x).scatter_add(0, index, y * weight)
    if back == "argsort":
        y = (y * weight)[order.argsort()]
    elif back == "index_copy":
        y = torch.empty_like(y).index_copy(0, order, y * weight)
    elif back == "scatter":
        y = torch.zeros_like(y).scatter(0, order.unsqueeze(-1).expand_as(y), y * weight)
    else:
        y = torch.index_put(torch.empty_like(y), (order,), y * weight)
    return y.view(*ids.shape, H).sum(dim=1)


def one_hot_offsets(flat, experts):
    return F.one_hot(flat, experts).sum(dim=0).cumsum(0, dtype=torch.int32)


OFFSETS = {
    "one-hot": one_hot_offsets,
    "histc": lambda f, e: torch.histc(f.float(), bins=e, min=0, max=e - 1).cumsum(0).int(),
    "search": lambda f, e: torch.searchsorted(f.sort()[0], torch.arange(e), right=True).int(),
    "scatter": lambda f, e: torch.zeros(e).scatter_add(0, f, torch.ones_like(f).float()).cumsum(0).int(),
    "comparison": lambda f, e: (f <= torch.arange(e)[:, None]).sum(dim=1).int(),
    "bucketize": lambda f, e: torch.bucketize(torch.arange(e), f.sort()[0], right=True).int(),
}  # fmt: skip


def dense(m, x, weights, ids, act=swiglu, spread=share):
    y = m.down(ops.batched, act(m.up(ops.batched, x.expand(len(m.up_q), *x.shape))))
    return torch.einsum("etd,te->td", y, spread(m, weights, ids))


def on_input(m, x, weights, ids, act=swiglu):
    """Llama 4: every expert sees every token times its weight, which is zero for most."""
    rows = x.unsqueeze(0) * share(m, weights, ids).t().unsqueeze(-1)
    return m.down(ops.batched, act(m.up(ops.batched, rows))).sum(dim=0)


def masked_loop(m, x, weights, ids):
    out = torch.zeros_like(x)
    for e in range(len(m.up_q)):
        out = out + m.expert(e, x) * torch.where(ids == e, weights, 0).sum(dim=1, keepdim=True)
    return out


def gathered_loop(m, x, weights, ids):
    """transformers' eager loop over all experts."""
    out = torch.zeros_like(x)
    for e in range(len(m.up_q)):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, m.expert(e, x[token]) * weights[token, slot, None])
    return out


def wide_sum(m, x, weights, ids):
    """Results in x's dtype, weighted and summed in fp32."""
    return indexed(m, x, weights, ids, combine=lambda y, w: (y.float() * w.float().unsqueeze(-1)).sum(dim=1))


def x_of(tokens=T, dtype=torch.float32):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def compiled(model, shapes=((T,),), dynamic=False, dtype=torch.float32, inputs=x_of):
    """(report, names of our ops in the graph) of a model whose numbers are eager's."""
    torch._dynamo.reset()
    names = []

    def record(graph):
        names.extend(str(n.target).split(".")[1] for n in graph.nodes if "fx_nvfp4" in str(n.target))

    options = {"codegen": False, "force_disable_caches": True, "joint_custom_post_pass": record}
    run = torch.compile(model, backend="nvfp4_emu", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad(), collect_reports() as report:
        for shape in shapes:
            given = inputs(*shape, dtype)
            given = given if isinstance(given, tuple) else (given,)
            got, want = run(*given), model(*given)
            got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
            for g, w in zip(got, want, strict=True):
                limit = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
                assert w.abs().max() > 0
                assert (g.double() - w.double()).abs().max() <= limit * w.double().abs().max()
    return report, names


def lifted(model, *args, beside=(), **kwargs):
    """The report's block of a model that becomes one moe op, and the ops `beside` it."""
    report, names = compiled(model, *args, **kwargs)
    (block,) = report.blocks
    assert block.lifted, block
    assert sorted(names) == sorted(["moe", *beside])
    return block


def not_lifted(model, *args, **kwargs):
    """Why the model's block is not lifted."""
    report, names = compiled(model, *args, **kwargs)
    assert "moe" not in names, report
    (block,) = report.blocks
    assert not block.lifted
    assert block.reason
    assert block.advice
    return block.reason
