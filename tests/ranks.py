"""Runs a function on several ranks, each a process of its own, that talk over gloo, or over NCCL with a GPU each."""

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_map


def run_on_ranks(function, ranks, folder, *args, device="cpu"):
    """[function(rank, ranks, device, *args) of each rank]; what one raises is raised here."""
    folder = Path(folder)
    mp.start_processes(_work, (function, ranks, folder, device, args), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _work(rank, function, ranks, folder, device, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        found = function(rank, ranks, device, *args)
        found = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, found)
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()  # what mp raises names the first rank to end, which may be a victim
        raise
    else:
        dist.barrier()  # else a rank that ends first would cut off another
    finally:
        dist.destroy_process_group()
