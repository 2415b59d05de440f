"""Runs a function on several ranks, each a process of its own, that talk over gloo."""

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function, ranks, folder, *args):
    """[function(rank, ranks, *args) of each rank]; what one raises is raised here."""
    folder = Path(folder)
    mp.start_processes(_work, (function, ranks, folder, args), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _work(rank, function, ranks, folder, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, ranks, *args), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()  # what mp raises names the first rank to end, which may be a victim
        raise
    else:
        dist.barrier()  # else a rank that ends first would cut off another
    finally:
        dist.destroy_process_group()
