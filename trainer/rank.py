"""The program of one rank, whoever started it: Ray Train, torchrun, srun, or this process alone.

open:      ranks, settings resolved, this start's place in the run's folder, and who watches over it    (`run_rank`)
assemble:  data -> base -> sharded model -> engine -> checkpoint                                        (`_assemble`)
train:     one generator over steps
(trainer/train/loop.py)
"""

import time
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from trainer.base.load.load import LoadReport
from trainer.config import Config
from trainer.config.evaluation import split_of
from trainer.data.compile.inputs import config_of_set
from trainer.data.compile.prepare import Datasets, training_place
from trainer.data.dataset.chapters import open_chapters
from trainer.data.dataset.dataset import open_dataset
from trainer.data.dataset.rollouts import Rollouts
from trainer.data.order.settings import Position
from trainer.data.order.stream import Stream, eval_stream, rollout_stream, sees_pictures, train_stream
from trainer.data.render.text_files import keep_text, run_text
from trainer.evaluate.rollout.making import rollouts_of
from trainer.export.refusals import told_exports
from trainer.model.attention import Attention
from trainer.model.parts import recomputed_share
from trainer.plan.assemble import (
    assemble,
    attention_of,
    check_same_base,
    choose_sharding,
    join_run,
    settle,
)
from trainer.plan.flops import work_of
from trainer.plan.inputs import copies_updates
from trainer.plan.resolve import resolve_alike
from trainer.run import layout
from trainer.run.environment import environment
from trainer.run.log import tell
from trainer.run.metrics import metered, peak_memory
from trainer.run.owner import lost_ranks
from trainer.run.records import bad_windows, claim_generation
from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.kept import LastUpdates
from trainer.state.neighbour import met
from trainer.state.zero.engine import Engine
from trainer.store.store import open_run_store
from trainer.train.features import KeptFeatures, kept_features
from trainer.train.horizon import horizon_of
from trainer.train.loop import Training, stop_before_training, train
from trainer.train.reference import ReferencePass
from trainer.train.start import (
    ClaimedStart,
    Elapsed,
    Start,
    Starter,
    begin_from,
    early_end,
    opened,
    record_changes,
    record_plan,
    record_start,
)
from trainer.train.stop_rules import open_stop_rules
from trainer.train.supply import compiled, stored_teacher, supply_of
from trainer.tuning.objective.rollouts import LearnsFromRollouts, unlike_sampler


def run_rank(
    config: Config,
    datasets: Datasets | None,
    *,
    resume: bool,
    starter: Starter | None = None,
) -> None:
    """Train `config`'s run as one rank, from its newest checkpoint or, unless `resume` demands one, from the start.

    `datasets` are in the store already; rank 0's count. Restores by itself, always: whoever restarts a rank calls this
    again.

    Raises:
        CapstanError: of the kind whose exit code the process should end with; `Stopped` when asked to stop.
    """
    starter = starter or Starter()
    elapsed = Elapsed(starter.began)
    store = open_run_store(config)
    folder = store.sub(config.run.name)
    ranks = join_run(config, lost_ranks(folder))
    elapsed.met()
    resolved = resolve_alike(config, ranks)
    starter = replace(starter, kept=met(ranks, starter.kept, copies=copies_updates(resolved.config)))
    shared: Datasets = ranks.broadcast(datasets)
    generation: int = ranks.broadcast(claim_generation(folder) if ranks.rank == 0 else None)
    with (
        opened(ClaimedStart(resolved, ranks, store, folder, generation, starter, elapsed)) as start,
        early_end(start),
    ):
        training, restored = _assemble(start, shared, resume=resume)
        _train(start, training, restored)


class _Rows(NamedTuple):
    """This rank's rows for training, for the held-out data, and for each of `eval.sets`."""

    train: Stream
    held_out: Stream | None
    sets: dict[str, Stream]


