"""A run's ranks under Ray Train, from the driver's side.

Ray provides worker group, rendezvous and liveness; we decide what follows an end. A group is one `TorchTrainer.fit()`
without retries of its own, with as many ranks as the cluster has room for. `retry.decide` says whether another attempt
follows. That has a group of its own, or, if keepers fork the ranks, the workers of the one before (starts.py). The
train function restores by itself, so an attempt needs to know nothing of the one before. An elastic run grows when it
is asked to commit and start again: Ray Train's own resizing would kill the ranks in the middle of a step.

worker.py is the ranks' side, and sidecars.py has what runs beside them on the cluster.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from typing import Any

from launcher.cluster.ray.cluster import (
    Need,
    alive_nodes,
    local_ray,
    lost_nodes,
    other_nodes,
    room,
    wait_for_room,
)
from launcher.cluster.ray.keepers import Places, check_spares, keepers_on_ray
from launcher.cluster.ray.sidecars import gpus_for_servers, sidecars_on_ray
from launcher.cluster.ray.starts import Starts, starts_on_ray
from launcher.cluster.ray.worker import rank_of_worker
from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying, stop_if_asked
from launcher.start.local_ranks import GivenUp, end_together
from trainer.config import Config
from trainer.errors import CapstanError, ConfigError, DoesNotFit, SlowMachine, counted, first_line
from trainer.processes.helper_thread import in_thread
from trainer.run import layout
from trainer.run.requests import request_restart
from trainer.store.scratch import scratch_folder

_LOSS_SECONDS = 30.0
"""Ray's health checks find a dead node within this time."""
# The ranks may still be committing for this long after a node's announced end, because the announcement is a guess.
_PREEMPTION_GRACE_SECONDS = 30.0


