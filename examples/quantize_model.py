"""Quantise a bf16 mixture of experts to NVFP4, calibrate its activations, compile it, store it, load it again.

python examples/quantize_model.py            # a small random Qwen3-MoE
"""

import copy
import tempfile

import torch
import transformers
from torch import Tensor, nn

import fx_nvfp4


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = build().to(device)
    prompts = [torch.randint(3, 250, (2, 64), device=device) for _ in range(4)]
    compare_rules(dense, prompts[0])

    model = dense  # packed in place, weight by weight
    fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(activations="static", block_scale="mse"))
    print(model.nvfp4_quantization)
    with fx_nvfp4.calibrate(model) as calibration:
        for prompt in prompts:
            model(prompt)
    print(calibration)

    compare_compiled(model, prompts[0])
    expected = model(prompts[0]).logits
    for producer in ("modelopt", "compressed-tensors"):
        with tempfile.TemporaryDirectory() as folder:
            fx_nvfp4.save(model, folder, producer)
            again = fx_nvfp4.load(folder, device=device, progress=False)
        same = torch.equal(again(prompts[0]).logits, expected)
        print(f"saved as {producer}, loaded: logits {'are the same' if same else 'DIFFER'}")


def build() -> nn.Module:
    """A random model with a few large weights, as trained ones have."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        experts_implementation="grouped_mm",
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            sample = torch.distributions.StudentT(6.0).sample(parameter.shape)
            parameter.copy_(sample * parameter.shape[-1] ** -0.5)
    return model


def compare_rules(dense: nn.Module, prompt: Tensor) -> None:
    """Print what each rule for block scales costs, weights alone."""
    expected = dense(prompt).logits.float()
    for rule in ("amax", "mse"):
        model = copy.deepcopy(dense)
        fx_nvfp4.quantize_(model, fx_nvfp4.NVFP4Config(block_scale=rule))
        logits = (model(prompt).logits.float() - expected).square().mean() / expected.square().mean()
        print(
            f"block scales by {rule}: squared error of weights {weight_error(model, dense):.5f}, of logits {logits:.4f}"
        )


def weight_error(model: nn.Module, dense: nn.Module) -> float:
    """Squared error of all packed weights, as a share of their squares."""
    packed = {n: p.data for n, p in model.named_parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight)}
    pairs = [(w.dequantize(torch.float32), dense.get_parameter(n).float()) for n, w in packed.items()]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def compare_compiled(model: nn.Module, prompt: Tensor) -> None:
    """Print how far the compiled model is from eager, in float32: in 16 bits some activations round the other way."""
    model = copy.deepcopy(model).float()
    compiled = torch.compile(model, backend="nvfp4_emu", options={"strict": True})
    expected = model(prompt).logits
    difference = (compiled(prompt).logits - expected).abs().max().item()
    print(f"compiled: largest difference to eager {difference:.1e} of {expected.abs().max().item():.1f}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
