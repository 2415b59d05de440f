"""``python -m fx_nvfp4``: what a checkpoint holds, what of a model is emulated, and how exactly, from a terminal."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .benchmark import Settings, Study, opened
from .benchmark import measure as bench
from .benchmark.plot import save_plot as save_bench_plot
from .benchmark.table import prompts_text, render_bench
from .benchmark.ways import WAYS
from .checkpoint import CheckpointError, load
from .checkpoints.inspect import inspect_checkpoint
from .checkpoints.shards import write_text
from .dialects import DIALECTS
from .explain import explain
from .faithfulness import checkpoint_cases, measure, random_cases
from .faithfulness.plot import check_plot, save_plot
from .faithfulness.table import render_study
from .inspect_table import LEVELS, render_inspection
from .random_checkpoint import LAYOUTS, Sizes, write_checkpoint

_DTYPES = ("float32", "bfloat16", "float16")
# How explain reads a checkpoint; on the command line None stands for these, so that one that is given shows.
_HOW: dict[str, Any] = {
    **{"tokens": 16, "dtype": None, "dialect": "hardware", "activations": "checkpoint"},
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
_EXIT = "exit status: 0, 1 with --strict where something is not as it should be, 2 for what cannot be read"


class UsageError(ValueError):
    """Arguments that cannot be served; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv if None) and return its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (CheckpointError, UsageError, ImportError) as error:
        print(f"fx_nvfp4: {error}", file=sys.stderr)
        return 2


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    found = inspect_checkpoint(args.checkpoint)
    print(json.dumps(found.to_dict(), indent=1) if args.json else render_inspection(found, args.by))
    return 1 if args.strict and found.problems else 0


def run_explain(args: argparse.Namespace) -> int:
    """Compile a model and print its report."""
    model, inputs, keywords = _from_factory(args) if args.module else _from_checkpoint(args)
    with torch.no_grad():
        report = explain(model, *inputs, **keywords)
    print(report.to_json() if args.json else report.table(full=args.full))
    return 1 if args.strict and report.refused else 0


def run_faithfulness(args: argparse.Namespace) -> int:
    """Measure how far several ways of computing are from the exact sums."""
    settings = {"tokens": _positive("faithfulness", args.tokens), "seed": args.seed, "device": _device(args.device)}
    if args.layer is not None and not args.checkpoint:
        raise UsageError("faithfulness: --layer is of a checkpoint; give one, or leave it out")
    try:
        check_plot(args.plot)
        cases = checkpoint_cases(args.checkpoint, layer=args.layer, **settings) if args.checkpoint else None
        study = measure(random_cases(**settings) if cases is None else cases, settings["device"])
    except (ValueError, OSError) as error:
        raise UsageError(f"faithfulness: {error}") from error
    print(json.dumps(study.to_dict(), indent=1) if args.json else render_study(study))
    if args.plot:
        save_plot(study, args.plot)
    return 0


