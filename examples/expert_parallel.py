"""Share the experts of a checkpoint among ranks: each reads its own, and all of them compute one model.

torchrun --nproc-per-node 2 examples/expert_parallel.py                # the small checkpoint in tests/data, on a CPU
torchrun --nproc-per-node 8 examples/expert_parallel.py PATH --device cuda --dtype bfloat16
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fx_nvfp4

SMALL = Path(__file__).resolve().parents[1] / "tests" / "data" / "modelopt_mixtral_w4a4"


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("experts",))

    model = fx_nvfp4.load(args.path, device, args.dtype, progress=False, mesh=mesh)
    stacked = [p for p in model.parameters() if isinstance(p, fx_nvfp4.NVFP4Weight) and p.dim() == 3]
    megabytes = sum(p.qdata.nbytes + p.block_scale.nbytes for p in stacked) / 1e6
    for rank in range(mesh.size()):  # one after another
        if rank == mesh.get_rank():
            print(
                f"rank {rank}: {stacked[0].shape[0]} experts a layer, {megabytes:.3f} MB of packed experts", flush=True
            )
        dist.barrier()

    prompt = torch.arange(5, 21, device=device).unsqueeze(0)  # the same on every rank
    compiled = torch.compile(model, backend="nvfp4_emu", fullgraph=True)
    logits = compiled(prompt).logits

    if mesh.get_rank() == 0 and args.path == SMALL:
        whole = fx_nvfp4.load(args.path, device, args.dtype, progress=False)
        print(f"largest difference to one process: {(logits - whole(prompt).logits).abs().max().item():.1e}")
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=SMALL, help="folder of a checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
