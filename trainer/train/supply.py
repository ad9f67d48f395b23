"""The parts of a run's data that no compilation makes: a stored teacher's records of the rows, and the answers that are
sampled while the run learns.

Servers that sample need the adapter of each update. The run publishes it in its folder, written as `capstan export`
with layout=vllm writes it:

    <run>/rollouts/<key>/adapters/step-000000012/       the files of an export, and PUBLISHED, which is written last
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.base.load.load import DTYPES
from trainer.config.objective import OWN
from trainer.data.compile.prepare import Datasets
from trainer.data.dataset.chapters import given_up
from trainer.data.dataset.dataset import Reads
from trainer.data.dataset.rollouts import Rollouts, is_committed
from trainer.data.dataset.taught import StoredTeacher, read_teacher, read_whole, teacher_folder
from trainer.errors import ConfigError, Stopped, shown
from trainer.evaluate.rollout.making import Making, OwnSampler
from trainer.evaluate.rollout.published import published
from trainer.export.write.adapter import for_whole_class, per_expert_files
from trainer.plan.resolve import Resolved
from trainer.processes.accelerator import onto
from trainer.run import layout
from trainer.state.optimizer import MASTER
from trainer.state.zero.engine import Engine
from trainer.store.store import Store
from trainer.train.start import Start
from trainer.tuning.linear_adapters import PEFT_SETTINGS
from trainer.tuning.objective.teacher import teacher_of

Supply = Callable[[Engine, int], Mapping[str, Any]]
"""Sees to the data of the update behind a step, which is there when the function returns the figures about it, for the
update's record. Collective; raises `Stopped` where a stop was asked for meanwhile."""

_LOOK_SECONDS = 0.2
_SAY_SECONDS = 30.0
_ONCE = ("sampling_seconds", "reward_seconds", "held_out_reward")


def compiled(_engine: Engine, _step: int) -> Mapping[str, Any]:
    """The supply of data that is read from files, which is complete."""
    return {}


def supply_of(start: Start, datasets: Datasets, rollouts: Rollouts) -> Supply:
    """The supply of rollouts. Each chapter is for one update, or for `rollout.updates` of them. Collective."""
    if start.config.rollout.engine != OWN:
        return partial(_by_servers, start, rollouts)
    making = None
    with start.ranks.agreeing():
        if start.ranks.rank == 0:
            making = Making.of(start.resolved, start.folder, datasets.train, datasets.eval)
    return partial(_by_ranks, start, rollouts, making)


def _by_ranks(start: Start, rollouts: Rollouts, making: Making | None, engine: Engine, step: int) -> Mapping[str, Any]:
    """Sample the chapter here, unless an earlier start has. Only rank 0 has its content."""
    ranks = start.ranks
    chapter = start.config.rollout.chapter(step)
    if ranks.on_first(lambda: is_committed(rollouts.place, chapter)):
        return _ready(start, rollouts, step)
    began = time.monotonic()

    def first() -> Making:
        assert making is not None
        return making

    wanted = ranks.on_first(lambda: first().wanted(chapter))
    sampler = OwnSampler(engine, start.resolved.longest, lambda: start.pulse("evaluate", 0))
    drawn = [sampler.sample(one.request) for one in wanted]
    ranks.on_first(lambda: first().commit(chapter, step, wanted, drawn, began))
    return _ready(start, rollouts, step)


def _by_servers(start: Start, rollouts: Rollouts, engine: Engine, step: int) -> Mapping[str, Any]:
    """Publish the adapter, and wait for the chapter that another process commits."""
    publish(rollouts.place, engine, start.resolved, step)
    return _ready(start, rollouts, step)


def _ready(start: Start, rollouts: Rollouts, step: int) -> Mapping[str, Any]:
    """The figures of the step's chapter, once other processes have done their part: sampled it, or judged it."""
    ranks, told, chapter = start.ranks, time.monotonic(), start.config.rollout.chapter(step)
    while True:
        there = ranks.rank == 0 and rollouts.is_ready(chapter)
        rows = ranks.gather(there, start.stop.requested)
        if rows[0][0]:
            rollouts.chapters.look()
            figures = ranks.on_first(lambda: rollouts.figures(chapter))
            # The chapter was sampled once, so only the record of its first update says how long that took.
            if step % start.config.rollout.updates:
                figures = {name: value for name, value in figures.items() if name not in _ONCE}
            lag = step - figures.pop("adapter")
            return {**figures, "lag": lag}
        if any(row[1] for row in rows):
            raise Stopped(f"stopped at step {step}, while answers were waited for")
        ranks.on_first(lambda: _check_given_up(start.folder))
        start.pulse("compile", step + 1)
        if time.monotonic() - told > _SAY_SECONDS:
            told = time.monotonic()
            start.metrics.write("waiting", step=step, what="answers")
        time.sleep(_LOOK_SECONDS)


def _check_given_up(folder: Store) -> None:
    """Raise the reason if the processes that start the servers have said that there will be no more answers."""
    if error := given_up(folder):
        raise error


def stored_teacher(start: Start, fingerprint: str, reads: Reads) -> StoredTeacher | None:
    """The teacher's records of the data set; None if the objective has no teacher.

    Raises:
        ConfigError: it is not there, or not all of it.
        Damaged: it is not what was written.
    """
    teacher = teacher_of(start.objective)
    if teacher is None:
        return None
    folder = teacher_folder(start.store.sub(layout.dataset(fingerprint)), teacher.to_json())
    record, whole = read_teacher(folder), read_whole(folder)
    if record is None or whole is None:
        raise ConfigError(
            f"{teacher.setting}: {shown(teacher.name)} has not yet written {'all of ' if record else ''}its"
            f" log-probabilities of this run's data into {folder.uri}. Run capstan teach CONFIG first, with this"
            " configuration."
        )
    start.log(f"the teacher's {record.k} likeliest tokens of {whole.targets:,} targets are in {folder.uri}")
    return StoredTeacher(folder, record, whole, reads)


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
        if PEFT_SETTINGS in files and json.loads(files[PEFT_SETTINGS]).get("target_parameters"):
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
