"""A run's ranks under Ray Train, and what runs beside them on the cluster.

Ray provides worker group, rendezvous and liveness; we decide what follows an end. Each attempt is one
`TorchTrainer.fit()` without retries of its own, with as many ranks as the cluster has room for. `retry.decide` then
says whether there is another attempt. The train function restores by itself, so an attempt needs to know nothing of the
one before. An elastic run grows when it is asked to commit and start again: Ray Train's own resizing would kill the
ranks in the middle of a step.

The run's servers and `capstan rollout` are actors of Ray. The servers' GPUs are reserved in one placement group before
the ranks ask for theirs.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from launcher.cluster.ray.cluster import (
    BUSY,
    Need,
    alive_nodes,
    local_ray,
    lost_nodes,
    other_nodes,
    room,
    shortage,
    wait_for_room,
)
from launcher.cluster.ray.keepers import Places, check_spares, keeper_here, keepers_on_ray
from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying, stop_if_asked
from launcher.start.group import imported_rank
from launcher.start.keeper import Unprepared
from launcher.start.local_ranks import forked_rank
from launcher.start.sidecars import Child, Sidecar, sidecars_alive, sidecars_of
from trainer.config import Config, parse_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import CapstanError, ConfigError, DoesNotFit, SlowMachine, counted, first_line
from trainer.processes.helper_thread import in_thread
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.requests import request_restart
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store

_LOSS_SECONDS = 30.0
"""Ray's health checks find a dead node within this time."""
# The ranks may still be committing for this long after a node's announced end, because the announcement is a guess.
_PREEMPTION_GRACE_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 5.0


def run_on_ray(attempts: Attempts, dashboard: str | None, log: Callable[[str], None]) -> None:
    """Train until done or until the budgets are used up.

    The cluster is the one that this process has joined, or a Ray started here. `dashboard` is the address of the joined
    cluster's dashboard, which may be empty; None starts a Ray for this run. Raises what `keep_trying` does.
    """
    config = attempts.config
    check_spares(config)
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # ranks stay where the user gave the command
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would log each printed line a second time
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.ray.start_timeout)
    # This is how soon a rank's end is noticed (default 2). A poll of 1,024 ranks takes most of a second of a core.
    polls = max(0.5, (config.cluster.most_workers or 1) / 256)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(polls))
    joined = dashboard is not None
    # Nobody announces the end of the machine on which this process has started its Ray.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(joined))
    # Ray Train takes as long to import as Ray's processes take to start, so both happen at once.
    threading.Thread(target=import_module, args=("ray.train.torch",), daemon=True).start()
    with ExitStack() as stack:
        if not joined:
            stack.enter_context(local_ray(config.cluster.most_workers or 1))
        # The servers' GPUs are reserved before the ranks get theirs, and for all attempts: no attempt may take them.
        stop = partial(stop_if_asked, attempts.run, "while the run was starting")
        group = stack.enter_context(gpus_for_servers(config, can_grow=joined, log=log, stop=stop))
        stack.enter_context(sidecars_on_ray(config, attempts.run, group, log))
        attempts.kept = config.cluster.keeper
        keepers = keepers_on_ray(config.cluster.gpus_per_worker) if config.cluster.keeper else None
        places = Places(keepers, config.cluster.spares, log) if keepers is not None else None
        if places is not None:
            stack.callback(places.close)
        keep_trying(attempts, lambda: _attempt(attempts, dashboard, stop, log, keepers, places), log)


