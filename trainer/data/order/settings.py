"""The settings of a run on which the order of its data depends. trainer/data/order/order.py computes the order."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config import Config
from trainer.data.dataset.manifest import DatasetManifest
from trainer.tuning.method import method_of
from trainer.tuning.objective.objective import find_objective

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
