"""The losses of an evaluation set, of the whole set and of each document.

They use the same rows and the same engine as training.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.order.stream import Stream
from trainer.model.micro_batch import MicroBatch, Role
from trainer.model.packed import PackedModel
from trainer.processes.ranks import Ranks
from trainer.state.zero.engine import Engine
from trainer.tuning.objective.answers import counted_once, read_segments
from trainer.tuning.objective.objective import Objective, measured, sums_of


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
