"""`capstan evaluate` on one rank: it measures the base and the checkpoint on the same sets, pairs and tasks.

With `--server` this process alone asks a server that has the run, on the same sets, pairs and tasks. If the server also
has the run's base, it measures that too.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Base
from trainer.base.find.locate import resolve_base
from trainer.base.find.processor import Processor, read_processor
from trainer.config import Config
from trainer.config.evaluation import UNNAMED
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.inputs import as_trained
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT
from trainer.data.dataset.pictures import pictured_documents
from trainer.data.order.pictures import ServedPictures
from trainer.evaluate.measured import (
    EvaluatedSet,
    Losses,
    MeasuredSide,
    OnProgress,
    TaskScores,
    Work,
    evaluated,
    evaluation,
    find_work,
    keep,
    measure,
    sets_of,
    texts_of,
    trained_on,
)
from trainer.evaluate.models import (
    OpenedRun,
    ServedModel,
    SharedModel,
    Words,
    as_it_read,
    open_model,
    settings_of,
)
from trainer.evaluate.program import Ask, Tell
from trainer.evaluate.subjects import gaps_of, has_likelihood, read_pairs, subjects
from trainer.servers import CompletionsServer, refuse_head, refuse_reader_of_prompts
from trainer.store.store import open_run_store, open_store

_TOLD_SECONDS = 0.2


def evaluate(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Measure both sides, or the base alone. Collective.

    The evaluation of a checkpoint is stored in the run's folder, unless it is `under` other settings than the run's;
    then the result names these. If a server answers (`ask.server`), this process alone asks it, and loads no model.
    """
    progress = _progress(tell)
    if ask.server:
        return evaluate_served(ask, tell, progress)
    opened = open_model(
        open_store(ask.run), ask.step, ask.overrides, base_alone=ask.base, log=lambda text: tell({"log": text})
    )
    opened.ranks.on_first(lambda: subjects(opened.resolved.config))
    tasks = partial(_tasks, ask, progress) if opened.resolved.config.eval.tasks else None
    work = find_work(opened, tasks, progress)
    with opened.as_base() as base:
        before = measure(base, work, "base", progress)
    manifest, about = opened.manifest, (opened.resolved.config, opened.resolved.base)
    if manifest is None:
        return evaluation(*about, 0, work, {"base": before})
    manifest = opened.load(or_newer=ask.step is None)
    sides = {"base": before, "adapter": measure(opened, work, "adapter", progress)}
    found = evaluation(*about, manifest.step, work, sides)
    return opened.ranks.on_first(lambda: keep(opened.run, opened.resolved.config, manifest, found))


def _tasks(ask: Ask, progress: OnProgress, opened: OpenedRun, side: str) -> TaskScores:
    from trainer.evaluate.harness import run_tasks

    names, told = opened.resolved.config.eval.tasks, partial(progress, f"tasks, {side}")
    run = partial(run_tasks, words=opened.words, longest=opened.resolved.longest, names=names, chat=ask.chat, told=told)
    return SharedModel(opened).serve(run) or {}


def _progress(tell: Tell) -> OnProgress:
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _TOLD_SECONDS or done >= total:
            last = time.monotonic()
            tell({"progress": what, "done": done, "total": total})

    return progress


# These tokens of the longest text are needed by the request itself: one that it draws, and the last one, which predicts
# nothing.
_OF_A_REQUEST = 2