def _train(start: Start, training: Training, restored: CheckpointManifest | None) -> None:
    """Take the remaining steps and write the record of each. Takes none if a stop was requested while the model was
    loaded.
    """
    metrics, device, first = start.metrics, start.ranks.device, start.ranks.rank == 0
    step, position = training_place(restored)
    last = training.horizon.steps  # unless something ends it before
    stop_before_training(training, step, position, committed=restored is not None and bool(restored.shards))
    metrics.write("phase", phase="first_step")
    # Its threads may be waiting for a chapter that will not come.
    with (
        closing(training.stream.chapters),
        metered(device, reads=first) as power,
        closing(train(training, step, position)) as steps,
    ):
        for record in steps:
            if record["step"] == step + 1:
                metrics.write("first_step", step=step + 1, seconds=start.elapsed.seconds)
                if unlike := unlike_sampler(record):
                    start.log(unlike)
            metrics.write("step", **record, **peak_memory(device), **power())
            start.starter.observe({**record, "restarts": start.generation - 1})
            last = record["step"]
    metrics.write("end", outcome="finished", step=last, reason=training.rules.ended)


def _assemble(start: Start, datasets: Datasets, *, resume: bool) -> tuple[Training, CheckpointManifest | None]:
    """Assemble data, model, engine and checkpoints; also return the checkpoint that the state comes from, if any.

    The order matters: the number of rows decides the accumulation that DeepSpeed is told, a reference is read off the
    base, or the base with the adapter that the run begins from, before a checkpoint is restored into it, and the record
    of the start says how long all of that took.
    """
    resolved, ranks = start.resolved, start.ranks
    if ranks.rank == 0:
        start.folder.put(layout.ENVIRONMENT, environment(ranks))
    check_same_base(resolved.base, ranks.world)  # before anything made from it is kept for other starts
    rows = _rows(start, datasets)
    attention = attention_of(resolved, ranks.device)
    start.log(f"attention: {attention.name} ({attention.why})")
    if ranks.rank == 0:
        for sentence in told_exports(resolved.config, resolved.base):
            start.log(sentence)
    features = _keep_features(start, attention, datasets, rows)
    settled = settle(resolved, ranks, start.log)
    sharding = choose_sharding(settled, ranks, rows.train.accumulation)
    kept = start.starter.kept
    if resolved.config.cluster.keeper and kept is None:
        start.log("cluster.keeper: true has no effect here: no keeper has started the ranks")
    engine, report = assemble(
        settled, ranks, attention, sharding, tell, kept and kept.shares, features and features.weights
    )
    if resolved.beginning is not None and not resolved.beginning.begun:
        begin_from(resolved.beginning, start, engine)
    if resolved.reference == "stored" and (features is None or features.whole):
        fused = [] if report.kernels == "none" else [report.kernels]
        kernels = " and ".join([attention.name, *fused])
        _read_reference(ReferencePass(start, engine, kernels, features and features.files), datasets, rows)
    checkpoints = _checkpoints(start, datasets, rows.train.rollouts, kept and kept.updates)
    restoring = time.monotonic()
    restored = checkpoints.restore(engine, required=resume, log=tell)
    restore_seconds = round(time.monotonic() - restoring, 3)
    training = _training(start, engine, report, rows, checkpoints, datasets, training_place(restored))
    step, total = training_place(restored)[0], training.horizon.steps
    source = None if restored is None else "checkpoint" if restored.shards else "memory"
    if source == "memory" and checkpoints.memory is not None:
        sources = ranks.gather_objects(checkpoints.memory.source)
        source = next((one for one in sources if one != source), source)
    facts = {"step": step, "total_steps": total, "restore_seconds": restore_seconds, "restored": source}
    facts["attention"] = attention.name
    of_sets = {split_of(name): key for name, key in datasets.sets.items()}
    record_start(start, report, **facts, data={"train": datasets.train, "eval": datasets.eval, **of_sets})
    if ranks.rank == 0:
        record_plan(start, settled)
        record_changes(start)
    return training, restored