def run_make_checkpoint(args: argparse.Namespace) -> int:
    """Write a checkpoint of random weights."""
    try:
        sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
        shard_size = int(args.shard_gb * 1e9)
        size = write_checkpoint(args.folder, args.like, sizes, shard_size=shard_size, seed=args.seed)
    except (ValueError, OSError) as error:
        raise UsageError(f"make-checkpoint: {error}") from error
    print(f"{args.folder}: {sizes.weights / 1e9:.3g} billion packed weights, {size / 1e9:.3g} GB, {args.like}")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Time prefill and decoding of a model, whole or a few layers of it."""
    if args.save and not args.save.parent.is_dir():
        raise UsageError(f"bench: --save {args.save}: there is no folder {args.save.parent}")
    device = _device(args.device)
    try:
        check_plot(args.plot)
        settings = Settings(
            args.tokens, args.new_tokens, args.batch, args.repeats, args.activations, args.mode, args.ways,
            args.by_layer, args.record, args.attention,
        )  # fmt: skip
        if args.record and device.type != "cuda":
            raise ValueError("--record needs a CUDA device")
        with opened(args.model, args.layers) as folder:
            study = bench(folder, settings, device, _name(args.model), lambda study: _tell(study, args.save))
    except (ValueError, OSError) as error:
        raise UsageError(f"bench: {error}") from error
    print(json.dumps(study.to_dict(), indent=1) if args.json else render_bench(study))
    if args.plot:
        save_bench_plot(study, args.plot)
    return 0


def _tell(study: Study, save: Path | None) -> None:
    row = study.rows[-1]
    times = f"first generation {row.first:.1f} s, prefill {row.prefill:.3g} s, a step {row.decode:.3g} s"
    print(
        f"{row.way}, {prompts_text(row.batch, row.tokens)}: {times}",
        file=sys.stderr,
        flush=True,
    )
    if save is not None:
        # As a whole: what breaks the run off leaves the file before.
        write_text(save, json.dumps(study.to_dict(), indent=1) + "\n")


def _name(model: Path) -> str:
    return model.resolve().name if model.is_dir() else str(model)


def run_lm_eval(args: argparse.Namespace) -> int:
    """Hand over to lm-evaluation-harness."""
    from .lm_harness import main as harness

    harness(args.arguments)
    return 0


def _from_checkpoint(args: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if args.checkpoint is None:
        raise UsageError("explain: give a checkpoint, or --module for a model of yours")
    how = {name: default if (given := getattr(args, name)) is None else given for name, default in _HOW.items()}
    tokens, device = _positive("explain", how["tokens"]), _device(how["device"])
    model = load(
        args.checkpoint,
        device,
        getattr(torch, how["dtype"]) if how["dtype"] else None,
        dialect=how["dialect"],
        activations=how["activations"],
        progress=sys.stderr.isatty(),
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    return model, (), {"input_ids": ids, "use_cache": False}


def _from_factory(args: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the user's function returns: (model, inputs), inputs a tuple or a dict of keyword arguments."""
    name, given = args.module, [f"--{option}" for option in _HOW if getattr(args, option) is not None]
    if given:
        raise UsageError(f"explain: {', '.join(given)} say how a checkpoint is read; your function decides that itself")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        made = _factory(name)()
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, dict))):
        raise UsageError(f"--module {name}: the function must return (model, inputs), inputs a tuple or a dict")
    model, inputs = made
    return (model, (), inputs) if isinstance(inputs, dict) else (model, inputs, {})


