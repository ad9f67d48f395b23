"""Puts the weights of the adapter that a run begins from into what learns, before the first step."""

import torch

from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.state.zero.engine import Engine
from trainer.train.start import Start
from trainer.tuning.shared.beginning import Beginning


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
