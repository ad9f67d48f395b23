"""Puts the weights of the adapter that a run begins from into what learns, before the first step."""

import torch

from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.plan.resolve import Resolved, resolve
from trainer.processes.ranks import Ranks
from trainer.state.zero.engine import Engine
from trainer.train.start import Start
from trainer.tuning.shared.initial_adapter import SETTING, Beginning, with_known_start


def resolve_alike(config: Config, ranks: Ranks) -> Resolved:
    """`resolve`, with one adapter to begin from on all ranks: that of a run which is learning may have a newer checkpoint by the time that
    another rank looks. Collective.

    Raises as `resolve`, and `ConfigError` where a folder of PEFT has other weights on another machine.
    """
    if config.tuning.start is None:
        with ranks.agreeing():
            return resolve(config)
    config = ranks.on_first(lambda: with_known_start(config))
    with ranks.agreeing():
        resolved = resolve(config)
    every = ranks.together(lambda: resolved.beginning and resolved.beginning.facts)
    if any(facts != every[0] for facts in every):
        raise ConfigError(
            f"{SETTING}: {shown(config.tuning.start)} has other weights on one machine than on another. Copy one of them to every machine."
        )
    return resolved


def begin_from(beginning: Beginning, start: Start, engine: Engine) -> None:
    """Fill the masters of `engine` from `tuning.start`. Collective.

    Raises:
        StorageError: the adapter cannot be read, or is damaged.
    """
    start.ranks.on_first(beginning.check)
    start.ranks.together(lambda: _fill(beginning, engine))
    engine.refresh(0)
    start.log(f"begins from the adapter of {beginning.facts['start']}")


def _fill(beginning: Beginning, engine: Engine) -> None:
    partitions = {part.name: part for part in engine.partitions()}
    ranges = {name: (part.begin, part.end) for name, part in partitions.items()}
    for name, begin, end, dtype, data in beginning.read(ranges):
        part = partitions[name]
        values = torch.frombuffer(bytearray(data), dtype=SOURCE_DTYPES[dtype])
        part.states["master"][begin - part.begin : end - part.begin].copy_(values)
