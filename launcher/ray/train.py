"""A run's ranks under Ray Train: worker group, rendezvous and liveness are Ray's, what happens after an end is ours.

Each attempt is one `TorchTrainer.fit()` without retries of its own, with as many ranks as the cluster has room for;
`retry.decide` then says whether there is another. The train function restores by itself, so an attempt needs to know
nothing of the one before. An elastic run grows by being asked to commit and start again: Ray Train's own resizing would
kill the ranks in the middle of a step.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from launcher.policy import retry
from launcher.ray.cluster import Need, alive_nodes, first_line, local_ray, lost_nodes, need, room, wait_for_room
from launcher.start.stopping import stop_if_asked
from trainer.checkpoint.listing import committed_steps
from trainer.config import Config, dump_config, parse_config
from trainer.data.compile.prepare import Datasets
from trainer.devices import stay_on_cpu
from trainer.errors import CapstanError, ConfigError, DoesNotFit, Stopped, StorageError, Superseded
from trainer.files.scratch import scratch_folder
from trainer.run import layout
from trainer.run.background import say
from trainer.run.folder import command, run_folder
from trainer.run.owner import Ownership
from trainer.run.records import generations, newest_records, record_end, record_restart
from trainer.run.requests import request_restart
from trainer.store import Store

_LOOK_SECONDS = 2.0
_LOSS_SECONDS = 30.0
"""Ray's health checks find a dead node within this time."""
# The ranks may still be at their commit for so long past a node's announced end: the announcement is a guess.
_PREEMPTION_GRACE_SECONDS = 30.0


@dataclass
class _ClusterRun:
    """A run on its cluster, over all its attempts: `ends` are theirs so far.

    `before` is the newest generation before the attempt that is made now; `committed`: the run has a checkpoint. Both are
    what the store has told last.
    """

    config: Config
    datasets: Datasets
    owner: Ownership
    resume: bool
    dashboard: str | None
    began: float
    ends: list[retry.Failure] = field(default_factory=list)
    before: int = 0
    committed: bool = False

    @property
    def run(self) -> Store:
        return self.owner.run