def run_on_ray(attempts: Attempts, dashboard: str | None, log: Callable[[str], None], *, can_grow: bool = True) -> None:
    """Train until done or until the budgets are used up.

    The cluster is the one that this process has joined, or a Ray started here. `dashboard` is the address of the joined
    cluster's dashboard, which may be empty; None starts a Ray for this run. Without `can_grow` no machine joins it once
    the ranks have begun. Raises what `keep_trying` does.
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
        workers = _Workers(attempts, dashboard, stop, log, keepers, places, can_grow=joined and can_grow)
        stack.callback(workers.close)
        keep_trying(attempts, workers.attempt, log)


class _Workers:
    """The groups of workers in which the run's ranks are started, one after another.

    `keepers` is the actor with the keepers of the machines, if any. Ranks that these fork are started again in the same
    group, unless machines or their number have changed. `places` chooses among the machines. `stop` may raise to end
    the wait for room. Without `can_grow` a lost machine does not come back.
    """

    def __init__(
        self,
        attempts: Attempts,
        dashboard: str | None,
        stop: Callable[[], None],
        log: Callable[[str], None],
        keepers: Any = None,
        places: Places | None = None,
        *,
        can_grow: bool = True,
    ) -> None:
        self._attempts, self._dashboard, self._stop, self._log = attempts, dashboard, stop, log
        self._keepers, self._places, self._can_grow = keepers, places, can_grow
        self._group: _Group | None = None

    def attempt(self) -> retry.Failure | None:
        """Start the ranks once. Returns why they ended, or None when the run is done.

        Raises `ConfigError` when they do not begin in time, and `Stopped` when the run need not go on.
        """
        group = self._group
        if group is not None and self._can_start_again(group):
            self._log(f"launch: the workers of Ray have {counted(group.workers, 'rank')} forked again")
            group.start_again(self._attempts.task())
        else:
            self.close()
            group = self._group = self._made(_slow_nodes(self._attempts))
        try:
            end = self._waited_for(group)
        except BaseException:
            self._group = None  # nobody waits for it: its workers may still be starting
            group.close(patience=0)
            raise
        if end is None:
            self.close()
        return end

    def close(self) -> None:
        """End the group, if there is one."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def _can_start_again(self, group: "_Group") -> bool:
        """Whether the workers of the start before are all there, and are to have this start's ranks."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        if self._attempts.ends[-1].kind != "failure" or group.starts is None or not group.starts.all_told():
            return False
        if group.fit.done():
            return False
        try:
            nodes = ray.get(self._keepers.nodes.remote(), timeout=_LOSS_SECONDS)
        except (RayError, GetTimeoutError):
            return False
        return set(nodes) <= alive_nodes().keys() - set(_slow_nodes(self._attempts))

    def _made(self, slow: list[str]) -> "_Group":
        """A group of as many workers as there is room for, on other nodes than the `slow` ones if possible."""

        def look() -> None:
            self._stop()
            if self._places is not None:
                self._places.stand_in(slow)

        config, joined = self._attempts.config, self._dashboard is not None
        can_grow = joined and (self._can_grow or not self._attempts.ends)  # machines that join late are waited for
        try:
            found = wait_for_room(config, can_grow=can_grow, log=self._log, stop=look, without=slow)
        except ConfigError as error:
            if not slow:
                raise
            self._log(f"the run goes on with its slow machines, as no others took their place: {error}")
            self._attempts.keep_slow_machines()
            return self._made([])
        wanted, workers = found
        without = self._places.others(wanted, workers, slow) if self._places is not None else slow
        self._log(f"launch: Ray starts the processes of {counted(workers, 'rank')}")
        starts = Starts(starts_on_ray(workers), workers) if self._keepers is not None else None
        group = _Group(self._attempts, wanted, workers, slow, starts)
        about_ray = {"facts": {"dashboard": self._dashboard} if self._dashboard else {}, "joined": joined}
        task = self._attempts.task() | about_ray
        group.begin(lambda storage: _trainer(config, task, self._keepers, wanted, workers, without, starts, storage))
        return group

    def _waited_for(self, group: "_Group") -> retry.Failure | None:
        def look_after(training: bool) -> None:
            group.look(training)
            if training and self._places is not None:
                self._places.begun(group.wanted)

        watch, starts = Watch(self._attempts, look_after), group.starts
        if starts is None:
            while not wait([group.fit], timeout=0.5).done:
                watch.look()
            return self._end_of_group(group)

        def look() -> None:
            starts.look()
            watch.look()

        end_together(starts.ranks(), look, kept=True)
        if starts.all_told():
            return retry.first_cause(starts.errors().items(), resizing=group.resizing)
        return self._end_of_group(group)

    def _end_of_group(self, group: "_Group") -> retry.Failure | None:
        """Return why the group has ended. None if it has done its work."""
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.train import ControllerError, WorkerGroupError
        from ray.train.v2.api.exceptions import PreemptionError

        try:
            group.fit.result()
        except WorkerGroupError as error:
            order: Sequence[int] = range(group.workers)
            with suppress(RayError):  # an actor that was started again knows no order
                order = (self._keepers and ray.get(self._keepers.order.remote())) or order
            failures = {order[place]: _original(failure) for place, failure in error.worker_failures.items()}
            errors = {rank: failure for rank, failure in failures.items() if not isinstance(failure, GivenUp)}
            errors |= group.starts.errors() if group.starts is not None else {}
            end = retry.classify(errors, resizing=group.resizing)
            if end.error is not None:
                return end
            # Ray reports a rank's death together with its node's. A broken connection is seen long before either.
            told = any(isinstance(error, retry.RankDied) and error.confirmed for error in errors.values())
            lost = lost_nodes(group.nodes, within=0 if told else _LOSS_SECONDS)
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
    config: Config,
    task: Mapping[str, Any],
    keepers: Any,
    wanted: Need,
    workers: int,
    without: Sequence[str],
    starts: Starts | None,
    storage: str,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from launcher.cluster.ray.group import RankGroup

    on_gpu = wanted.each.get("GPU", 0) >= 1
    return TorchTrainer(
        rank_of_worker,
        train_loop_config={**task, "keepers": keepers, "starts": starts and starts.actor},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker=wanted.each,
            placement_strategy=config.cluster.ray.placement,
            label_selector=other_nodes(without),
        ),
        torch_config=RankGroup("nccl" if on_gpu else "gloo", keepers=keepers),
        # Checkpoints and metrics go to the run's own store. Ray Train only wants a place, and puts nothing there.
        run_config=RunConfig(
            name=config.run.name,
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
    """A group of workers that Ray starts. It watches whether the ranks begin in time, and whether there is room for
    more.

    `starts` lets the ranks be started again in it.
    """

    def __init__(
        self,
        attempts: Attempts,
        wanted: Need,
        workers: int,
        without: Sequence[str] = (),
        starts: Starts | None = None,
    ) -> None:
        self._attempts, self.wanted, self.workers, self._without = attempts, wanted, workers, without
        self.starts = starts
        self.resizing = False
        self._begun = self._asked = False
        self._began = self._counted = time.monotonic()
        self._folders = ExitStack()
        self.fit = Future[Any]()
        self.nodes = dict[str, str]()
        """Ray's ids and names of the cluster's nodes when the group was begun."""

    def begin(self, trainer: Callable[[str], Any]) -> None:
        """Begin it by a trainer of Ray's, which gets a folder."""
        self.nodes = alive_nodes()
        self.fit = in_thread(trainer(self._folders.enter_context(scratch_folder("ray"))).fit, "fit")
        if self.starts is not None:
            self.starts.fit = self.fit

    def start_again(self, task: Mapping[str, Any]) -> None:
        """Have the workers start the ranks of this task, after those before have ended."""
        assert self.starts is not None
        self.starts.begin(task)
        self.resizing = self._asked = False
        self._counted = time.monotonic()

    def close(self, patience: float = _LOSS_SECONDS) -> None:
        """End it, and wait for that."""
        if self.starts is not None:
            self.starts.close()
        wait([self.fit], timeout=patience)
        if self.starts is not None:
            self.starts.end()
        self._folders.close()

    def look(self, training: bool) -> None:
        """Raise `ConfigError` when the ranks do not begin in time."""
        now = time.monotonic()
        if not training:
            self._check_begun(now)
        interval = self._attempts.config.cluster.ray.resize_interval
        if training and self.workers < self.wanted.most and now - self._counted >= interval:
            self._counted = now
            more = min(room(self.wanted.each, self._without), self.wanted.most - self.workers)
            if more > 0 and not self._asked:
                self.resizing = True  # a request that fails may still have reached the ranks
                request_restart(
                    self._attempts.run, f"because {self.workers + more} ranks instead of {self.workers} find room"
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
                f"cluster.ray.start_timeout: {self.workers} ranks were asked for {patience:g} seconds ago and have not"
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
