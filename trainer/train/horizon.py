"""Where a run ends: after so many steps, or with its epochs, which are counted from the position in the data. And the
learning rate on the way there.

A start goes on from a position, whatever `train.global_batch` led there. The remaining steps are those that the present
settings make of the remaining data. So a run of one epoch takes every row once, even if the batch changes on the way.

The learning rate is a pure function of the step, so a resumed run has no scheduler state to restore. `SCHEDULES` has
the course after warm-up by the name in `optim.schedule`, as a share of the peak. The formulas are those of
transformers.optimization; one_cycle is torch.optim.lr_scheduler.OneCycleLR (arXiv:1708.07120).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trainer.config import Optim, Train
from trainer.data.order.settings import EpochBins, Position, bins_before, bins_in, steps_of_epochs


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
        return position.epoch + bins_before(epoch, position) / bins_in(epoch)

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
            passed += Fraction(bins_before(epoch, position), bins_in(epoch))
        return int(passed * Fraction(str(per_epoch)))


def horizon_of(
    train: Train, epochs: Sequence[EpochBins], step: int, position: Position, skipped: Collection[Position] = ()
) -> Horizon:
    """The end of a run whose state after `step` updates goes on at `position`, without the batches at `skipped`."""
    if train.steps:
        return Horizon(train.steps, train.steps, epochs)
    asked, sizes = Fraction(str(train.epochs)), list(map(bins_in, epochs))
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
        return bins_before(epoch, position)
    return size if number < position.epoch else 0


def _is_ahead(
    place: Position, epochs: Sequence[EpochBins], taken: Sequence[int], left: Sequence[int], global_batch: int
) -> bool:
    """Whether one of the remaining steps begins at `place`."""
    if place.epoch >= len(epochs):
        return False
    steps, rest = divmod(bins_before(epochs[place.epoch], place) - taken[place.epoch], global_batch)
    return rest == 0 and 0 <= steps < left[place.epoch]


Course = Callable[[Optim, int, int, int], float]
"""optim, step (warmup < step <= total), warmup and total steps -> rate as a share of `optim.lr`."""

# torch's OneCycleLR: the first rate is a 25th of the peak, the last one a ten-thousandth of the first.
_ONE_CYCLE_FIRST, _ONE_CYCLE_LAST = 1 / 25, 1e-4
_INVERSE_SQRT_STEPS = 10_000  # transformers counts this much as warm-up if there is none


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of the update that makes step `step` (1 .. total_steps).

    Warm-up is linear, or a power of that. It begins at `warmup_from` and reaches `lr` at step `warmup_steps`, or after
    `warmup_ratio` of all steps; then comes the schedule. one_cycle rises along a cosine.
    """
    warmup_steps = optim.warmup_steps or math.ceil((optim.warmup_ratio or 0) * total_steps)
    if step <= warmup_steps:
        done = step / warmup_steps
        if optim.schedule == "one_cycle":
            return optim.lr * _one_cycle_rise(done)
        return optim.lr * _down_to(optim.warmup_from, done**optim.warmup_power)
    return optim.lr * SCHEDULES[optim.schedule](optim, step, warmup_steps, total_steps)


def _done(step: int, warmup: int, total: int) -> float:
    """The share of the steps after warm-up that `step` completes."""
    return (step - warmup) / max(1, total - warmup)


def _down_to(least: float, decay: float) -> float:
    """`decay`, which goes from 1 to 0, rescaled to go from 1 to `least`."""
    return least + (1 - least) * decay


def _half_cosine(done: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def _constant(optim: Optim, step: int, warmup: int, total: int) -> float:
    return 1.0


def _linear(optim: Optim, step: int, warmup: int, total: int) -> float:
    return _down_to(optim.min_lr_ratio, 1 - _done(step, warmup, total))


def _cosine(optim: Optim, step: int, warmup: int, total: int) -> float:
    return _down_to(optim.min_lr_ratio, _half_cosine(_done(step, warmup, total)))


def _cosine_with_restarts(optim: Optim, step: int, warmup: int, total: int) -> float:
    done = _done(step, warmup, total)
    return _down_to(optim.min_lr_ratio, _half_cosine((optim.cycles * done) % 1.0) if done < 1 else 0.0)


def _polynomial(optim: Optim, step: int, warmup: int, total: int) -> float:
    return _down_to(optim.min_lr_ratio, (1 - _done(step, warmup, total)) ** optim.power)


def _inverse_sqrt(optim: Optim, step: int, warmup: int, total: int) -> float:
    timescale = warmup or _INVERSE_SQRT_STEPS
    return math.sqrt(timescale / (step + timescale - warmup))


def _wsd(optim: Optim, step: int, warmup: int, total: int) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395)."""
    decaying = max(1, math.ceil(optim.decay_ratio * total))
    return _down_to(optim.min_lr_ratio, _half_cosine(max(0.0, (step - (total - decaying)) / decaying)))


def _one_cycle_rise(done: float) -> float:
    return _down_to(_ONE_CYCLE_FIRST, 1 - _half_cosine(done))


def _one_cycle(optim: Optim, step: int, warmup: int, total: int) -> float:
    return _down_to(_ONE_CYCLE_FIRST * _ONE_CYCLE_LAST, _half_cosine(_done(step, warmup, total)))


SCHEDULES: Mapping[str, Course] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "one_cycle": _one_cycle,
}
