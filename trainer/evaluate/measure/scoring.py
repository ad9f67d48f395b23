"""The likelihood of given continuations of given texts.

Many texts are packed into each row, and the rows are divided over the ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.model.head import IGNORE
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.model.packed import PackedModel
from trainer.state.zero.engine import Engine
from trainer.tuning.objective.answers import segments_of_targets


class Continued(NamedTuple):
    """A text of two or more `tokens`, whose tokens from `first` on are scored.

    The very first token is never scored, because nothing predicts it.
    """

    tokens: Sequence[int]
    first: int = 1


class Likelihood(NamedTuple):
    """The log p of a continuation in nats, and whether each of its tokens is the most likely one."""

    log_p: float
    greedy: bool


def likelihoods(
    engine: Engine, texts: Sequence[Continued], capacity: int, *, reserved: int, told: Callable[[int], None]
) -> list[Likelihood]:
    """Return the likelihoods of all texts, on every rank. Collective.

    A row takes texts up to `capacity` tokens, or a longer one alone. `reserved` positions before each text belong to
    virtual tokens. `told` gets the number of finished texts.
    """
    rows = list(packed([len(text.tokens) - 1 + reserved for text in texts], capacity))
    world, mine = engine.ranks.world_size, dict[int, Likelihood]()
    with engine.evaluating():
        for first in range(0, len(rows), world):
            # Every rank takes a row through the model in each turn, because this helps the others to gather it. At the
            # end it takes the first row again.
            numbers = rows[first + engine.ranks.rank] if first + engine.ranks.rank < len(rows) else rows[0]
            log_p, wrong = engine.look(_scores, _row([texts[number] for number in numbers], reserved)).tolist()
            found = (Likelihood(*values) for values in zip(log_p, (not count for count in wrong), strict=True))
            mine |= zip(numbers, found, strict=True)
            told(sum(map(len, rows[: first + world])))
    every = engine.ranks.gather_items(mine)
    return [every[number] for number in range(len(texts))]


def packed(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Yield the numbers of texts of these lengths, for each row: the longest first, as many as fit."""
    row, length = list[int](), 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if row and length + lengths[number] > capacity:
            yield row
            row, length = [], 0
        row.append(number)
        length += lengths[number]
    if row:
        yield row


def _row(texts: Sequence[Continued], reserved: int) -> MicroBatch:
    """Return the texts without their last tokens, which predict nothing."""
    tokens, labels, positions, lengths = list[int](), list[int](), list[int](), list[int]()
    for text in texts:
        ids, first = list(text.tokens), max(1, text.first)
        tokens += [0] * reserved + ids[:-1]
        labels += [IGNORE] * (reserved + first - 1) + ids[first:]
        positions += range(reserved + len(ids) - 1)
        lengths.append(reserved + len(ids) - 1)
    ids, targets, places = (torch.tensor(row)[None] for row in (tokens, labels, positions))
    scored = sum(label != IGNORE for label in labels)
    row = ModelInput.of(ids, places, Segments.of_documents(lengths))
    return MicroBatch(row, targets, len(tokens) - reserved * len(texts), scored)


def _scores(model: PackedModel, row: MicroBatch) -> Tensor:
    """Return (2, segments) fp64: log p of each segment's targets, and how many are not the most likely token."""
    ranked = model.head(model.hidden(row.input), row.labels, row.places, ranked=True).double()
    changes = ranked * -1 + ranked.new_tensor([0, 1])
    return ranked.new_zeros(len(row.lengths), 2).index_add_(0, segments_of_targets(row), changes).T
