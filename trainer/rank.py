"""The program of one rank, whoever started it: Ray Train, torchrun, srun, or this process alone.

assemble: data -> base -> sharded model -> engine -> checkpoints      (this file)
train:    one generator over steps                                    (trainer/train/loop.py)
"""

import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from trainer.assemble import assemble, attention_of, check_same_base, choose_sharding, join_run, settle
from trainer.base.load.load import LoadReport
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.config import Config
from trainer.data.compile.inputs import config_of_set
from trainer.data.compile.prepare import Datasets
from trainer.data.dataset.chapters import open_chapters
from trainer.data.dataset.dataset import open_dataset
from trainer.data.order.micro_batch import Position
from trainer.data.order.stream import Stream, eval_stream, train_stream
from trainer.data.render.text_files import keep_text, text_of
from trainer.errors import CapstanError, DoesNotFit, NonFiniteLoss, Stopped, StorageError
from trainer.export.write.checkpoint_adapters import adapters_beside
from trainer.measure.samples import open_samples
from trainer.model.parts import recomputed_share
from trainer.plan.flops import work_of
from trainer.plan.plan import make_plan
from trainer.ranks import Ranks
from trainer.resolve import Resolved, resolve
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.log import rank_log
from trainer.run.metrics import Metrics, claim_generation, open_trackers, peak_memory
from trainer.run.owner import OwnerWatch
from trainer.run.power import metered
from trainer.run.records import add_record, bad_windows
from trainer.run.requests import StopSignal
from trainer.run.settings import record_settings
from trainer.store import Store, open_run_store
from trainer.train.heartbeat import Hang, Heart
from trainer.train.horizon import horizon_of
from trainer.train.loop import Training, stop_before_training, train
from trainer.train.profile import StepProfile
from trainer.train.reference import ReferencePass
from trainer.zero.engine import Engine

_VERSIONS = ("capstan-llm", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "ray", "obstore")


