"""Damaged checkpoints: what `load` makes of bytes that were cut, flipped, swapped, or lie about each other.

    python tests/fuzz_checkpoint.py --count 2000 --seed 0

Case n is that of the seed, seed + n. A case is "refused" by a CheckpointError, or "loaded", and then every number of
the model is what the files say, read by the safetensors library and by nobody's plan; anything else is a bug, and the
line that repeats it is printed: "CRASH" for another exception, "DIFFERENT" numbers, "MEMORY" for an allocation larger
than all files together.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import SMALL
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fx_nvfp4
from fx_nvfp4 import CheckpointError, NVFP4Weight

DATA = "model.safetensors"
TEXTS = ("config.json", "hf_quant_config.json")
ODD_VALUES = (0, -1, 1, 3, 1 << 31, 1 << 40, 1 << 62, 1.5, None, True, "", "U8", "F64", [], [0], {}, "\u0000")


@dataclass(frozen=True)
class Outcome:
    """What came of a damaged checkpoint; kinds in capitals are bugs."""

    seed: int
    damage: str
    kind: str
    detail: str = ""

    @property
    def bug(self) -> bool:
        return self.kind.isupper()


class File:
    """A safetensors file taken apart, and put together again without a check."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.header: Any = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]

    def entries(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + self.data


# Damage: (random numbers, folder) -> None


def cut(rng: random.Random, folder: Path) -> None:
    content = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(content[: rng.choice((rng.randrange(64), rng.randrange(len(content))))])


def lengthen(rng: random.Random, folder: Path) -> None:
    with (folder / DATA).open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def flip_header(rng: random.Random, folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    _flip(rng, content, rng.choice((range(8), range(8, end))))
    (folder / DATA).write_bytes(content)


def flip_data(rng: random.Random, folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    _flip(rng, content, range(8 + int.from_bytes(content[:8], "little"), len(content)))
    (folder / DATA).write_bytes(content)


def flip_text(rng: random.Random, folder: Path) -> None:
    file = _text(rng, folder)
    content = bytearray(file.read_bytes())
    _flip(rng, content, range(len(content)))
    file.write_bytes(content)


def _text(rng: random.Random, folder: Path) -> Path:
    return folder / rng.choice([name for name in TEXTS if (folder / name).is_file()])


def _flip(rng: random.Random, content: bytearray, places: range) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.choice(places)] ^= 1 << rng.randrange(8)


def swap_names(rng: random.Random, folder: Path) -> None:
    _edit(folder, lambda file: _swap(file.header, *rng.sample(file.entries(), 2)))


def swap_data(rng: random.Random, folder: Path) -> None:
    """The bytes of two entries change places, or one takes those of the other."""

    def edit(file: File) -> None:
        first, second = (file.header[name] for name in rng.sample(file.entries(), 2))
        if rng.random() < 0.5:
            _swap_keys(first, second, "data_offsets")
        else:
            first["data_offsets"] = second["data_offsets"]

    _edit(folder, edit)


def lie(rng: random.Random, folder: Path) -> None:
    """A shape, dtype or range that is not the tensor's."""

    def edit(file: File) -> None:
        entry = file.header[rng.choice(file.entries())]
        key = rng.choice(("shape", "shape", "dtype", "data_offsets"))
        if key != "dtype" and rng.random() < 0.6 and entry[key]:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(ODD_VALUES)
        else:
            other = file.header[rng.choice(file.entries())][key]
            entry[key] = rng.choice((*ODD_VALUES, other, other, other))

    _edit(folder, edit)


def lose(rng: random.Random, folder: Path) -> None:
    """An entry is gone, renamed, or has no range; its bytes stay."""

    def edit(file: File) -> None:
        name = rng.choice(file.entries())
        entry = file.header.pop(name)
        if rng.random() < 0.7:
            entry.pop(rng.choice(("shape", "dtype", "data_offsets", "")), None)
            file.header[rng.choice((name, name + ".x", name.replace("weight", "bias"), name.swapcase()))] = entry

    _edit(folder, edit)


def swap_files(rng: random.Random, folder: Path) -> None:
    """A header over the data of another file: as long, in another order."""

    def edit(file: File) -> None:
        at = rng.randrange(1, len(file.data))
        file.data = file.data[at:] + file.data[:at]

    _edit(folder, edit)


def edit_text(rng: random.Random, folder: Path) -> None:
    """One value of a JSON file becomes another, at any depth, or is gone."""
    file = _text(rng, folder)
    content = json.loads(file.read_text())
    held, key = rng.choice(list(_places(content)))
    if rng.random() < 0.2:
        del held[key]
    else:
        held[key] = rng.choice(ODD_VALUES)
    file.write_text(json.dumps(content))


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])


