"""How often the host waits to learn which experts of a mixture are visited, by the memory of the GPU."""

from datetime import timedelta

import torch

from trainer.config import parse_config
from trainer.model.kernels.grouped import Groups
from trainer.plan import plan
from trainer.plan.assemble import assemble, attention_of, choose_sharding, settle
from trainer.plan.resolve import resolve
from trainer.processes.ranks import Ranks, join


def waits(config_text: str, memories: list[int]) -> list[int]:
    """The waits of one forward pass on GPUs of so many bytes each, which CPUs stand in for, where a few of the small
    base's experts are dequantized at once without a plan."""
    plan.EXPERTS_AT_ONCE = 2**10
    asked, ends = list[int](), Groups.ends.func
    Groups.ends.func = lambda groups: asked.append(1) or ends(groups)
    ranks, found = join(timedelta(seconds=60)), list[int]()
    for memory in memories:
        Ranks.least_device_memory = lambda _, memory=memory: memory  # type: ignore[method-assign]
        resolved = settle(resolve(parse_config(config_text)), ranks, print)
        attention, sharding = attention_of(resolved, ranks.device), choose_sharding(resolved, ranks, accumulation=1)
        engine, _ = assemble(resolved, ranks, attention, sharding)
        asked.clear()
        engine.logits(torch.arange(3, 20)[None])
        found.append(len(asked))
    return found
