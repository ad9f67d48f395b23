"""Rows that several ranks share (`sharding.sequence_parallel`): whether a run can have them, in a sentence for each reason why not. No torch.

The exchange itself is trainer/model/rows/attention.py's.
"""

from collections.abc import Iterator

from trainer.base.architecture import Architecture
from trainer.config import Config
from trainer.config.objective import HEADS
from trainer.tuning.method import Method
from trainer.tuning.objective.objective import Objective

_NAME = "sharding.sequence_parallel"
_ALONE = "Set it to 1."


def shared_row_mismatches(config: Config, model: Architecture, method: Method, objective: Objective) -> list[str]:
    """A sentence for each setting that does not suit rows which ranks share."""
    return [] if config.sharding.sequence_parallel == 1 else list(_mismatches(config, model, method, objective))


def _mismatches(config: Config, model: Architecture, method: Method, objective: Objective) -> Iterator[str]:
    size, tokens = config.sharding.sequence_parallel, config.train.micro_batch * config.data.sequence_length
    if model.fails_shared:
        yield f"{_NAME}: {size} ranks cannot share a row of this base, as {model.fails_shared}. {_ALONE}"
    heads = {layer.query_heads: "heads of this base's attention" for layer in model.attention if layer.query_heads}
    heads |= {
        one.heads: "heads or channels of a layer of this base that passes states on"
        for mixing in model.mixing
        for one in mixing.exchanges
    }
    if uneven := sorted(count for count in heads if count % size):
        yield (
            f"{_NAME}: {size} ranks cannot share the {uneven[0]} {heads[uneven[0]]} evenly. Set a divisor of {uneven[0]}."
        )
    if tokens % size:
        yield (
            f"{_NAME}: {size} ranks cannot share a row of {tokens} tokens evenly. Set data.sequence_length to a multiple of {size}."
        )
    if method.virtual.count:
        yield f"{_NAME}: {size} ranks cannot share a row with the virtual tokens of tuning.method: {config.tuning.method}. {_ALONE}"
    if objective.survey is not None or config.objective.name in HEADS:
        yield f"{_NAME}: objective.name: {config.objective.name} looks at parts of a row by themselves, of which {size} ranks would have slices. {_ALONE}"


def uneven_ranks(config: Config, world_size: int, ranks_per_node: int) -> str | None:
    """Why these ranks cannot share rows as the settings say, in a sentence; None if they can."""
    size, per_node = config.sharding.sequence_parallel, min(world_size, ranks_per_node)
    if world_size % size:
        return (
            f"{_NAME}: {size} ranks share each row, and {world_size} ranks are no multiple of {size}. Change cluster.workers, or set a divisor of "
            f"{world_size}."
        )
    if per_node % size:
        return (
            f"{_NAME}: the {size} ranks that share a row must be on one node, and {per_node} ranks of a node are no multiple of {size}. Set a "
            f"divisor of {per_node}."
        )
    return None
