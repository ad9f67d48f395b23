"""The losses of an evaluation set, of the whole set and of each document, and the likelihood of given continuations.

A set uses the same rows and the same engine as training. The texts of continuations are packed, many into each row,
and the rows are divided over the ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.order.stream import Stream
from trainer.model.head import IGNORE
from trainer.model.micro_batch import MicroBatch, ModelInput, Role, Segments
from trainer.model.packed import PackedModel
from trainer.processes.ranks import Ranks
from trainer.state.zero.engine import Engine
from trainer.tuning.objective import Objective, measured, sums_of
from trainer.tuning.objective.answers import counted_once, read_segments, segments_of_targets


class DocumentLosses(NamedTuple):
    """Some documents of a set by their `numbers` in it.

    `nats` is -log p of their trained tokens, and `tokens` is the number of these. All are (documents,), int64 or fp64.
    """

    numbers: Tensor
    nats: Tensor
    tokens: Tensor


def document_losses(engine: Engine, stream: Stream, told: Callable[[int], None]) -> DocumentLosses:
    """Return the losses of this rank's rows of the set of `stream`. Collective.

    `told` gets the number of finished documents before each row.
    """
    numbers, values = list[int](), list[Tensor]()
    with engine.evaluating():
        for batches in stream.epoch(0):
            for batch in batches:
                told(len(numbers))
                values.append(engine.look(_nats_and_tokens, batch))
                numbers += batch.documents
    # The losses stay on the device until all rows are done, because reading them means waiting for the device.
    nats, tokens = torch.cat(values, dim=1).double().cpu() if values else torch.zeros(2, 0, dtype=torch.float64)
    return DocumentLosses(torch.tensor(numbers, dtype=torch.int64), nats, tokens)


def mean_loss(engine: Engine, stream: Stream, told: Callable[[int], None]) -> tuple[float, int]:
    """Return nats a token over all documents of the set, and the number of its trained tokens. Collective."""
    mine = document_losses(engine, stream, told)
    every = engine.ranks.gather(float(mine.nats.sum()), float(mine.tokens.sum()))
    tokens = sum(row[1] for row in every)
    return sum(row[0] for row in every) / tokens, int(tokens)


def _nats_and_tokens(model: PackedModel, batch: MicroBatch) -> Tensor:
    """Return (2, documents) of a row. Each of its documents is one segment."""
    segments = read_segments(model, batch)
    return counted_once(torch.stack([-segments.log_p, segments.tokens])[:, batch.segments(Role.DOCUMENT)], batch)


def objective_means(
    ranks: Ranks, objective: Objective, batches: Iterable[MicroBatch], loss_of: Callable[[MicroBatch], Tensor]
) -> tuple[dict[str, float], int]:
    """Return the loss and the measures of `objective` over the `batches` of all ranks, by name. Collective.

    The result also has the number of targets (or pairs, or answers). `loss_of` returns for a row what `Objective.loss`
    does.
    """
    sums, weight = torch.zeros(1 + sums_of(objective), dtype=torch.float64, device=ranks.device), 0
    for batch in batches:
        sums += loss_of(batch).reshape(-1)
        weight += objective.weight(batch)
    total, *values = (sum(column) for column in zip(*ranks.gather(weight, sums=sums), strict=True))
    loss, *means = (value / total for value in values)
    return {"loss": loss, **measured(objective, means)}, int(total)


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
