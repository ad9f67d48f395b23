"""The longest row that fits, by the plan's arithmetic, and what each setting that saves activation memory buys.

No torch.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.base.base import Description
from trainer.config import Config, assignment, override
from trainer.errors import ConfigError
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan

_STEP, _MOST = 256, 2**20  # tokens; data.sequence_length takes no more
# These sentences of a plan can be answered with a shorter row, or with scaled positions.
_OF_LENGTH = ("data.sequence_length:", "memory:")


@dataclass(frozen=True)
class LongestRow:
    """The longest row with some `settings`, in tokens, with one row at a time on a rank or a group of ranks.

    It is 0 if none fits. `activations` are the bytes of its activations on a rank, `host` those of host memory on a
    node.
    """

    settings: dict[str, Any]
    tokens: int
    activations: int
    host: int


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks that rows are planned for.

    Each has `memory` bytes of a GPU, or of the host if the ranks are on CPUs.
    """

    world_size: int
    per_node: int
    memory: int
    on_gpu: bool


def longest_rows(config: Config, base: Description, ranks: PlannedRanks) -> list[LongestRow]:
    """Return the longest rows, first with the settings as they are.

    Then come the rows without any setting that saves memory of activations, and with one more such setting in each
    line. A line that does not suit the base or the run is left out.
    """
    found = [_longest(config, base, ranks, {})]
    settings: dict[str, Any] = {}
    for more in _ladder(config, ranks):
        changed = {**settings, **more}
        try:
            given = override(config, *(assignment(name, value) for name, value in changed.items()))
        except ConfigError:  # settings of the run that do not suit this line
            continue
        if _refused(given, base, ranks):
            continue
        settings = changed
        found.append(_longest(given, base, ranks, settings))
    return found


def _ladder(config: Config, ranks: PlannedRanks) -> Iterator[dict[str, Any]]:
    plain = {"train.activation_checkpointing": "none", "train.tiled_mlp": False, "train.activation_offload": False}
    yield {**plain, "train.micro_batch": 1, "sharding.sequence_parallel": 1}
    if not config.quant.held.packs:
        yield {"quant.type": "nf4"}
    yield {"train.activation_checkpointing": "all"}
    yield {"train.tiled_mlp": True}
    if ranks.on_gpu:
        yield {"train.activation_offload": True}
    size = 2
    while size <= min(ranks.world_size, ranks.per_node):
        yield {"sharding.sequence_parallel": size}
        size *= 2


def _plan(config: Config, base: Description, ranks: PlannedRanks, tokens: int) -> Plan:
    """Return the plan with rows of so many tokens."""
    given = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": tokens})})
    gpu, host = (ranks.memory, None) if ranks.on_gpu else (None, ranks.memory)
    return make_plan(given, base, ranks.world_size, ranks.per_node, gpu, host)


def _refused(config: Config, base: Description, ranks: PlannedRanks) -> bool:
    shortfalls = _plan(config, base, ranks, _STEP * config.sharding.sequence_parallel).shortfalls
    return any(not sentence.startswith(_OF_LENGTH) for sentence in shortfalls)


def _longest(config: Config, base: Description, ranks: PlannedRanks, settings: dict[str, Any]) -> LongestRow:
    step = _STEP * config.sharding.sequence_parallel

    def is_too_long(steps: int) -> bool:
        return _plan(config, base, ranks, steps * step).memory_per_gpu.total > ranks.memory

    tokens = step * bisect_right(range(1, _MOST // step + 1), False, key=is_too_long)
    plan = _plan(config, base, ranks, max(step, tokens))
    return LongestRow(settings, tokens, plan.memory_per_gpu.activations, plan.memory_per_host.total)
