"""Load an NVFP4 checkpoint, compile it, say what is emulated, compare with its producer, generate.

python examples/generate.py                  # the small real checkpoint in tests/data
python examples/generate.py PATH [--device cuda] [--dtype bfloat16]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import fx_nvfp4

SMALL = Path(__file__).resolve().parents[1] / "tests" / "data" / "modelopt_mixtral_w4a4"


def main() -> int:
    args = parse_arguments()
    torch.manual_seed(0)

    model = fx_nvfp4.load(args.path, device=args.device, dtype=args.dtype, dialect=args.dialect)
    packed = sum(1 for p in model.parameters() if isinstance(p.data, fx_nvfp4.NVFP4Weight))
    print(f"loaded {args.path.name}: {type(model).__name__}, {packed} packed weights, {model.dtype}, {args.device}")

    reference = args.path / "reference.safetensors"
    prompt = load_file(reference)["input_ids"] if reference.exists() else torch.randint(5, 100, (1, 16))
    prompt = prompt.to(args.device)

    report = fx_nvfp4.explain(model, prompt)
    print(report)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="nvfp4_emu")  # the one line
    start = time.perf_counter()
    logits = compiled(prompt).logits
    print(f"compiled and ran {list(prompt.shape)} tokens in {time.perf_counter() - start:.1f} s")

    matches = not reference.exists() or compare(logits, load_file(reference, device=args.device))
    generate(model, prompt[:1, :8], args.new_tokens)
    # A weight that this prompt does not reach (a vision tower's, say) has no graph node, and is no failure here.
    emulated = report.matched and not any(refusal.node for refusal in report.refused)
    return 0 if matches and emulated else 1


def compare(logits: torch.Tensor, reference: dict[str, torch.Tensor]) -> bool:
    """Print the distance to what the producer of the checkpoint computed in float32."""
    key = "logits_w4a4_f32" if "logits_w4a4_f32" in reference else "logits_w4a16_f32"
    error = (logits.float() - reference[key]).abs()
    print(f"difference from the producer's logits: mean {error.mean():.2g}, largest {error.max():.2g}")
    if logits.dtype != torch.float32:
        print("in 16 bits activations next to a rounding boundary fall to the other side: compare with --dtype float32")
        return True
    matches = bool(error.max() < 1e-4)
    print(f"logits {'match' if matches else 'DO NOT MATCH'}")
    return matches


def generate(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> None:
    """Greedy decoding through transformers, with the compiled forward."""
    print("compiling for generate(): a minute or more on a CPU", flush=True)
    eager, model.forward = model.forward, torch.compile(model.forward, backend="nvfp4_emu", dynamic=True)
    try:
        mask = torch.ones_like(prompt)
        tokens = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    finally:
        model.forward = eager
    print(f"generated tokens {tokens[0, prompt.shape[1] :].tolist()} after {prompt[0].tolist()}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=SMALL, help="folder of a checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--dialect", default=None, help='rule for activations; default "hardware"')
    parser.add_argument("--new-tokens", type=int, default=8)
    args = parser.parse_args()
    small = args.path.resolve() == SMALL
    args.dtype = getattr(torch, args.dtype) if args.dtype else torch.float32 if small else None
    # To meet the producer's logits to the last bits, its own rounding of activations is wanted.
    args.dialect = args.dialect or ("producer" if small else "hardware")
    return args


if __name__ == "__main__":
    sys.exit(main())