def _edit(folder: Path, edit: Callable[[File], None]) -> None:
    file = File((folder / DATA).read_bytes())
    edit(file)
    (folder / DATA).write_bytes(file.bytes())


def _swap(entries: dict[str, Any], first: str, second: str) -> None:
    entries[first], entries[second] = entries[second], entries[first]


def _swap_keys(first: dict[str, Any], second: dict[str, Any], key: str) -> None:
    first[key], second[key] = second[key], first[key]


DAMAGE = {
    f.__name__: f
    for f in (
        *(cut, lengthen, flip_header, flip_data, flip_text, swap_names, swap_data, lie, lose, swap_files),
        edit_text,
    )
}


# What came of it


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not isinstance(out, NVFP4Weight) and out.device.type == "cpu":
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def run(seed: int, source: Path = SMALL) -> Outcome:
    """The outcome of one seed."""
    rng = random.Random(seed)
    name = rng.choice(list(DAMAGE))
    with damaged(rng, source, DAMAGE[name]) as folder:
        size = sum(file.stat().st_size for file in folder.iterdir())
        largest = Largest()
        try:
            with largest:
                model = fx_nvfp4.load(folder, progress=False)
        except CheckpointError as error:
            detail = " ".join(str(error).split())
            return Outcome(seed, name, "refused", detail)
        except Exception as error:
            return Outcome(seed, name, "CRASH", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if largest.bytes > 2 * size:  # float32 of what is stored in 16 bits
            return Outcome(seed, name, "MEMORY", f"{largest.bytes} bytes for files of {size}")
        wrong = differences(model, load_file(folder / DATA)) if source == SMALL else []
    return Outcome(seed, name, "DIFFERENT" if wrong else "loaded", ", ".join(wrong[:5]))


@contextmanager
def damaged(rng: random.Random, source: Path, damage: Callable[[random.Random, Path], None]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (DATA, "generation_config.json", *TEXTS):
            if (source / file).is_file():
                shutil.copy(source / file, folder / file)
        damage(rng, folder)
        yield folder


def differences(model: Any, stored: dict[str, torch.Tensor]) -> list[str]:
    """The parameters of a Mixtral by ModelOpt that hold other numbers than the file."""
    wrong = []
    for name, value in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(value, NVFP4Weight):
            found = stored.get(name.replace(".mlp.gate.", ".block_sparse_moe.gate."))
            same = found is not None and torch.allclose(value, found.to(value.dtype), 0, 0, equal_nan=True)
        elif value.dim() == 2:
            same = _same(value, stored, owner)
        else:
            experts = owner.replace(".mlp.experts", ".block_sparse_moe.experts")
            parts = ("w1", "w3") if leaf == "gate_up_proj" else ("w2",)
            rows = value.shape[1] // len(parts)
            same = all(
                _same(value[e][i * rows : (i + 1) * rows], stored, f"{experts}.{e}.{part}")
                for e in range(value.shape[0])
                for i, part in enumerate(parts)
            )
        wrong += [] if same else [name]
    return wrong


def _same(weight: Any, stored: dict[str, torch.Tensor], owner: str) -> bool:
    codes, scale, row = (stored[f"{owner}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    act = stored.get(f"{owner}.input_scale")
    same = torch.equal(weight.qdata, codes) and torch.equal(
        weight.block_scale.view(torch.uint8), scale.view(torch.uint8)
    )
    same = same and torch.equal(weight.global_scale, row.float().expand_as(weight.global_scale))
    return same and (act is None or weight.act_scale is None or torch.equal(weight.act_scale, act.double().reshape(())))


def outcomes(seed: int, count: int, source: Path = SMALL) -> Iterator[Outcome]:
    for number in range(seed, seed + count):
        yield run(number, source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path, default=SMALL, help="another checkpoint, whose numbers are not compared")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    kinds: Counter[tuple[str, str]] = Counter()
    start = time.time()
    for outcome in outcomes(args.seed, args.count, args.source):
        kinds[outcome.damage, outcome.kind] += 1
        if outcome.bug or args.verbose:
            print(f"--count 1 --seed {outcome.seed}: {outcome.damage}: {outcome.kind}: {outcome.detail}", flush=True)
    for (damage, kind), count in sorted(kinds.items()):
        print(f"{damage:12} {kind:10} {count:6}")
    bugs = sum(count for (_, kind), count in kinds.items() if kind.isupper())
    print(f"{args.count} checkpoints, {bugs} bugs, {time.time() - start:.0f} s")
    return 1 if bugs else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
