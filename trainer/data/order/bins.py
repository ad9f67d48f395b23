"""A place in the order of a run's data, the number of bins in its epochs, and the optimizer steps that follow from it.

Bins are counted once, and the counts are kept beside the data.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from trainer.data.dataset.manifest import Count, SealedRecord, read_record
from trainer.data.order.settings import Order
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.store.store import Store


@dataclass(frozen=True)
class Position:
    """The place where a global step begins: a bin of a window of an epoch.

    It does not depend on ranks, and a checkpoint stores it. `chapter` counts the chapters in the epoch's order; nearly
    every data set has only one.
    """

    epoch: int = 0
    window: int = 0
    bin: int = 0
    chapter: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> "Position":
        return cls(**value)


EpochBins = Sequence[Sequence[int]]
"""The bins of each window of an epoch, for one chapter after the other in the order that the epoch takes them."""


class Bins(SealedRecord):
    """The `EpochBins` of the first epochs of a data set in an order."""

    order: dict[str, Any]
    epochs: list[list[list[Count]]]


def kept_bins(store: Store, fingerprint: str, order: Order) -> list[EpochBins]:
    """The bins of the first epochs, as far as an earlier start counted and kept them."""
    folder, key = store.sub(layout.dataset(fingerprint)), _bins_key(order)
    try:
        return [*read_record(Bins, folder, key).epochs]
    except (NotFound, Damaged):  # damaged bins are counted again
        return []


def keep_bins(store: Store, fingerprint: str, order: Order, epochs: Sequence[EpochBins]) -> None:
    """Keep the bins of the first epochs for `kept_bins`."""
    folder = store.sub(layout.dataset(fingerprint))
    plain = [[list(chapter) for chapter in epoch] for epoch in epochs]
    folder.put(_bins_key(order), Bins(order=order.to_json(), epochs=plain).sealed())


def _bins_key(order: Order) -> str:
    settings = json.dumps(order.to_json(), sort_keys=True)
    return f"bins-{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def total(epoch: EpochBins) -> int:
    return sum(map(sum, epoch))


def before(epoch: EpochBins, position: Position) -> int:
    """The bins of `epoch` before `position`, which is in this epoch."""
    in_chapter = epoch[position.chapter] if position.chapter < len(epoch) else ()
    return total(epoch[: position.chapter]) + sum(in_chapter[: position.window]) + position.bin


def steps_of_epochs(
    epoch_bins: Sequence[int], epochs: Fraction, global_batch: int, taken: Sequence[int] = ()
) -> list[int]:
    """The optimizer steps of each of `epochs`, without the bins of it that are already `taken` (none by default).

    A fraction at the end of `epochs` takes the first steps of the last epoch, rounded up to whole steps. `epochs` is
    exact: 2.1 epochs of 30 steps are 63 steps, while floating point would give 64.
    """
    steps = list[int]()
    for epoch, bins in enumerate(epoch_bins):
        done = taken[epoch] if epoch < len(taken) else 0
        asked = ceil(bins / global_batch) * min(Fraction(1), epochs - epoch) - Fraction(done, global_batch)
        steps.append(max(0, min(ceil(asked), ceil((bins - done) / global_batch))))
    return steps
