"""Decides `model.dtype` if it is not set."""

from trainer.base.base import Description
from trainer.config import Config
from trainer.processes.bf16 import why_slow


def typed(config: Config, base: Description | None = None, *, slow: bool | None = None) -> Config:
    """Return `config` with `model.dtype` decided, if nothing was said of it: fp32 where bf16 is slow.

    `slow` says whether it is on the machines of the run; by default this machine is asked. A `base` that is stored in
    bits that were made of one type keeps that type.
    """
    if not config.leaves_type_open:
        return config
    if base is not None and base.stored.quantized:
        return config.computing_in("bf16")
    if slow is None:
        slow = why_slow(config.cluster.gpus_per_worker) is not None
    return config.computing_in("fp32" if slow else "bf16")