def run_on_ray(
    config: Config,
    datasets: Datasets,
    owner: Ownership,
    *,
    resume: bool,
    dashboard: str | None,
    log: Callable[[str], None],
) -> None:
    """Train on the Ray cluster that this process has joined, or on a Ray started here, until done or beyond the budgets.

    `dashboard` is the address of the joined cluster's, which may be empty; None starts a Ray for this run.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # ranks stay where the user's command was given
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would log each printed line a second time
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.ray.start_timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a rank's end is noticed; default 2
    began, run = time.time(), owner.run
    joined = dashboard is not None
    # Nobody announces the end of the machine that this process has started its Ray on.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(joined))
    # Ray Train takes as long to import as Ray's processes take to start, so both happen at once.
    threading.Thread(target=import_module, args=("ray.train.torch",), daemon=True).start()
    with nullcontext() if joined else local_ray(config.cluster.most_workers or 1):
        cluster_run = _ClusterRun(config, datasets, owner, resume, dashboard, began)
        while True:
            try:
                owner.check()
                cluster_run.before = max(generations(run), default=0)
                wanted, workers = wait_for_room(
                    lambda: need(config),
                    config.cluster.ray.start_timeout,
                    can_grow=joined,
                    log=log,
                    stop=lambda: stop_if_asked(run, "while the run was starting"),
                )
                log(f"launch: Ray starts the processes of {workers} ranks")
                end = _attempt(cluster_run, wanted, workers)
            except Superseded:
                raise
            except StorageError as error:
                end = retry.Failure(str(error), error)
            except (ConfigError, Stopped) as error:
                if cluster_run.ends:
                    raise _between_attempts(cluster_run, error) from None
                raise
            if end is None:
                return
            decision = _after(cluster_run, end)
            if decision.error is not None:
                raise decision.error
            log(decision.reason)
            cluster_run.began = time.time()


def _after(cluster_run: _ClusterRun, end: retry.Failure) -> retry.Decision:
    """Keep why an attempt ended, and decide what follows, which a store that does not answer keeps nobody from."""
    run, before = cluster_run.run, cluster_run.before
    try:
        cluster_run.owner.check()  # the newest records would be another start's
        end = retry.explained(end, newest_records(run, after=before))
        record_end(run, end.reason, stopped=isinstance(end.error, Stopped), crash=end.error is None, after=before)
        cluster_run.committed = bool(committed_steps(run))
    except Superseded:
        raise
    except StorageError as error:
        say(f"why this start ended could not be kept, which does not end the run: {error}")
    cluster_run.ends.append(end)
    rules, tell = cluster_run.config.retry, partial(command, folder=run)
    decision = retry.decide(cluster_run.ends, rules, committed=cluster_run.committed, command=tell)
    if decision.error is None:
        with suppress(StorageError):
            record_restart(run, decision.reason)
    return decision


def _between_attempts(cluster_run: _ClusterRun, error: ConfigError | Stopped) -> CapstanError:
    """The error that ends a run which has trained before, kept as the end of the start that comes to nothing."""
    if isinstance(error, ConfigError) and cluster_run.committed:
        resume = command("resume", cluster_run.run)
        error = Stopped(f"{cluster_run.ends[-1].reason}; since then: {error} {resume} goes on.")
    with suppress(StorageError):
        record_end(cluster_run.run, str(error), stopped=isinstance(error, Stopped), after=cluster_run.before)
    return error


def _attempt(cluster_run: _ClusterRun, wanted: Need, workers: int) -> retry.Failure | None:
    """One start of the worker group; returns why it ended, or None when the run is done.

    Raises `ConfigError` when its ranks do not begin in time, and `Stopped` when it need not go on.
    """
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2.api.exceptions import PreemptionError

    cluster_run.run.delete(layout.RESTART)
    cluster_run.run.delete(layout.RANKS_BEGUN)
    nodes = alive_nodes()
    with scratch_folder("ray") as storage:
        fit = _Background(_trainer(cluster_run, wanted, workers, storage).fit)
        watch = _Watch(cluster_run, wanted, workers)
        while not fit.ended(within=0.5):
            watch.look()
        try:
            fit.result()
        except WorkerGroupError as error:
            errors = {rank: _original(failure) for rank, failure in error.worker_failures.items()}
            end = retry.classify(errors, resizing=watch.resizing)
            if end.error is not None:
                return end
            # Ray reports a rank's death together with its node's; a broken connection is seen long before either.
            told = any(isinstance(error, retry.RankDied) and error.confirmed for error in errors.values())
            lost = lost_nodes(nodes, within=0 if told else _LOSS_SECONDS)
            return retry.lost_machine(", ".join(lost)) if lost else end
        except PreemptionError as error:
            return retry.lost_machine(first_line(error))
        except ControllerError as error:
            cause = error.controller_failure
            ours = (
                cause.cause if isinstance(cause, RayTaskError) else None
            )  # what a rank raised before its train function
            if isinstance(ours, CapstanError):
                return retry.Failure(str(ours), ours)
            return retry.Failure(f"Ray could not start the ranks ({type(cause).__name__}: {first_line(cause)})", None)
    return None


def _trainer(cluster_run: _ClusterRun, wanted: Need, workers: int, storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from launcher.ray.group import GpuGroup

    arguments = {
        "config": dump_config(cluster_run.config),
        "datasets": asdict(cluster_run.datasets),
        "resume": cluster_run.resume,
        "facts": {"dashboard": cluster_run.dashboard} if cluster_run.dashboard else {},
        "began": cluster_run.began,
        "joined": cluster_run.dashboard is not None,
    }
    limit = int(max(cluster_run.config.timeouts.model_dump().values())) + 120
    return TorchTrainer(
        _rank,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=wanted.gpus > 0,
            resources_per_worker=wanted.each,
            placement_strategy=cluster_run.config.cluster.ray.placement,
        ),
        torch_config=GpuGroup("nccl", timeout_s=limit) if wanted.gpus else TorchConfig("gloo", timeout_s=limit),
        # Checkpoints and metrics go to the run's own store; Ray Train only wants a place to put nothing.
        run_config=RunConfig(
            name=cluster_run.config.run.name,
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0,
                max_preemption_failures=0,
                preemption_grace_s=_PREEMPTION_GRACE_SECONDS,
            ),
        ),
    )


class _Background:
    """A call in a thread that nobody has to wait for: it ends with Ray at the latest."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def ended(self, within: float) -> bool:
        self._thread.join(within)
        return not self._thread.is_alive()

    def result(self) -> None:
        if self._error is not None:
            raise self._error