def _attempt(
    attempts: Attempts,
    dashboard: str | None,
    stop: Callable[[], None],
    log: Callable[[str], None],
    keepers: Any = None,
    places: Places | None = None,
) -> retry.Failure | None:
    """Start as many ranks as there is room for, once. Returns why they ended, or None when the run is done.

    `keepers` is the actor with those of the machines, if any, and `places` chooses among these. `stop` may raise to end
    the wait for room. Raises `ConfigError` when the ranks do not begin in time, and `Stopped` when the run need not go
    on.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2.api.exceptions import PreemptionError

    slow = _slow_nodes(attempts)
    try:

        def look() -> None:
            stop()
            if places is not None:
                places.stand_in(slow)

        found = wait_for_room(attempts.config, can_grow=dashboard is not None, log=log, stop=look, without=slow)
    except ConfigError as error:
        if not slow:
            raise
        log(f"the run goes on with its slow machines, as no others took their place: {error}")
        attempts.keep_slow_machines()
        return _attempt(attempts, dashboard, stop, log, keepers, places)
    wanted, workers = found
    without = places.others(wanted, workers, slow) if places is not None else slow
    log(f"launch: Ray starts the processes of {counted(workers, 'rank')}")
    nodes = alive_nodes()
    with scratch_folder("ray") as storage:
        fit = in_thread(_trainer(attempts, dashboard, keepers, wanted, workers, without, storage).fit, "fit")
        group = _Group(attempts, wanted, workers, slow)

        def look_after(training: bool) -> None:
            group.look(training)
            if training and places is not None:
                places.begun(wanted)

        watch = Watch(attempts, look_after)
        while not wait([fit], timeout=0.5).done:
            watch.look()
        try:
            fit.result()
        except WorkerGroupError as error:
            order = range(workers) if keepers is None else ray.get(keepers.order.remote())
            errors = {order[place]: _original(failure) for place, failure in error.worker_failures.items()}
            end = retry.classify(errors, resizing=group.resizing)
            if end.error is not None:
                return end
            # Ray reports a rank's death together with its node's. A broken connection is seen long before either.
            told = any(isinstance(error, retry.RankDied) and error.confirmed for error in errors.values())
            lost = lost_nodes(nodes, within=0 if told else _LOSS_SECONDS)
            return retry.lost_machine(", ".join(lost)) if lost else end
        except PreemptionError as error:
            return retry.lost_machine(first_line(error))
        except ControllerError as error:
            cause = error.controller_failure
            # A rank may have raised one of our errors before its train function.
            ours = cause.cause if isinstance(cause, RayTaskError) else None
            if isinstance(ours, CapstanError):
                return retry.Failure(str(ours), ours)
            return retry.Failure(f"Ray could not start the ranks ({type(cause).__name__}: {first_line(cause)})", None)
    return None


def _slow_nodes(attempts: Attempts) -> list[str]:
    """Return Ray's ids of the nodes that the run has left because they are slow, as far as they are still there."""
    if attempts.config.retry.slow_rank != "replace":
        return []
    left = {name for end in attempts.ends if isinstance(end.error, SlowMachine) for name in end.error.machines}
    return [node for node, name in alive_nodes().items() if name in left]


def _trainer(
    attempts: Attempts,
    dashboard: str | None,
    keepers: Any,
    wanted: Need,
    workers: int,
    without: Sequence[str],
    storage: str,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from launcher.cluster.ray.group import RankGroup

    on_gpu = wanted.each.get("GPU", 0) >= 1
    facts = {"dashboard": dashboard} if dashboard else {}
    about_ray = {"facts": facts, "joined": dashboard is not None, "keepers": keepers}
    return TorchTrainer(
        _rank,
        train_loop_config=attempts.task() | about_ray,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker=wanted.each,
            placement_strategy=attempts.config.cluster.ray.placement,
            label_selector=other_nodes(without),
        ),
        torch_config=RankGroup("nccl" if on_gpu else "gloo", keepers=keepers),
        # Checkpoints and metrics go to the run's own store. Ray Train only wants a place, and puts nothing there.
        run_config=RunConfig(
            name=attempts.config.run.name,
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0,
                max_preemption_failures=0,
                preemption_grace_s=_PREEMPTION_GRACE_SECONDS,
            ),
        ),
    )


