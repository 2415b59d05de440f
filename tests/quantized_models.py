"""Small dense models that tests quantise: transformers' MoEs, own 3-D experts in either layout, a list of experts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, INNER, EXPERTS, TOP_K = 64, 48, 4, 2

_COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "num_local_experts": EXPERTS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": INNER, "num_experts": EXPERTS},
    "Llama4": {"num_experts_per_tok": 1, "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1},
}


def transformers_model(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> nn.Module:
    """A random model of a family of transformers ("Qwen3Moe", "Mixtral", "Llama4", "GptOss", ...)."""
    import transformers

    text = "Text" if family == "Llama4" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**_COMMON, **_OWN.get(family, {}), **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif "bias" in name:
            parameter.normal_(std=0.1)
    return model


class Experts(nn.Module):
    """Routed experts with 3-D parameters, [E, out, in] or (transposed) [E, in, out], and a linear layer beside them."""

    def __init__(self, transposed: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 8, torch.randn(EXPERTS, HIDDEN, INNER) / 7
        self.transposed = transposed
        self.w13 = nn.Parameter((up.mT.contiguous() if transposed else up).to(dtype))
        self.w2 = nn.Parameter((down.mT.contiguous() if transposed else down).to(dtype))
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=dtype)
        self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x).softmax(-1).topk(TOP_K, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        up, down = (self.w13, self.w2) if self.transposed else (self.w13.mT, self.w2.mT)
        gate, up = torch.einsum("tk,takn->tan", x, up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tan,tanh->tah", F.silu(gate) * up, down[ids])
        return (y * weights.unsqueeze(-1)).sum(1) + self.shared(x)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListOfExperts(nn.Module):
    """Routed experts in a ModuleList that a Python loop visits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(ids == e)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return out


def prefer(router: nn.Linear, experts: list[int]) -> None:
    """Make a router choose among the given experts alone, for inputs whose first element is 8."""
    with torch.no_grad():
        router.weight[:, 0] = -10.0
        router.weight[experts, 0] = 10.0


def tokens(rows: int = 24) -> Tensor:
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    x[:, 0] = 8.0
    return x


def token_ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))
