"""One mixture-of-experts block in bf16, W4A16, and W4A4 by each rule for rounding: errors, and who agrees with whom."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fx_nvfp4
from fx_nvfp4.dialects import DIALECTS


class MoE(nn.Module):
    def __init__(self, experts: int = 16, hidden: int = 256, inner: int = 128) -> None:
        super().__init__()
        self.gate_up = nn.Parameter((torch.randn(experts, 2 * inner, hidden) / hidden**0.5).bfloat16())
        self.down = nn.Parameter((torch.randn(experts, hidden, inner) / inner**0.5).bfloat16())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("td,tand->tan", x, self.gate_up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tan,tadn->tad", F.silu(gate) * up, self.down[ids])
        return (y * weights.unsqueeze(-1)).sum(dim=1)


def run(dense: nn.Module, inputs: tuple[Tensor, ...], config: fx_nvfp4.NVFP4Config) -> Tensor:
    """The block quantised, calibrated on its inputs, and compiled."""
    model = copy.deepcopy(dense)
    fx_nvfp4.quantize_(model, config)
    if config.activations == "static":
        with fx_nvfp4.calibrate(model):
            model(*inputs)
    torch._dynamo.reset()
    return torch.compile(model, backend="nvfp4_emu", options={"strict": True, "codegen": False})(*inputs)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = MoE().to(device).requires_grad_(False)
    # Blocks of 16 of many magnitudes: the rules differ where a block is small beside the largest.
    size = torch.exp2(-16 * torch.rand(64, 16, 1))
    x = (torch.randn(64, 16, 16) * size).flatten(1).bfloat16().to(device)
    scores = torch.rand(64, 16, device=device).softmax(dim=-1).topk(2)
    inputs = (x, scores.indices, scores.values.bfloat16())

    configs = {"W4A16": fx_nvfp4.NVFP4Config(), "W4A4 dynamic, hardware": fx_nvfp4.NVFP4Config("dynamic")}
    configs |= {f"W4A4 static, {dialect}": fx_nvfp4.NVFP4Config("static", dialect=dialect) for dialect in DIALECTS}
    results = {"bf16": dense(*inputs)} | {name: run(dense, inputs, config) for name, config in configs.items()}

    exact, hardware = dense.double()(x.double(), *inputs[1:]), results["W4A4 static, hardware"]
    print(f"{'':34}{'error':>9}{'from hardware':>15}{'same results':>14}")
    for name, y in results.items():
        error, apart = distance(y, exact), distance(y, hardware)
        print(f"{name:34}{error:9.4f}{apart:15.4f}{(y == hardware).float().mean().item():14.1%}")


def distance(y: Tensor, reference: Tensor) -> float:
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


if __name__ == "__main__":
    main()