def _factory(name: str) -> Callable[[], Any]:
    module_name, _, function = name.partition(":")
    if not (module_name and function):
        raise UsageError(f"--module {name}: expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"--module {name}: {error}") from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise UsageError(f"--module {name}: {module_name} has no function {function!r}")
    return factory


def _positive(command: str, tokens: int) -> int:
    if tokens < 1:
        raise UsageError(f"{command}: --tokens must be at least 1, got {tokens}")
    return tokens


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fx_nvfp4", description=__doc__, epilog=_EXIT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="format, packed weights, scales, what is missing", epilog=_EXIT)
    inspect.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    inspect.add_argument("--by", choices=LEVELS, default=LEVELS[0], help="what shares a line; default all layers")
    inspect.set_defaults(run=run_inspect)

    explained = commands.add_parser("explain", help="what of a model runs as NVFP4, and why the rest not", epilog=_EXIT)
    source = explained.add_mutually_exclusive_group()
    source.add_argument("checkpoint", nargs="?", type=Path, help="folder of a checkpoint")
    source.add_argument("--module", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns (model, inputs)")
    explained.add_argument("--tokens", type=int, help=f"length of the prompt; default {_HOW['tokens']}")
    explained.add_argument("--dtype", choices=_DTYPES, help="default: the checkpoint's")
    explained.add_argument(
        "--dialect", choices=["producer", *DIALECTS], help=f"rule for activations; default {_HOW['dialect']}"
    )
    explained.add_argument("--activations", choices=["checkpoint", "none"])
    explained.add_argument("--full", action="store_true", help="a line for every site, with its weight and kernel")
    explained.set_defaults(run=run_explain)

    faithful = commands.add_parser(
        "faithfulness", help="error of each way to compute, against exact sums", epilog=_EXIT
    )
    faithful.add_argument("checkpoint", nargs="?", type=Path, help="folder of a checkpoint; default random weights")
    faithful.add_argument("--layer", type=int, help="which layer of the checkpoint; default the middle one")
    faithful.add_argument("--tokens", type=int, default=64, help="rows of activations; default 64")
    faithful.add_argument("--seed", type=int, default=0)
    faithful.add_argument("--plot", type=Path, metavar="FILE", help="draw it too; needs matplotlib")
    faithful.set_defaults(run=run_faithfulness)

    made = commands.add_parser(
        "make-checkpoint",
        help="write random weights in the layout of a published checkpoint",
        description="A Qwen3-MoE W4A4 checkpoint with random weights; the default sizes are Qwen3-30B-A3B's (17 GB).",
        epilog=_EXIT,
    )
    made.add_argument("folder", type=Path, help="a new folder")
    made.add_argument("--like", choices=list(LAYOUTS), default=next(iter(LAYOUTS)), help="default %(default)s")
    for name, value in vars(Sizes()).items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default %(default)s")
    made.add_argument("--shard-gb", type=float, default=5.0, help="most of one file; default %(default)s")
    made.add_argument("--seed", type=int, default=0)
    made.set_defaults(run=run_make_checkpoint)

    timed = _bench_parser(commands)

    # Nothing begins with that character: all arguments are the harness'.
    harness = commands.add_parser("lm-eval", help="lm_eval's command line, with the model fx_nvfp4", prefix_chars="\0")
    harness.add_argument("arguments", nargs="*", help="as lm_eval takes them")
    harness.set_defaults(run=run_lm_eval)

    for command in (explained, faithful, timed):
        command.add_argument("--device", default=None if command is explained else _HOW["device"])
    for command in (inspect, explained, faithful, timed):
        command.add_argument("--json", action="store_true", help="data instead of a table")
    for command in (inspect, explained):
        command.add_argument("--strict", action="store_true", help="exit with 1 on problems or refused sites")
    return parser


def _bench_parser(commands: Any) -> argparse.ArgumentParser:
    timed = commands.add_parser(
        "bench", help="time prefill and decoding, beside 16-bit weights and dequantisation in the graph", epilog=_EXIT
    )
    timed.add_argument(
        "--model", type=Path, required=True, help="folder of a checkpoint, or a Qwen3-MoE config.json: random weights"
    )
    timed.add_argument(
        "--tokens", type=int, nargs="+", default=[128, 1024], help="lengths of prompts; default 128 1024"
    )
    timed.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts at a time; default 1")
    for name, value in (("new-tokens", 32), ("repeats", 3)):
        timed.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    timed.add_argument("--layers", type=int, metavar="N", help="of a config: so many of its layers; default all")
    timed.add_argument("--activations", choices=["checkpoint", "none"], default="checkpoint")
    timed.add_argument("--mode", default="default", help="of torch.compile")
    timed.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default all")
    timed.add_argument(
        "--by-layer", action="store_true", help="compile layers that are alike once, not the whole model"
    )
    timed.add_argument(
        "--record", nargs="?", const="steps", default="", choices=["steps", "all"],
        help="replay each step of decoding as one CUDA graph; all: prefill too",
    )  # fmt: skip
    timed.add_argument(
        "--attention", default="", metavar="NAME", help="of transformers, or sdpa_grouped; default the model's own"
    )
    timed.add_argument("--plot", type=Path, metavar="FILE", help="draw it too; needs matplotlib")
    timed.add_argument("--save", type=Path, metavar="FILE", help="what --json prints, saved after every measurement")
    timed.set_defaults(run=run_bench)
    return timed
