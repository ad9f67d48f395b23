"""`capstan teach` for a run that learns from its own answers.

The teacher is sharded over ranks of its own, and judges each chapter as soon as it is committed. So no rank that trains
has it in memory, and the process may be killed and started again at any time.
"""

import time
from typing import Any

import numpy as np
from torch import Tensor

from trainer.base.find.locate import resolve_base
from trainer.config import Config, parse_config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.rollouts import Rollouts, commit_judgement, is_committed, is_judged
from trainer.data.dataset.taught import begin_teacher
from trainer.data.order.stream import eval_stream
from trainer.errors import NonFiniteLoss, shown
from trainer.evaluate.request import Ask, Tell
from trainer.evaluate.rollout.making import rollouts_of
from trainer.evaluate.rollout.serving import has_finished, oldest
from trainer.evaluate.teach import TeacherModel, by_document, open_teacher
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.plan.resolve import resolve
from trainer.store.store import open_run_store
from trainer.tuning.objective.rollouts import LearnsFromRollouts
from trainer.tuning.objective.teacher import Teacher

_LOOK_SECONDS = 0.5
_SAY_SECONDS = 60.0


def judge_answers(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Judge the answers of the run of `ask.config` until it has all of them or has finished. Collective.

    Raises as `trainer.evaluate.teach.teach`.
    """
    config = parse_config(ask.config, name="the run's settings")
    resolved = resolve(config, resolve_base(config.model))
    objective, store = resolved.objective, open_run_store(config)
    assert isinstance(objective, LearnsFromRollouts), "the launcher refuses other objectives"
    teacher = objective.judge
    assert teacher is not None
    model = open_teacher(config, resolved.base, teacher, tell)
    ranks, run = model.ranks, store.sub(config.run.name)
    place = rollouts_of(resolved, run, ranks.on_first(lambda: prepare(config, resolved.base, store).train))
    vocabulary = model.resolved.base.architecture.vocabulary
    ranks.on_first(lambda: begin_teacher(place.sub("teacher"), teacher, model.facts(), vocabulary))
    rollouts = Rollouts(place, config.rollout.chapters(config.train.steps or 0))
    rules = config.rollout
    chapter, made, told = ranks.on_first(lambda: rules.chapter(oldest(run))), 0, 0.0
    tell({"log": f"{teacher.name} judges the answers in {place.uri}"})
    with model.computing():
        while chapter < rollouts.chapters.count:
            judged, there = ranks.on_first(lambda at=chapter: (is_judged(place, at), is_committed(place, at)))
            if judged:
                chapter += 1
                continue
            answers = f"the answers of step {rules.first_step(chapter) + 1}"
            if there:
                made += _judge(model, rollouts, config, chapter, teacher)
                tell({"log": f"{answers} are judged"})
            else:
                if time.monotonic() - told > _SAY_SECONDS:
                    told = time.monotonic()
                    tell({"log": f"{answers} are not there yet"})
                if ranks.on_first(lambda: has_finished(run)):
                    break
                chapter = max(chapter, ranks.on_first(lambda: rules.chapter(oldest(run))))
                time.sleep(_LOOK_SECONDS)
    return {"steps": min(rules.first_step(chapter), config.train.steps or 0), "made": made}


def _judge(model: TeacherModel, rollouts: Rollouts, config: Config, chapter: int, teacher: Teacher) -> bool:
    """Write the teacher's judgement of the chapter. Returns False if another process was faster. Collective."""
    ranks = model.ranks
    with ranks.agreeing():
        rollouts.chapters.look()
        data = rollouts.chapters.get(chapter)
    # The virtual tokens before each document are the teacher's, not the run's.
    order = config.model_copy(update={"tuning": model.resolved.config.tuning})
    mine = dict[int, Any]()
    for batches in eval_stream(order, data, ranks.rank, ranks.world_size).epoch(0):
        for batch in batches:
            values = model.engine.look(_log_p, batch).float().cpu().numpy()
            mine.update(zip(batch.documents, by_document(batch, values), strict=True))
    every = ranks.gather_items(mine)

    def write() -> bool:
        numbers = sorted(every)
        log_p = np.concatenate([every[number] for number in numbers])
        if not np.isfinite(log_p).all():
            raise NonFiniteLoss(
                f"{teacher.setting}: {shown(teacher.name)} gives an answer of step"
                f" {config.rollout.first_step(chapter) + 1} no finite log-probability, so it cannot teach. Try"
                " model.dtype: bf16, or another teacher."
            )
        divergence = float((rollouts.read(numbers)[:, 0] - log_p).mean())
        return commit_judgement(rollouts.place, chapter, log_p, divergence)

    return ranks.on_first(write)


def _log_p(model: PackedModel, batch: MicroBatch) -> Tensor:
    """Return (targets,) in nats."""
    return -model.head(model.hidden(batch.input), batch.labels, batch.places, per_target=True)
