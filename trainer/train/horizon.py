"""Where a run ends: after so many steps, or with its epochs, which are counted from the position in the data.

A start goes on from a position, whatever `train.global_batch` led there. The remaining steps are those that the present
settings make of the remaining data. So a run of one epoch takes every row once, even if the batch changes on the way.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trainer.config import Optim, Train
from trainer.data.order import bins
from trainer.data.order.bins import EpochBins, Position, steps_of_epochs
from trainer.train.schedule import learning_rate


@dataclass(frozen=True)
class Horizon:
    """The end of a run, as one start of it sees it.

    `steps` is the last step. `whole` is the number of steps that the present settings would make of all of the run's
    data. It equals `steps` unless the batch or the epochs have changed during the run, or a batch is skipped. `epochs`
    are empty if nothing depends on them.
    """

    steps: int
    whole: int
    epochs: Sequence[EpochBins] = ()

    def rate(self, optim: Optim, step: int) -> float:
        """The learning rate of the update that makes `step`. The schedule follows the data, so it counts the steps that
        the present settings would have made of the earlier data.
        """
        return learning_rate(optim, step - self.steps + self.whole, self.whole)

    def passes(self, position: Position) -> float | None:
        """The passes over the data before `position`; None if the bins of an epoch are not counted."""
        if not self.epochs:
            return None
        if position.epoch >= len(self.epochs):
            return float(position.epoch)
        epoch = self.epochs[position.epoch]
        return position.epoch + bins.before(epoch, position) / bins.total(epoch)

    def is_due(self, per_epoch: float, before: Position, after: Position) -> bool:
        """Whether an action that is due `per_epoch` times in each pass is due with the update whose data lies between
        the two positions.

        It goes by the data alone, so a start with another batch or other epochs finds the same places in them.
        """
        return per_epoch > 0 and self._times(per_epoch, before) != self._times(per_epoch, after)

    def _times(self, per_epoch: float, position: Position) -> int:
        """How often an action that is due `per_epoch` times in a pass has been due before `position`."""
        passed = Fraction(position.epoch)
        if position.epoch < len(self.epochs):
            epoch = self.epochs[position.epoch]
            passed += Fraction(bins.before(epoch, position), bins.total(epoch))
        return int(passed * Fraction(str(per_epoch)))


def horizon_of(
    train: Train, epochs: Sequence[EpochBins], step: int, position: Position, skipped: Collection[Position] = ()
) -> Horizon:
    """The end of a run whose state after `step` updates goes on at `position`, without the batches at `skipped`."""
    if train.steps:
        return Horizon(train.steps, train.steps, epochs)
    asked, sizes = Fraction(str(train.epochs)), list(map(bins.total, epochs))
    taken = [
        _taken(number, size, epoch, position) for number, (size, epoch) in enumerate(zip(sizes, epochs, strict=True))
    ]
    left = steps_of_epochs(sizes, asked, train.global_batch, taken)
    lost = sum(_is_ahead(place, epochs, taken, left, train.global_batch) for place in set(skipped))
    whole = sum(steps_of_epochs(sizes, asked, train.global_batch))
    return Horizon(step + sum(left) - lost, whole, epochs)


def _taken(number: int, size: int, epoch: EpochBins, position: Position) -> int:
    """The bins of the epoch of this number before `position`."""
    if number == position.epoch:
        return bins.before(epoch, position)
    return size if number < position.epoch else 0


def _is_ahead(
    place: Position, epochs: Sequence[EpochBins], taken: Sequence[int], left: Sequence[int], global_batch: int
) -> bool:
    """Whether one of the remaining steps begins at `place`."""
    if place.epoch >= len(epochs):
        return False
    steps, rest = divmod(bins.before(epochs[place.epoch], place) - taken[place.epoch], global_batch)
    return rest == 0 and 0 <= steps < left[place.epoch]