@dataclass(frozen=True)
class Starter:
    """The values that only the program which started the ranks knows.

    They are facts for the start's record, the name of this machine, whether a machine of the run is about to leave, a
    function that gets the record of each step on rank 0, and when the start began, in seconds since 1970.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=socket.gethostname)
    preempted: Callable[[], bool] = lambda: False
    observe: Callable[[Mapping[str, float]], None] = lambda record: None
    began: float = field(default_factory=time.time)


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
    entered, launch_seconds = time.monotonic(), max(0.0, time.time() - starter.began)
    ranks = join_run(config, OwnerWatch(run_folder(config)).is_gone)
    with ranks.agreeing():
        resolved = resolve(config)
    shared: Datasets = ranks.broadcast(datasets)
    store = open_run_store(config)
    run = store.sub(config.run.name)
    generation: int = ranks.broadcast(claim_generation(run) if ranks.rank == 0 else None)
    with (
        rank_log(run, generation, ranks.rank, ranks.world_size, config.track.flush_seconds) as flush_log,
        # Its wait for the last adapter is outside of what looks for ranks that hang.
        adapters_beside(run, config, partial(print, flush=True), writes=ranks.rank == 0) as after_commit,
        ExitStack() as stack,
    ):
        metrics = Metrics(open_trackers(run, generation, config) if ranks.rank == 0 else ())
        stack.callback(metrics.close)
        metrics.write("phase", phase="load")
        seconds = min(5.0, config.track.flush_seconds)
        stop = StopSignal(run, watches=ranks.rank == 0, seconds=seconds, preempted=starter.preempted)
        stack.callback(stop.close)
        stack.enter_context(_signals(stop))
        heart = Heart(ranks, config.timeouts, _last_words(run, generation, metrics, flush_log))
        stack.callback(heart.close)
        with _outcome(metrics, resolved, ranks):
            start = _Start(
                resolved,
                ranks,
                store,
                run,
                generation,
                metrics,
                stop,
                heart,
                starter,
                launch_seconds,
                entered,
                after_commit,
            )
            _train(start, shared, resume=resume)


@dataclass(frozen=True)
class _Start:
    """One start of the run, on this rank."""

    resolved: Resolved
    ranks: Ranks
    store: Store
    run: Store
    generation: int
    metrics: Metrics
    stop: StopSignal
    heart: Heart
    starter: Starter
    launch_seconds: float
    entered: float
    after_commit: Callable[[], None]

    @property
    def lasted(self) -> float:
        """Seconds since the start began. This process measures its own part by a clock that is never set."""
        return round(self.launch_seconds + time.monotonic() - self.entered, 3)


def _train(start: _Start, datasets: Datasets, *, resume: bool) -> None:
    metrics, starter = start.metrics, start.starter
    training, restored = _assemble(start, datasets, resume=resume)
    step, position = _place(restored)
    stop_before_training(training, step, position, committed=restored is not None)
    metrics.write("phase", phase="first_step")
    rank0 = start.ranks.rank == 0
    traced = start.resolved.config.train.profile if rank0 else None
    with (
        StepProfile(traced, start.run, partial(_log, start.ranks)) as profile,
        metered(start.ranks.device, reads=rank0) as power,
    ):
        profile.reached(step)
        for record in train(training, step, position):
            profile.reached(record["step"])
            if record["step"] == step + 1:
                metrics.write("first_step", step=step + 1, seconds=start.lasted)
            metrics.write("step", **record, **peak_memory(start.ranks.device), **power())
            starter.observe({**record, "restarts": start.generation - 1})
    metrics.write("end", outcome="finished", step=training.horizon.steps, reason="")


def _assemble(start: _Start, datasets: Datasets, *, resume: bool) -> tuple[Training, CheckpointManifest | None]:
    """Data, model, engine and checkpoints, put together; and the checkpoint that the state comes from, if any."""
    resolved, ranks, run = start.resolved, start.ranks, start.run
    config, base, objective = resolved.config, resolved.base, resolved.objective
    log = partial(print, flush=True)
    if ranks.rank == 0:
        run.put(layout.ENVIRONMENT, _environment(ranks))
    stream = train_stream(config, open_chapters(start.store, datasets.train, run), ranks.rank, ranks.world_size)
    held_out = _held_out(start, config, datasets.eval) if datasets.eval else None
    sets = {name: _held_out(start, config_of_set(config, name), key) for name, key in datasets.sets.items()}
    attention = attention_of(resolved, ranks.device)
    _log(ranks, f"attention: {attention.name} ({attention.why})")
    settled = settle(resolved, ranks, partial(_log, ranks))
    sharding = choose_sharding(settled, ranks, stream.accumulation)
    engine, report = assemble(settled, ranks, attention, sharding, log)
    if resolved.reference == "stored":  # before a restore: the base itself may learn
        fused = [] if report.kernels == "none" else [report.kernels]
        _read_reference(start, engine, " and ".join([attention.name, *fused]), datasets, stream, held_out)
    check_same_base(base, ranks)
    identity = ranks.on_first(lambda: resolved.identity(datasets.train))
    ranks.on_first(lambda: keep_text(run, text_of(config.data, base.directory)))
    checkpoints = Checkpoints(
        run,
        ranks,
        start.generation,
        identity,
        config.checkpoint,
        _versions(),
        record=start.metrics.write_now,
        before_commit=start.metrics.flush,
        after_commit=start.after_commit,
    )
    restoring = time.monotonic()
    restored = checkpoints.restore(engine, required=resume, log=log)
    restore_seconds = time.monotonic() - restoring
    bad = ranks.broadcast(bad_windows(run) if ranks.rank == 0 and config.retry.skip_bad_window else [])
    skipped = tuple(map(Position.from_json, bad))
    step, position = _place(restored)
    training = Training(
        config,
        ranks,
        engine,
        objective,
        stream,
        held_out,
        checkpoints,
        start.metrics,
        start.stop,
        horizon_of(config.train, datasets.epochs, step, position, skipped),
        pulse=start.heart,
        work=work_of(config, base.architecture, recomputed_share(engine.model), ranks.device_name),
        eval_sets=sets,
        samples=open_samples(config, base, run, ranks) if config.train.sample_every else None,
        skipped=skipped,
    )
    facts = {"step": step, "total_steps": training.horizon.steps, "restore_seconds": round(restore_seconds, 3)}
    of_sets = {f"eval.sets.{name}": key for name, key in datasets.sets.items()}
    data = {"train": datasets.train, "eval": datasets.eval, **of_sets}
    _record_start(start, settled, report, attention=attention.name, kernels=report.kernels, data=data, **facts)
    return training, restored


def _place(restored: CheckpointManifest | None) -> tuple[int, Position]:
    """The step that a start goes on from, and where in the data."""
    return (restored.step, Position.from_json(restored.position)) if restored else (0, Position())


def _held_out(start: _Start, config: Config, fingerprint: str) -> Stream:
    """This rank's rows of one compiled set that is evaluated."""
    return eval_stream(config, open_dataset(start.store, fingerprint), start.ranks.rank, start.ranks.world_size)


def _read_reference(
    start: _Start, engine: Engine, kernels: str, datasets: Datasets, stream: Stream, held_out: Stream | None
) -> None:
    """Give the streams the stored reference of their data, computed here unless it is there; after a stop request they may
    be without it. Collective."""
    reference = ReferencePass(
        start.resolved,
        kernels,
        start.ranks,
        engine,
        start.store,
        start.stop,
        partial(_log, start.ranks),
        start.heart,
    )
    stream.reference = reference.log_probabilities(datasets.train, stream.chapters)
    if held_out is not None and datasets.eval:
        held_out.reference = reference.log_probabilities(datasets.eval)


