"""The learning rate as a pure function of the step, so that a resumed run has no scheduler state to restore.

`SCHEDULES` has the course after warm-up by the name in `optim.schedule`, as a share of the peak. The formulas are those
of transformers.optimization; one_cycle is torch.optim.lr_scheduler.OneCycleLR (arXiv:1708.07120).
"""

import math
from collections.abc import Callable, Mapping

from trainer.config import Optim

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
