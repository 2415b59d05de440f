"""Multiple choice from held-out text: which of four continuations is the right one?

The wrong ones come from other places of the same file that follow the same two bytes, so that neither the subject nor
the grammar of the next byte gives them away.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .text import Text

CHOICES = 4
ANSWER = 24  # bytes
_SAME = 2  # bytes before an answer that all four have in common


@dataclass(frozen=True)
class Questions:
    """ids [Q, 4, T]: context and one answer each; right [Q]: which it is."""

    ids: Tensor
    right: Tensor


def make_questions(text: Text, count: int, size: int, seed: int) -> Questions:
    """Questions of size bytes, answer included.

    Raises:
        ValueError: the held-out text has too few places that follow the same bytes.
    """
    draw = random.Random(seed)
    files = [t for t in text.held_out if len(t) > 4 * size]
    questions, right = [], []
    for _ in range(100 * count):
        file = draw.choices(files, [len(t) for t in files])[0]
        place = draw.randrange(size - ANSWER, len(file) - ANSWER)
        wrong = _wrong_answers(file, place, draw)
        if wrong is None:
            continue
        right.append(draw.randrange(CHOICES))
        context, answer = file[place - (size - ANSWER) : place], file[place : place + ANSWER]
        answers = [*wrong[: right[-1]], answer, *wrong[right[-1] :]]
        questions.append(torch.stack([torch.cat((context, a)) for a in answers]))
        if len(questions) == count:
            return Questions(torch.stack(questions).long(), torch.tensor(right))
    raise ValueError(f"{len(questions)} questions were found in {len(files)} held-out files, {count} are wanted")


def _wrong_answers(file: Tensor, place: int, draw: random.Random) -> list[Tensor] | None:
    """Three different answers from elsewhere in the file; None if there are none."""
    places = torch.arange(len(file) - ANSWER)
    same = (places <= place - ANSWER) | (places >= place + ANSWER)  # not overlapping the right one
    for back in range(1, _SAME + 1):
        same[back:] &= file[: len(same) - back] == file[place - back]
        same[:back] = False
    others = same.nonzero().flatten().tolist()
    found = {bytes(file[place : place + ANSWER].tolist()): file[:0]}
    for other in draw.sample(others, len(others)):
        answer = file[other : other + ANSWER]
        found.setdefault(bytes(answer.tolist()), answer)
        if len(found) == CHOICES:
            return list(found.values())[1:]
    return None