class _Watch:
    """The driver's checks while ranks work: whether they begin, room for more, a stop that need not wait for a step."""

    def __init__(self, cluster_run: _ClusterRun, wanted: Need, workers: int) -> None:
        self._cluster_run, self._wanted, self._workers = cluster_run, wanted, workers
        self.resizing = False
        self._begun = self._training = self._asked = self._failing = False
        self._began = self._looked = self._counted = time.monotonic()

    def look(self) -> None:
        """Raises `ConfigError` when the ranks do not begin in time, and `Stopped` when a stop was asked for, nothing new is
        trained and something is committed already. A store that does not answer is asked again at the next look."""
        try:
            self._look()
        except StorageError as error:
            if not self._failing:
                say(f"looking after the ranks failed, which does not end the run, and will be tried again: {error}")
            self._failing = True
        else:
            self._failing = False

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS and not self._training:
            self._looked = now
            self._check_begun(now)
            self._training = self._has_started()
            if not self._training and committed_steps(self._cluster_run.run):
                stop_if_asked(self._cluster_run.run, "while the run was starting")
        interval = self._cluster_run.config.cluster.ray.resize_interval
        if self._training and self._workers < self._wanted.most and now - self._counted >= interval:
            self._counted = now
            more = min(room(self._wanted.each), self._wanted.most - self._workers)
            if more > 0 and not self._asked:
                self.resizing = True  # a request that fails may have reached the ranks all the same
                request_restart(
                    self._cluster_run.run, f"because {self._workers + more} ranks instead of {self._workers} find room"
                )
                self._asked = True

    def _check_begun(self, now: float) -> None:
        """Ray bounds the wait for resources, but not that for the processes of the ranks."""
        patience = self._cluster_run.config.cluster.ray.start_timeout
        if not self._begun and self._cluster_run.run.exists(layout.RANKS_BEGUN):
            self._begun = True
            self._cluster_run.run.delete(layout.RANKS_BEGUN)
        if not self._begun and now - self._began >= patience:
            raise ConfigError(
                f"cluster.ray.start_timeout: {self._workers} ranks were asked for {patience:g} seconds ago and have not begun. "
                "Raise it, or look for the cause in Ray's own logs (/tmp/ray/session_latest/logs on its machines)."
            )

    def _has_started(self) -> bool:
        records = newest_records(self._cluster_run.run, after=self._cluster_run.before)
        return any(record["kind"] == "start" for record in records)


def _original(error: BaseException) -> BaseException:
    """Ray wraps what the train function raised, to carry its traceback; a dead process has an error of its own."""
    from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, OutOfMemoryError):
        return DoesNotFit(
            f"Ray ended a rank because its machine ran low on host memory ({first_line(error)}). `capstan plan` shows what a "
            "host needs; use fewer ranks on a machine, or larger machines."
        )
    if isinstance(error, RayActorError):
        words = str(error).strip().splitlines()[-1]
        return retry.RankDied(words, error.preempted, confirmed=not isinstance(error, ActorUnavailableError))
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def _rank(arguments: dict[str, Any]) -> None:
    """The train function: one rank, in a Ray worker."""
    import ray.train

    config = parse_config(arguments["config"])
    if config.cluster.gpus_per_worker == 0:
        stay_on_cpu()
    if ray.train.get_context().get_world_rank() == 0:
        run_folder(config).put(layout.RANKS_BEGUN, b"")
    from trainer.rank import Starter, run_rank

    node = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
    preempted = _drain_notice() if arguments["joined"] else lambda: False
    starter = Starter(arguments["facts"], node, preempted, _gauges(config.run.name), arguments["began"])
    run_rank(config, Datasets(**arguments["datasets"]), resume=arguments["resume"], starter=starter)


def _drain_notice() -> Callable[[], bool]:
    """Whether Ray has announced that a node of this group will be taken away."""
    import ray.train

    announced = threading.Event()

    def ask() -> None:
        while not announced.wait(1.0):  # each question is a barrier of all ranks, so it is asked beside the training
            if ray.train.get_preemption_info() is not None:
                announced.set()

    threading.Thread(target=ask, name="drain-notice", daemon=True).start()
    return announced.is_set


def _gauges(run: str) -> Callable[[Mapping[str, float]], None]:
    """Puts rank 0's step records into Ray's Prometheus metrics: capstan_step, capstan_loss and so on."""
    from ray.util.metrics import Gauge

    gauges = {
        name: Gauge(f"capstan_{name}", description, tag_keys=("run",))
        for name, description in (
            ("step", "Optimizer steps done"),
            ("loss", "Loss of the last step, nats a target token"),
            ("tokens_per_second", "Tokens a second of the last step, all ranks"),
            ("restarts", "Starts of the run after its first"),
        )
    }
    for gauge in gauges.values():
        gauge.set_default_tags({"run": run})

    def show(record: Mapping[str, float]) -> None:
        for name, gauge in gauges.items():
            gauge.set(record[name])

    return show