class _Group:
    """A group of ranks that Ray starts. It watches whether they begin in time, and whether there is room for more."""

    def __init__(self, attempts: Attempts, wanted: Need, workers: int, without: Sequence[str] = ()) -> None:
        self._attempts, self._wanted, self._workers, self._without = attempts, wanted, workers, without
        self.resizing = False
        self._begun = self._asked = False
        self._began = self._counted = time.monotonic()

    def look(self, training: bool) -> None:
        """Raise `ConfigError` when the ranks do not begin in time."""
        now = time.monotonic()
        if not training:
            self._check_begun(now)
        interval = self._attempts.config.cluster.ray.resize_interval
        if training and self._workers < self._wanted.most and now - self._counted >= interval:
            self._counted = now
            more = min(room(self._wanted.each, self._without), self._wanted.most - self._workers)
            if more > 0 and not self._asked:
                self.resizing = True  # a request that fails may still have reached the ranks
                request_restart(
                    self._attempts.run, f"because {self._workers + more} ranks instead of {self._workers} find room"
                )
                self._asked = True

    def _check_begun(self, now: float) -> None:
        """Check that the ranks have begun.

        Ray limits the wait for resources, but not the wait for the ranks' processes.
        """
        patience = self._attempts.config.cluster.ray.start_timeout
        if not self._begun and self._attempts.run.exists(layout.RANKS_BEGUN):
            self._begun = True
            self._attempts.run.delete(layout.RANKS_BEGUN)
        if not self._begun and now - self._began >= patience:
            raise ConfigError(
                f"cluster.ray.start_timeout: {self._workers} ranks were asked for {patience:g} seconds ago and have not"
                " begun. Raise it, or look for the cause in Ray's own logs (/tmp/ray/session_latest/logs on its"
                " machines)."
            )


def _original(error: BaseException) -> BaseException:
    """Return the original error. Ray wraps what the train function raised, and has its own error for a dead process."""
    from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if isinstance(error, OutOfMemoryError):
        return DoesNotFit(
            f"Ray ended a rank because its machine ran low on host memory ({first_line(error)}). `capstan plan` shows"
            " what a host needs; use fewer ranks on a machine, or larger machines."
        )
    if isinstance(error, RayActorError):
        words = str(error).strip().splitlines()[-1]
        return retry.RankDied(words, error.preempted, confirmed=not isinstance(error, ActorUnavailableError))
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def _rank(arguments: dict[str, Any]) -> None:
    """The train function: one rank, in a Ray worker, or in a process that this machine's keeper forks for it."""
    import ray

    config, rank = parse_config(arguments["config"]), int(os.environ["RANK"])
    if rank == 0:
        run_folder(config).put(layout.RANKS_BEGUN, b"")  # before everything that takes a while on a slow disk
    machine = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
    # Rank 0's notice alone counts, and its reason is that of all.
    preempted = _drain_notice() if arguments["joined"] and rank == 0 else lambda: False
    keepers, observe = arguments.pop("keepers"), _gauges(config.run.name)
    if keepers is not None:
        try:
            task = arguments | {"machine": machine}
            forked_rank(keeper_here(keepers, rank), task, observe=observe, leaves=preempted)
            return
        except Unprepared as why:
            print(f"cluster.keeper: {why}. Rank {rank} starts without it.", flush=True)
    run_rank = imported_rank(config.cluster.gpus_per_worker)
    from trainer.train.start import Starter

    starter = Starter(arguments["facts"], machine, preempted, observe, arguments["began"])
    run_rank(config, Datasets(**arguments["datasets"]), resume=arguments["resume"], starter=starter)