def _record_start(start: _Start, settled: Resolved, report: LoadReport, **facts: Any) -> None:
    """Write what this start is and how long each part of it took; the plan is that of the `settled` settings. Collective."""
    read_bytes = start.ranks.sum(report.read_bytes)
    processes = start.ranks.gather_objects((socket.gethostname(), os.getpid(), start.starter.machine))
    start.metrics.write(
        "start",
        generation=start.generation,
        world_size=start.ranks.world_size,
        **facts,
        host=processes[0][0],
        hosts=[host for host, _, _ in processes],
        pids=[pid for _, pid, _ in processes],
        machines=[machine for _, _, machine in processes],
        device=start.ranks.device_name,
        launch_seconds=round(start.launch_seconds, 3),
        load_seconds=round(report.seconds, 3),
        load_gigabytes_per_second=round(read_bytes / 1e9 / report.seconds, 3),
        read_bytes=int(read_bytes),
        kept_bytes=report.kept_bytes,
        start_seconds=start.lasted,
        **start.starter.facts,
    )
    if start.ranks.rank == 0:
        _record_plan(start, settled)
        try:
            for change in record_settings(start.run, start.generation, start.resolved.config):
                start.metrics.write("change", **change._asdict())
                _log(start.ranks, change.sentence())
        except StorageError as error:  # a record never decides how a run ends
            _log(start.ranks, f"the settings of this start could not be kept, which does not end the run: {error}")


def _record_plan(start: _Start, settled: Resolved) -> None:
    """Write what was planned beside what will be measured."""
    ranks = start.ranks
    plan = make_plan(settled.config, settled.base.description, ranks.world_size, ranks.ranks_per_node, None)
    parts = (plan.parameters, plan.memory_per_gpu, plan.memory_per_host)
    names = ("parameters", "memory_per_gpu", "memory_per_host")
    start.metrics.write("plan", device=ranks.device.type, **dict(zip(names, map(asdict, parts), strict=True)))


def _environment(ranks: Ranks) -> bytes:
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": ranks.device_name,
        "world_size": ranks.world_size,
        "versions": _versions(),
    }
    return json.dumps(facts, indent=1).encode()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}


def _log(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)


@contextmanager
def _outcome(metrics: Metrics, resolved: Resolved, ranks: Ranks) -> Iterator[None]:
    """Leave the reason of an early end in the metrics and the rank's log, and pass it on."""
    try:
        yield
    except CapstanError as error:
        outcome = "stopped" if isinstance(error, Stopped) else "failed"
        print(f"{outcome}: {error}", file=sys.stderr, flush=True)
        window = {"bad_window": error.window} if isinstance(error, NonFiniteLoss) else {}
        metrics.write("end", outcome=outcome, step=None, reason=str(error), **window)
        raise
    except torch.cuda.OutOfMemoryError as error:
        traceback.print_exc()
        short = DoesNotFit(
            f"out of GPU memory ({str(error).splitlines()[0]}). {planned_memory(resolved, ranks)} Lower "
            "data.sequence_length or train.micro_batch, set train.activation_checkpointing: all, or use more ranks."
        )
        metrics.write("end", outcome="failed", step=None, reason=str(short))
        raise short from error
    except Exception as error:
        traceback.print_exc()
        metrics.write("end", outcome="failed", step=None, reason=f"{type(error).__name__}: {error}")
        raise


def planned_memory(resolved: Resolved, ranks: Ranks) -> str:
    """A sentence on the memory that `capstan plan` expects on one GPU: the total, and its three largest parts."""
    base = resolved.base.description
    plan = make_plan(resolved.config, base, ranks.world_size, ranks.ranks_per_node, ranks.device_memory)
    memory = asdict(plan.memory_per_gpu)
    total = memory.pop("total")
    largest = sorted(memory.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.1f} GiB" for name, size in largest)
    return f"The plan for {ranks.world_size} ranks is {total / 2**30:.1f} GiB a GPU: {parts}."


def _last_words(
    run: Store, generation: int, metrics: Metrics, flush_log: Callable[[], None]
) -> Callable[[Hang, bool], None]:
    """A function that writes a rank's log and end to the run's folder, before it ends because some rank hangs."""

    def say(hang: Hang, mine: bool) -> None:
        flush_log()
        if not mine:
            return
        end = {"outcome": "failed", "step": None, "reason": hang.reason, "hung_ranks": hang.ranks}
        if 0 in hang.ranks:  # then this rank is another, and rank 0 may never write again
            with suppress(StorageError):
                add_record(run, generation, "end", **end)
        metrics.write_now("end", **end)

    return say


@contextmanager
def _signals(stop: StopSignal) -> Iterator[None]:
    """SIGTERM and SIGUSR1 ask for a stop. Only a main thread may say so; under Ray the driver gets the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.request()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
