"""The processes beside a run that learns from its own answers: `capstan rollout`, and `capstan teach` for such a run.

`roll_out` has vLLM servers answer the prompts. `judge_answers` has a teacher, sharded over ranks of its own, judge each
chapter as soon as it is committed, so no rank that trains has the teacher in memory. Either process may be killed and
started again at any time.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.base.find.locate import resolve_base
from trainer.config import Config, parse_config
from trainer.config.objective import SERVE, RolloutSettings
from trainer.data.compile.prepare import locate, prepare
from trainer.data.dataset.chapters import give_up
from trainer.data.dataset.rollouts import Rollouts, commit_judgement, is_committed, is_judged
from trainer.data.dataset.taught import begin_teacher
from trainer.data.order.stream import eval_stream
from trainer.errors import NonFiniteLoss, NotFound, shown
from trainer.evaluate.program import Ask, Tell
from trainer.evaluate.rollout.making import Making, ServerSampler, rollouts_of
from trainer.evaluate.rollout.published import published
from trainer.evaluate.rollout.rewards import RewardFailed
from trainer.evaluate.teach import TeacherModel, by_document, open_teacher
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.run.folder import run_config
from trainer.run.records import newest_records
from trainer.servers import CompletionsServer, Refused
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_run_store, open_store
from trainer.tuning.objective.rollouts import LearnsFromRollouts
from trainer.tuning.objective.teacher import Teacher

_LOOK_SECONDS = 0.5
_SAY_SECONDS = 60.0


def roll_out(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Commit the chapters that the run lacks, until the run has all of them or has ended.

    Each chapter uses the newest adapter, if that is not too old.

    Raises:
        CapstanError: a server does not answer, or the reward gives nothing, after some attempts.
    """
    run = open_store(ask.run)
    config = run_config(run, ask.overrides)
    base = resolve_base(config.model)
    resolved = resolve(config, base)
    keys = locate(resolved.config, base)
    making = Making.of(resolved, run, keys["train"], keys.get("eval"))
    place = making.place
    rules, total = config.rollout, config.rollout.chapters(config.train.steps or 0)
    chapter, made, told = rules.chapter(oldest(run)), 0, 0.0
    with ExitStack() as stack:
        stack.callback(making.scoring.close)
        sampler = ServerSampler(place, Path(stack.enter_context(scratch_folder("rollout"))))
        stack.callback(sampler.forget)
        while chapter < total:
            if is_committed(place, chapter):
                chapter += 1
                continue
            answers = f"the answers of step {rules.first_step(chapter) + 1}"
            adapter, sampler.servers = _adapter_for(place, chapter, rules), _servers(rules, run)
            if adapter is None or not sampler.servers:
                if time.monotonic() - told > _SAY_SECONDS:
                    told = time.monotonic()
                    tell({"log": f"{answers} wait for a {'server' if adapter is not None else 'newer adapter'}"})
                    if has_finished(run):
                        break
                chapter = max(chapter, rules.chapter(oldest(run)))
                time.sleep(_LOOK_SECONDS)
                continue
            try:
                sampler.load(adapter)
            except NotFound:  # the run has gone on already
                continue
            began = time.monotonic()
            wanted = making.wanted(chapter)
            with giving_up(run):
                drawn = [sampler.sample(one.request) for one in wanted]
                made += making.commit(chapter, adapter, wanted, drawn, began)
            tell({"log": f"{answers} are there, by the adapter of step {adapter}"})
    return {"steps": min(rules.first_step(chapter), config.train.steps or 0), "made": made}


@contextmanager
def giving_up(run: Store) -> Iterator[None]:
    """Inside, errors that waiting cannot fix end the run, whose ranks wait for the answers.

    Such errors are a reward that fails, or a prompt that a server does not accept.
    """
    try:
        yield
    except (RewardFailed, Refused) as error:
        give_up(run, error)
        raise


def _servers(rules: RolloutSettings, run: Store) -> list[CompletionsServer]:
    """Return the servers of the settings, or those that start with the run, as far as they answer now."""
    urls = list(rules.engine)
    if rules.engine == SERVE:
        urls = list[str]()
        for entry in run.list(layout.SERVERS):
            with suppress(NotFound):  # it has just died
                urls.append(run.get(entry.key).decode())
    return [CompletionsServer.of_adapters("rollout.engine", url) for url in urls]


def _adapter_for(place: Store, chapter: int, rules: RolloutSettings) -> int | None:
    """Return the newest adapter, if it is new enough for the chapter.

    It may come from one of the chapter's own later steps, if the chapter was lost after the first of them.
    """
    first = rules.first_step(chapter)
    newest = next((update for update in reversed(published(place)) if update < first + rules.updates), None)
    return newest if newest is not None and newest >= first - rules.lag else None


def oldest(run: Store) -> int:
    """Return the step of the oldest checkpoint. Chapters before it may be gone."""
    return min(committed_steps(run), default=0)


def has_finished(run: Store) -> bool:
    return any(record["kind"] == "end" and record.get("outcome") == "finished" for record in newest_records(run))


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
