"""What NVFP4 costs: bf16, W4A16 and W4A4 on a model that is trained here, on text that every Python has.

python examples/accuracy.py                                      # seconds, and a model that knows little
python examples/accuracy.py --preset cpu --checkpoint FOLDER     # minutes; a second run finds the trained model
python examples/accuracy.py --preset gpu --checkpoint FOLDER --plot accuracy.png --json accuracy.json

A mixture of experts learns the sources of Python's standard library, byte by byte. It is then quantised in several ways
and compiled with torch.compile(backend="nvfp4_emu"), and each way is measured on files that the training never saw:
perplexity, answers to multiple-choice questions, and the errors of every layer and every expert.
docs/accuracy.md shows a run.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accuracy_study.model import build, for_evaluation, load_dense, parameters, same_sizes
from accuracy_study.presets import PRESETS, Preset
from accuracy_study.show import plot, tables
from accuracy_study.study import make_data, study
from accuracy_study.text import Text, read_text
from accuracy_study.train import train
from accuracy_study.variants import chosen


def main() -> None:
    args = parse_arguments()
    preset, device = PRESETS[args.preset], torch.device(args.device)
    warnings.filterwarnings("ignore", message=".*lru_cache.*")  # transformers' own; every compilation would say so
    if args.threads:
        torch.set_num_threads(args.threads)
    text = read_text(preset.text_bytes)
    print(text)
    model = trained(text, preset, device, args)

    start, results = time.perf_counter(), []
    data = make_data(text, preset, device, args.seed)
    with torch.no_grad():
        for result in study(for_evaluation(model, device), data, chosen(preset.variants)):
            results.append(result)
            print(f"{result.name}: perplexity {result.perplexity:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\n{tables(results, preset.questions)}")
    if args.plot:
        plot(results, preset.questions, args.plot)
    if args.json:
        args.json.write_text(json.dumps([r.to_dict() for r in results], indent=1))


def trained(text: Text, preset: Preset, device: torch.device, args: argparse.Namespace) -> Any:
    """The model of the checkpoint, or a new one, which goes there."""
    if args.checkpoint and (args.checkpoint / "config.json").exists():
        model = load_dense(args.checkpoint)
        if not same_sizes(model.config, build(preset).config):
            raise SystemExit(f"{args.checkpoint} holds a model of other sizes than --preset {args.preset}")
        print(f"model: from {args.checkpoint}")
        return model
    torch.manual_seed(args.seed)
    model = build(preset)
    print(f"model: {parameters(model) / 1e6:.1f} million parameters, {preset.experts} experts, top {preset.top}")
    train(model, text, preset, device, args.seed)
    if args.checkpoint:
        model.save_pretrained(args.checkpoint)
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="default %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="folder of the trained bf16 model: read if there, else written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training text, and questions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU; equal numbers give equal figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results; needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them as data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
