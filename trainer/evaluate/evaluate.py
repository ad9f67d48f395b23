"""`capstan evaluate` on one rank: the base and the checkpoint on the same sets, pairs and tasks, and what differs."""

import time
from functools import partial
from typing import Any

from trainer.config import override
from trainer.evaluate.measured import Progress, TaskScores, evaluation, find_work, measure
from trainer.evaluate.request import Ask, Tell
from trainer.evaluate.sharded_model import OpenedRun, open_run
from trainer.evaluate.subjects import subjects
from trainer.export.trained import trained_config
from trainer.run.evaluations import keep_evaluation, other_settings
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import open_store

_TOLD_SECONDS = 0.2


def evaluate(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Measure both sides, or the base alone; keeps the evaluation of a checkpoint in the run's folder, unless it is `under` other settings
    than the run's, which it names. Collective."""
    opened = open_run(
        open_store(ask.run), ask.step, ask.overrides, base_alone=ask.base, log=lambda text: tell({"log": text})
    )
    progress = _progress(tell)
    opened.ranks.on_first(lambda: subjects(opened.resolved.config))
    tasks = partial(_tasks, ask, progress) if opened.resolved.config.eval.tasks else None
    work = find_work(opened, tasks, progress)
    with opened.as_base() as base:
        before = measure(base, work, "base", progress)
    manifest = opened.manifest
    if manifest is None:
        return evaluation(opened, work, before, None)
    opened.load()
    found = evaluation(opened, work, before, measure(opened, work, "adapter", progress))
    return opened.ranks.on_first(lambda: _kept(opened, manifest, found))


def _kept(opened: OpenedRun, manifest: CheckpointManifest, found: dict[str, Any]) -> dict[str, Any]:
    if under := other_settings(override(trained_config(opened.run, manifest)), opened.resolved.config):
        return {**found, "under": under}
    keep_evaluation(opened.run, found)
    return found


def _tasks(ask: Ask, progress: Progress, opened: OpenedRun, side: str) -> TaskScores:
    from trainer.evaluate.tasks import run_tasks

    return run_tasks(opened, opened.resolved.config.eval.tasks, chat=ask.chat, told=partial(progress, f"tasks, {side}"))


def _progress(tell: Tell) -> Progress:
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _TOLD_SECONDS or done >= total:
            last = time.monotonic()
            tell({"progress": what, "done": done, "total": total})

    return progress