def evaluate_served(ask: Ask, tell: Tell, progress: OnProgress) -> dict[str, Any]:
    """Measure what the server has.

    `ask.step` is the checkpoint that the server has, as the user says. With it the result is stored in the run's
    folder.

    Raises:
        ConfigError: nothing answers there, it serves no such model, or the run's has a head.
        CapstanError: the server answers with an error, or without log-probabilities.
    """
    run = open_store(ask.run)
    config, manifest = settings_of(run, ask.step, ask.overrides, base_alone=ask.step is None)
    refuse_head(config)
    subjects(config)
    config, base = as_it_read(run, config, resolve_base(config.model), manifest)
    refuse_reader_of_prompts(base.architecture.reads_prompts)
    store, words = open_run_store(config), Words(base, as_trained(config))
    keys = evaluated(config, base, store, progress)
    if not has_likelihood(config):
        keys.pop(UNNAMED, None)
    pairs = read_pairs(config.eval.bias) if config.eval.bias else []
    work = Work(sets_of(config, store, keys), pairs, None, trained_on(store, manifest, keys), keys)
    server = CompletionsServer.find("--server", ask.server, config.run.name)
    parent = server.card().get("parent")
    sides = {**({"base": replace(server, model=parent)} if parent else {}), "adapter": server}
    tell({"log": f"the answers are those of {' and '.join(one.model for one in sides.values())} at {server.url}"})
    longest = next(iter(sides.values())).card().get("max_model_len") or base.architecture.positions
    measured = {
        side: _measured(
            ask, config, base, ServedModel(one, sorted(words.prompter.stops)), words, work, longest, side, progress
        )
        for side, one in sides.items()
    }
    found = _said_by(f"{server.url}#{server.model}", evaluation(config, base, ask.step, work, measured))
    return found if manifest is None else keep(run, config, manifest, found)


def _said_by(server: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return `found` with the server beside each figure: figures by others may be stored beside these."""
    tasks = {
        task: {metric: {**of, "server": server} for metric, of in metrics.items()}
        for task, metrics in found["tasks"].items()
    }
    parts = {part: {name: {**of, "server": server} for name, of in found[part].items()} for part in ("sets", "bias")}
    return {**found, **parts, "tasks": tasks, "server": server}


def _measured(
    ask: Ask,
    config: Config,
    base: Base,
    model: ServedModel,
    words: Words,
    work: Work,
    longest: int | None,
    side: str,
    progress: OnProgress,
) -> MeasuredSide:
    sees = read_processor(base.directory, base.name) if ROW_KINDS[config.data.kind].sees and work.sets else None
    sets = {name: _losses(model, one, partial(progress, f"{name}, {side}"), sees) for name, one in work.sets.items()}
    texts = texts_of(work.pairs, words.prompter) if work.pairs else []
    log_p = [one.log_p for one in model.likelihoods(texts, lambda done: progress(f"pairs, {side}", done, len(texts)))]
    tasks: TaskScores = {}
    if config.eval.tasks:
        from trainer.evaluate.harness import run_tasks

        most, told = longest and longest - _OF_A_REQUEST, partial(progress, f"tasks, {side}")
        tasks = run_tasks(model, words, most, config.eval.tasks, chat=ask.chat, told=told)
    return MeasuredSide(sets, gaps_of(work.pairs, log_p), tasks)


def _losses(model: ServedModel, of: EvaluatedSet, told: Any, processor: Processor | None) -> Losses:
    """Return the losses, one document at a time, because a server packs by itself. Rows with pictures need the
    `processor`."""
    data, documents = of.dataset, len(of.clusters)
    pictures = None if processor is None else ServedPictures(data.store, processor)

    def nats(document: tuple[NDArray[np.uint32], NDArray[np.void]]) -> tuple[float, int]:
        stored, entries = document
        places, ids = np.flatnonzero(stored[1:] & TARGET_BIT).tolist(), (stored & ID_BITS).tolist()
        if not places:
            return 0.0, 0
        ranked = model.server.ranked(pictures.prompt(entries, ids) if pictures and len(entries) else ids)
        return -sum(ranked[place][0] for place in places), len(places)

    every = (document for block in range(len(data.blocks) - 1) for document in pictured_documents(data, block))
    found = np.array(model.each(nats, every, lambda done: told(done, documents)), np.float64)
    return found[:, 0], found[:, 1]
