"""A mixture of experts of your own, with packed buffers and its own dequantisation: one line is changed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fx_nvfp4 import explain, format

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class PackedLinears(nn.Module):
    """Weights of all experts as NVFP4 bytes: codes [E, N, K/2], block scales [E, N, K/16], one global scale each."""

    def __init__(self, experts: int, n: int, k: int) -> None:
        super().__init__()
        weight = torch.randn(experts, n, k) / k**0.5
        global_scale = weight.abs().amax(dim=(1, 2), keepdim=True) / (6 * 448)
        codes, block_scale = format.quantize(weight, global_scale)
        for name, value in {"codes": codes, "block_scale": block_scale, "global_scale": global_scale}.items():
            self.register_buffer(name, value)
        self.register_buffer("table", E2M1.clone())

    def dequantize(self) -> Tensor:
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2)
        scale = (self.block_scale.float() * self.global_scale).repeat_interleave(16, dim=-1)
        return (self.table[nibbles.long()] * scale).bfloat16()


class MoE(nn.Module):
    def __init__(self, experts: int = 16, hidden: int = 128, inner: int = 256, top_k: int = 2) -> None:
        super().__init__()
        self.top_k, self.router = top_k, nn.Linear(hidden, experts, dtype=torch.bfloat16)
        self.gate_up, self.down = PackedLinears(experts, 2 * inner, hidden), PackedLinears(experts, hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(dim=-1).topk(self.top_k, dim=-1)
        gate, up = torch.einsum("td,tand->tan", x, self.gate_up.dequantize()[ids]).chunk(2, dim=-1)
        y = torch.einsum("tan,tadn->tad", F.silu(gate) * up, self.down.dequantize()[ids])
        return (y * weights.unsqueeze(-1)).sum(dim=1)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = MoE().to(device), torch.randn(5, 128, dtype=torch.bfloat16, device=device)
    print(explain(model, x))
    compiled = torch.compile(model, backend="nvfp4_emu")  # was: torch.compile(model)
    difference = (compiled(x) - model(x)).abs().max().item()
    print(f"largest difference to the eager model: {difference:.4f} of {model(x).abs().max().item():.2f}")


if __name__ == "__main__":
    main()
