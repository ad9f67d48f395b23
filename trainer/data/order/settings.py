"""The settings of a run on which the order of its data depends, places in it, and the counts that follow from it.

trainer/data/order/order.py computes the order. Its bins are counted once, and the counts are kept beside the data. The
number of optimizer steps follows from them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

from trainer.config import Config
from trainer.data.dataset.manifest import Count, DatasetManifest, SealedRecord, read_record
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.store.store import Store
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

VERSION = 2
"""It changes whenever the same data and settings would give another order, which makes a checkpoint's position invalid.
"""
REPEATING_VERSION = 3
"""The version if a source may be visited several times in an epoch. Since 3 a document's visits lie in different bins.
"""


@dataclass(frozen=True)
class Order:
    """The settings on which the order depends, beside the data set and the epoch.

    `weights` are the visits of each source's documents in an epoch. At 0.5 a document is visited in every second epoch,
    and each epoch visits half of the documents. A source with one of `fractions` gets this share of the tokens instead.
    `sequence_length` is a bin's capacity in tokens. Without `packing` every document has its own bin. `reserved`
    positions lie before each of a document's `segments`; a bin has room for those of one document of `sequence_length`
    tokens.
    """

    weights: tuple[float, ...]
    sequence_length: int
    packing: bool
    seed: int
    fractions: tuple[float | None, ...] = ()
    reserved: int = 0
    segments: int = 1

    @property
    def beside(self) -> int:
        """The number of positions that a document takes in addition to its tokens."""
        return self.reserved * self.segments

    @property
    def capacity(self) -> int:
        """The number of positions in a bin."""
        return self.sequence_length + self.beside

    def weights_for(self, tokens: Sequence[int]) -> list[float]:
        """The weight of each source in a chapter with so many `tokens` of each. A fraction without tokens gives 0."""
        fractions = self.fractions or (None,) * len(self.weights)
        sources = list(zip(self.weights, fractions, tokens, strict=True))
        plain = sum(weight * size for weight, fraction, size in sources if fraction is None)
        total = plain / (1 - sum(fraction or 0 for fraction in fractions))
        return [
            weight if fraction is None else fraction * total / size if size else 0.0
            for weight, fraction, size in sources
        ]

    def to_json(self) -> dict[str, Any]:
        lists = {"weights": list(self.weights), "fractions": list(self.fractions)}
        # A fraction may turn out to be several visits an epoch.
        repeats = any(weight > 1 for weight in self.weights) or any(fraction is not None for fraction in self.fractions)
        tree = {"version": REPEATING_VERSION if repeats else VERSION, **asdict(self), **lists}
        if not self.reserved:  # as before there were any
            del tree["reserved"], tree["segments"]
        return tree


def train_order(config: Config) -> Order:
    """The order of a run's training data."""
    data, method = config.data, method_of(config)
    weights, fractions = (source.weight for source in data.train), (source.fraction for source in data.train)
    return Order(
        tuple(weights),
        data.sequence_length,
        data.packing,
        config.run.seed,
        tuple(fractions),
        reserved=method.virtual.reserved,
        segments=data.segments(find_objective(config, method).formats),
    )


def eval_order(config: Config, manifest: DatasetManifest) -> Order:
    """Every document once, in an order that does not depend on the run's seed."""
    return replace(train_order(config), weights=(1.0,) * len(manifest.sources), fractions=(), seed=0)


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


def bins_in(epoch: EpochBins) -> int:
    return sum(map(sum, epoch))


def bins_before(epoch: EpochBins, position: Position) -> int:
    """The bins of `epoch` before `position`, which is in this epoch."""
    in_chapter = epoch[position.chapter] if position.chapter < len(epoch) else ()
    return bins_in(epoch[: position.chapter]) + sum(in_chapter[: position.window]) + position.bin


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
