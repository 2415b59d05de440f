"""Text that every Python installation has: the sources and documents of its standard library, as bytes."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Other people's packages, and generated tables that are no prose and no program.
_LEFT_OUT = {"site-packages", "encodings", "test", "tests", "__pycache__"}
_HELD_OUT = 10  # one file of so many


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and files that the training never sees."""

    train: Tensor
    held_out: list[Tensor]

    def __str__(self) -> str:
        held_out = f"{sum(map(len, self.held_out)) / 1e6:.2f} MB in {len(self.held_out)} held-out files"
        return f"text: {len(self.train) / 1e6:.2f} MB to train on, {held_out}"

    def windows(self, count: int, size: int, seed: int) -> Tensor:
        """[count, size] random windows of the training text, as token ids."""
        start = torch.randint(len(self.train) - size, (count, 1), generator=torch.Generator().manual_seed(seed))
        return self.train[start + torch.arange(size)].long()

    def held_out_windows(self, count: int, size: int) -> Tensor:
        """[count, size] windows of the held-out files, spread evenly and without overlap; fewer if there are fewer."""
        found = torch.cat([t[: len(t) // size * size].view(-1, size) for t in self.held_out])
        take = torch.linspace(0, len(found) - 1, min(count, len(found))).long()
        return found[take].long()


def read_text(limit: int) -> Text:
    """Files in an order that is a hash of their names, as many as limit bytes allow; every tenth is held out."""
    train, held_out, size = [], [], 0
    for key, file in sorted(_files()):
        content = file.read_bytes()
        size += len(content)
        if size > limit:
            break
        tensor = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        (held_out if key % _HELD_OUT == 0 else train).append(tensor)
    return Text(torch.cat(train), held_out)


def _files() -> Iterator[tuple[int, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in root.rglob("*"):
        inside = file.relative_to(root)
        if file.suffix in (".py", ".txt", ".rst") and not _LEFT_OUT.intersection(inside.parts) and file.is_file():
            yield int.from_bytes(hashlib.sha256(inside.as_posix().encode()).digest()[:8], "big"), file