def _rows(start: Start, datasets: Datasets) -> _Rows:
    config, rank, world_size = start.config, start.ranks.rank, start.ranks.world_size

    def evaluated(config: Config, fingerprint: str) -> Stream:
        stream = eval_stream(config, open_dataset(start.store, fingerprint), rank, world_size)
        return sees_pictures(stream, config, start.resolved.base, start.store.sub(layout.dataset(fingerprint)))

    if isinstance(start.objective, LearnsFromRollouts):
        place, judge = rollouts_of(start.resolved, start.folder, datasets.train), start.objective.judge
        judged = judge is not None and not judge.is_server
        train = rollout_stream(
            config, Rollouts(place, config.rollout.chapters(config.train.steps or 0), judged=judged), rank, world_size
        )
    else:
        train = train_stream(config, open_chapters(start.store, datasets.train, start.folder), rank, world_size)
    with start.ranks.agreeing():
        sees_pictures(train, config, start.resolved.base, start.store.sub(layout.dataset(datasets.train)))
        train.teacher = stored_teacher(start, datasets.train, train.chapters.reads)
    return _Rows(
        train,
        evaluated(config, datasets.eval) if datasets.eval else None,
        {name: evaluated(config_of_set(config, name), key) for name, key in datasets.sets.items()},
    )


def _keep_features(start: Start, attention: Attention, datasets: Datasets, rows: _Rows) -> KeptFeatures | None:
    """Have the streams read kept features instead of pictures, if the run keeps any. Collective."""
    every = [datasets.train, *([datasets.eval] if datasets.eval else []), *datasets.sets.values()]
    features = kept_features(start, attention, list(dict.fromkeys(every)), rows.train.chapters)
    streams = [rows.train, *([rows.held_out] if rows.held_out else []), *rows.sets.values()]
    if features is not None and features.whole:
        for stream in streams:
            if stream.pictures is not None:
                stream.pictures.over(features.files)
    return features


def _read_reference(reference: ReferencePass, datasets: Datasets, rows: _Rows) -> None:
    """Give the streams the stored reference of their data, and compute it if it is missing. After a stop request the
    streams may be without it. Collective.
    """
    rows.train.reference = reference.log_probabilities(datasets.train, rows.train.chapters)
    if rows.held_out is not None and datasets.eval:
        rows.held_out.reference = reference.log_probabilities(datasets.eval)


def _checkpoints(
    start: Start, datasets: Datasets, rollouts: Rollouts | None, memory: LastUpdates | None
) -> Checkpoints:
    """The checkpoints of the run. The run's folder keeps the texts that they refer to. Collective."""
    resolved, ranks = start.resolved, start.ranks
    identity = ranks.on_first(lambda: resolved.identity(datasets.train))
    ranks.on_first(lambda: keep_text(start.folder, run_text(resolved.config.data, resolved.base.directory)))
    hooks = CommitHooks(start.metrics.write_now, before=start.metrics.flush, after=start.after_commit)
    if rollouts is not None:
        chapter = resolved.config.rollout.chapter
        hooks = replace(hooks, oldest=lambda step: rollouts.forget_before(chapter(step)))
    rules = resolved.config.checkpoint
    if rollouts is not None:  # the answers after a checkpoint are made by the model that it has
        memory = None
    return Checkpoints(start.folder, ranks, start.generation, identity, rules, hooks, datasets.evaluated, memory=memory)


def _training(
    start: Start,
    engine: Engine,
    report: LoadReport,
    rows: _Rows,
    checkpoints: Checkpoints,
    datasets: Datasets,
    place: tuple[int, Position],
) -> Training:
    """Everything that the loop needs to go on from `place`, without windows of data whose loss was not finite before.
    Collective.
    """
    config, ranks = start.config, start.ranks
    bad = ranks.broadcast(bad_windows(start.folder) if ranks.rank == 0 and config.retry.skip_bad_window else [])
    skipped = tuple(map(Position.from_json, bad))
    recomputed = recomputed_share(engine.model)
    return Training(
        start=start,
        engine=engine,
        stream=rows.train,
        supply=supply_of(start, datasets, rows.train.rollouts) if rows.train.rollouts else compiled,
        eval_stream=rows.held_out,
        eval_sets=rows.sets,
        checkpoints=checkpoints,
        horizon=horizon_of(config.train, datasets.epochs, *place, skipped),
        work=work_of(config, start.resolved.base.architecture, recomputed, ranks.device_name),
        rules=open_stop_rules(start, place[0], checkpoints.evaluated),
        refill=report.refill,
        skipped=skipped,
    )
