"""Times the moe op beside the same block from grouped products, for one layer of many experts; prints a table.

    python benchmarks/bench_moe.py [--experts 128 --hidden 2048 --inner 768 --top 8] [--tokens 1 16 256 4096]

Random weights and activations, uniform random routings that differ from call to call. Medians of CUDA-graph replays in
microseconds; `floor` is the time to read the packed weights of the experts hit, at the read rate measured in the same
run. Needs a GPU.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import fx_nvfp4  # noqa: F401  registers the ops
from fx_nvfp4.tuning import microseconds

ROUTINGS = 8
op = torch.ops.fx_nvfp4


def random_weight(experts: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    qdata = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
    block_scale = torch.randint(0x30, 0x44, (experts, n, k // 16), dtype=torch.uint8, device="cuda")
    return qdata, block_scale, torch.rand(experts, n, device="cuda") * 2e-3 + 1e-4


def from_grouped(x: Tensor, ids: Tensor, weights: Tensor, up: list[Tensor], down: list[Tensor]) -> Tensor:
    """The block as a model with transformers' grouped_mm experts runs it on the per-product ops."""
    experts, (tokens, top) = up[0].shape[0], ids.shape
    key, order = ids.flatten().sort()
    offs = torch.searchsorted(key, torch.arange(experts, device="cuda"), right=True)
    gate, value = op.grouped(x[order // top], *up, offs).chunk(2, dim=-1)
    y = op.grouped(torch.nn.functional.silu(gate) * value, *down, offs) * weights.flatten()[order, None]
    slots = torch.empty_like(y).index_copy_(0, order, y)
    return slots.view(tokens, top, -1).sum(dim=1)


def replay_time(call: Callable[[Tensor], object], routings: list[Tensor], reads: Tensor) -> float:
    """Median microseconds of one replay, over routings in turn; the L2 cache is flushed before each."""
    ids = routings[0].clone()

    def before(i: int) -> None:
        ids.copy_(routings[i % len(routings)])
        reads.sum()

    return microseconds(lambda: call(ids), before, repeats=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("experts", 128), ("hidden", 2048), ("inner", 768), ("top", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    args = parser.parse_args()
    torch.manual_seed(0)
    up = list(random_weight(args.experts, 2 * args.inner, args.hidden))
    down = list(random_weight(args.experts, args.hidden, args.inner))
    reads = torch.empty(1 << 28, device="cuda")  # 1 GiB, beyond any cache
    rate = reads.nbytes / min(
        replay_time(lambda _: reads.sum(), [torch.zeros(1, device="cuda")], reads) for _ in range(3)
    )
    expert_bytes = sum(t.nbytes for t in (*up, *down)) / args.experts
    print(f"{torch.cuda.get_device_name()}, read rate {rate * 1e-6:.2f} TB/s")
    print(f"{'tokens':>8} {'moe us':>10} {'grouped us':>11} {'floor us':>9}")
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden, device="cuda").bfloat16()
        weights = torch.rand(tokens, args.top, device="cuda").bfloat16()
        routings = [torch.rand(tokens, args.experts, device="cuda").topk(args.top).indices for _ in range(ROUTINGS)]
        hit = statistics.mean(len(r.unique()) for r in routings)

        def moe(ids: Tensor, x: Tensor = x, weights: Tensor = weights) -> Tensor:
            lists = ([t] for t in up)
            return op.moe(x, ids, weights, *lists, *down, "silu(g) * u", "concatenated")

        def grouped(ids: Tensor, x: Tensor = x, weights: Tensor = weights) -> Tensor:
            return from_grouped(x, ids, weights, up, down)

        torch.testing.assert_close(moe(routings[0]), grouped(routings[0]), rtol=5e-2, atol=5e-2)
        times = [replay_time(call, routings, reads) for call in (moe, grouped)]
        print(f"{tokens:>8} {times[0]:>10.1f} {times[1]:>11.1f} {hit * expert_bytes / rate:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
