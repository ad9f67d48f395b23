"""The first step of a run by several ways to have activations in the backward pass, one after the other on the same
ranks.
"""

from collections import Counter
from typing import Any

from tests.dist import gradients
from trainer.config import parse_config, training
from trainer.model import activations
from trainer.model.held import blockwise
from trainer.plan.assemble import settle
from trainer.plan.resolve import resolve
from trainer.processes import ranks as ranks_module
from trainer.processes.ranks import join

LAYERS = 3


def first_steps(loads: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """`gradients.first_step` of each configuration, data and destination in turn, with the 4-bit matrices that it
    dequantized and the passes through MLPs in tiles, which are of 16 tokens."""
    training.MLP_TILE = activations.MLP_TILE = 16
    counts, found = Counter[str](), []
    _count(blockwise, "dequantize_blocks", "dequantized", counts)
    _count(activations, "dequantized_once", "tiled", counts)
    for load in loads:
        counts.clear()
        found.append({**gradients.first_step(*load), "dequantized": 0, "tiled": 0, **counts})
    return found


def _count(owner: Any, name: str, what: str, counts: Counter[str]) -> None:
    plain = getattr(owner, name)

    def counted(*arguments: Any) -> Any:
        counts[what] += 1
        return plain(*arguments)

    setattr(owner, name, counted)


def settled(config_text: str, memories: list[int]) -> list[tuple[int, str]]:
    """The decision of `train.activation_checkpointing: auto` where so many bytes of the host's memory are left, and the
    line on it.
    """
    config, ranks, found = parse_config(config_text), join(), []
    for memory in memories:
        ranks_module.host_memory_left = lambda memory=memory: memory
        lines = list[str]()
        decided = settle(resolve(config), ranks, lines.append).config
        found.append((decided.train.kept_layers(LAYERS), *lines))
    return found