def _drain_notice() -> Callable[[], bool]:
    """Return whether Ray has announced that a node of this group will be taken away.

    Ray tells each rank's process of it. Its public question, `ray.train.get_preemption_info`, only reads that, and is a
    barrier of all ranks in one actor besides: among 1,024 ranks one did not end in two minutes.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    told = get_train_context().preemption_context
    return lambda: told.preemption_info is not None


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


def sidecars_on_ray(config: Config, run: Store, group: Any, log: Callable[[str], None]) -> AbstractContextManager[None]:
    """Run `sidecars_alive` on the cluster that this process has joined.

    Servers have the GPUs of the placement `group`, one bundle each.
    """
    every = sidecars_of(config)
    return sidecars_alive(every, run, lambda one: _Actor(one, run, group, every.index(one)), log)


@contextmanager
def gpus_for_servers(
    config: Config, *, can_grow: bool, log: Callable[[str], None], stop: Callable[[], None]
) -> Iterator[Any]:
    """Yield a placement group with a bundle for each of the run's servers; None if they need no GPUs.

    `stop` may raise to end the wait for it.

    Raises:
        ConfigError: there is no room within cluster.ray.start_timeout, or, without `can_grow`, there never will be.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    serve = config.rollout.serve
    if not config.rollout.serving_gpus:
        yield None
        return
    began, told, patience = time.monotonic(), False, config.cluster.ray.start_timeout
    ranks = (config.cluster.fewest_workers or 1) if config.cluster.gpus_per_worker != 0 else 0
    bundles = [{"GPU": float(serve.gpus)}] * serve.replicas
    group = placement_group(bundles, strategy="PACK")
    try:
        while not group.wait(_LOOK_SECONDS):
            stop()
            total = ray.cluster_resources()
            short = shortage(serve.replicas, bundles[0], total) or BUSY
            never = not can_grow and total.get("GPU", 0.0) < config.rollout.serving_gpus + ranks
            if never or time.monotonic() - began >= patience:
                waited = "" if never else f" after {patience:.0f} seconds (cluster.ray.start_timeout)"
                raise ConfigError(
                    f"rollout.serve: {serve.replicas} x {serve.gpus} GPUs for servers and {ranks} for ranks find no"
                    f" room{waited}: {short}. Lower rollout.serve.replicas or rollout.serve.gpus (0 serves on CPUs), or"
                    " free some."
                )
            if not told and time.monotonic() - began >= _SAY_SECONDS:
                told = True
                log(f"waiting for room for servers, {serve.replicas} x {serve.gpus} GPUs: {short}")
        yield group
    finally:
        remove_placement_group(group)


class _Keeper:
    """The actor. Its child is the process, which Ray starts in the actor's main thread. It passes on its lines."""

    def __init__(self, one: Sidecar, run: str, folder: str, variables: dict[str, str]) -> None:
        import ray.util

        command = one.command(run, ray.util.get_node_ip_address())
        self._child = Child(command, variables, folder if os.path.isdir(folder) else None)

    def words(self) -> Iterator[str]:
        yield from self._child.words()

    def end(self) -> None:
        self._child.end()


class _Actor:
    """A process beside the ranks, kept by an actor. A server's actor has the GPUs of the `bundle` of this number."""

    def __init__(self, one: Sidecar, run: Store, group: Any, bundle: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        where: Any = "DEFAULT"
        if one.is_near:
            where = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        elif group is not None:
            where = PlacementGroupSchedulingStrategy(group, bundle)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": one.gpus, "scheduling_strategy": where}
        # A worker has its machine's environment. A process near the driver has the driver's.
        variables = dict(os.environ) if one.is_near else {}
        # One thread passes on its lines, and another one takes the request to end.
        keeper: Any = ray.remote(_Keeper).options(max_concurrency=2, **options)
        self._actor = keeper.remote(one, run.uri, os.getcwd(), variables)

    def words(self) -> Iterator[str]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            for word in self._actor.words.options(num_returns="streaming").remote():
                yield ray.get(word)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise CapstanError(f"its actor ended ({first_line(cause)})") from error

    def end(self) -> None:
        self._actor.end.remote()
