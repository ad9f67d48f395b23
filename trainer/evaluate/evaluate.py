"""`capstan evaluate` on one rank: it measures the base and the checkpoint on the same sets, pairs and tasks."""

import time
from functools import partial
from typing import Any

from trainer.evaluate.evaluate_served import evaluate_served
from trainer.evaluate.measured import Progress, TaskScores, evaluation, find_work, keep, measure
from trainer.evaluate.request import Ask, Tell
from trainer.evaluate.sharded_model import OpenedRun, open_run
from trainer.evaluate.subjects import subjects
from trainer.store.store import open_store

_TOLD_SECONDS = 0.2


def evaluate(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Measure both sides, or the base alone. Collective.

    The evaluation of a checkpoint is stored in the run's folder, unless it is `under` other settings than the run's;
    then the result names these. If a server answers (`ask.server`), this process alone asks it, and loads no model.
    """
    progress = _progress(tell)
    if ask.server:
        return evaluate_served(ask, tell, progress)
    opened = open_run(
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


def _tasks(ask: Ask, progress: Progress, opened: OpenedRun, side: str) -> TaskScores:
    from trainer.evaluate.tasks.harness import run_tasks
    from trainer.evaluate.tasks.shared_model import SharedModel

    names, told = opened.resolved.config.eval.tasks, partial(progress, f"tasks, {side}")
    run = partial(run_tasks, words=opened.words, longest=opened.resolved.longest, names=names, chat=ask.chat, told=told)
    return SharedModel(opened).serve(run) or {}


def _progress(tell: Tell) -> Progress:
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _TOLD_SECONDS or done >= total:
            last = time.monotonic()
            tell({"progress": what, "done": done, "total": total})

    return progress
