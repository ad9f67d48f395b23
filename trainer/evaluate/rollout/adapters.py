"""Adapters after each update, published in their run's folder for the servers that sample.

They are written as `capstan export` with layout=vllm writes them:

    <run>/rollouts/<key>/adapters/step-000000012/       the files of an export, and PUBLISHED, which is written last
"""

import json

import torch
from torch import Tensor

from trainer.base.load.load import DTYPES
from trainer.evaluate.rollout.published import published
from trainer.export.write.adapter import for_whole_class, per_expert_files
from trainer.plan.resolve import Resolved
from trainer.processes.accelerator import onto
from trainer.run import layout
from trainer.state.optimizer.optimizer import MASTER
from trainer.state.zero.engine import Engine
from trainer.store.store import Store
from trainer.tuning.shared.linear_adapters import SETTINGS


def publish(place: Store, engine: Engine, resolved: Resolved, step: int) -> None:
    """Publish the adapter of the update `step`, unless it is there. Collective.

    Adapters that no rollout may use any more are removed.
    """
    ranks = engine.ranks
    if ranks.on_first(lambda: place.exists(layout.published(step))):
        return
    weights = _whole(engine, DTYPES[resolved.config.model.dtype])

    def write() -> None:
        model = resolved.config.model
        files = resolved.method.export(weights, model).files
        if SETTINGS in files and json.loads(files[SETTINGS]).get("target_parameters"):
            files = per_expert_files(files, model)
        for name, content in for_whole_class(files, model).items():
            place.put(f"{layout.rollout_adapter(step)}{name}", content)
        place.put(layout.published(step), b"")
        for older in published(place):
            if older < step - resolved.config.rollout.lag - 1:
                place.delete_folder(layout.rollout_adapter(older))

    ranks.on_first(write)


def _whole(engine: Engine, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return everything that learns, by name, on the host of rank 0; empty on the others.

    Collective, one parameter at a time.
    """
    ranks, found = engine.ranks, dict[str, Tensor]()
    for part in engine.partitions():
        places = ranks.gather(part.begin, part.end)
        size = int(max(end - begin for begin, end in places))
        mine = torch.zeros(size, device=ranks.device)
        mine[: part.end - part.begin] = onto(part.states[MASTER.name], ranks.device)
        every = ranks.gather_tensor(mine)
        if ranks.rank == 0:
            whole = torch.empty(int(max(end for _, end in places)), dtype=dtype)
            for values, (begin, end) in zip(every, places, strict=True):
                whole[int(begin) : int(end)] = values[: int(end - begin)].to("cpu", dtype)
            found[part.name] = whole.view(part.shape)
    return found
