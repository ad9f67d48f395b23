"""The learning rate as a pure function of the step, so that a resumed run has no scheduler state to restore."""

import math

from trainer.config import Optim


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of the update that makes step `step` (1 .. total_steps).

    Warm-up is linear and reaches `lr` at step `warmup_steps`, or after `warmup_ratio` of all steps; then `lr` decays to `lr * min_lr_ratio` at the last step.
    """
    warmup_steps = optim.warmup_steps or math.ceil((optim.warmup_ratio or 0) * total_steps)
    if step <= warmup_steps:
        return optim.lr * step / warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    decay = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * decay)
