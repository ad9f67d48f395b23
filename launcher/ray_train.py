"""A run's ranks under Ray Train: worker group, rendezvous and liveness are Ray's, what happens after a failure is ours.

Each attempt is one `TorchTrainer.fit()` without retries of its own; `retry.decide` then says whether there is another.
The train function restores by itself, so an attempt needs to know nothing of the one before.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from launcher import retry
from trainer.config import Config, dump_config, parse_config
from trainer.data.prepare import Datasets
from trainer.errors import CapstanError, ConfigError
from trainer.store import Store


def run_on_ray(
    config: Config, datasets: Datasets, run: Store, *, resume: bool, address: str | None, log: Callable[[str], None]
) -> None:
    """Train on a Ray cluster, or on a Ray started here for this run, until done or beyond the failure budget.

    `address` is the cluster's; by default cluster.ray.address or RAY_ADDRESS.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # ranks stay where the user's command was given
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.ray.start_timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a rank's end is noticed; default 2
    address = address or config.cluster.ray.address or os.environ.get("RAY_ADDRESS")
    with _joined_ray(address) if address else local_ray(config.cluster.most_workers or 1):
        workers, gpus = _workers(config, patience=config.cluster.ray.start_timeout if address else 0)
        failures: list[retry.Failure] = []
        while True:
            error = _attempt(config, datasets, workers, gpus, resume=resume)
            if error is None:
                return
            failure = retry.classify(error)
            retry.record_end(run, failure)
            failures.append(failure)
            decision = retry.decide(failures, config.retry.failures)
            if decision.error is not None:
                raise decision.error
            log(decision.reason)


def _attempt(config: Config, datasets: Datasets, workers: int, gpus: int, *, resume: bool) -> retry.WorkerErrors | None:
    """One life of the worker group; returns what its ranks died of, or None when they finished."""
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    with tempfile.TemporaryDirectory(prefix="capstan-ray-") as storage:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"config": dump_config(config), "datasets": asdict(datasets), "resume": resume},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            # Checkpoints and metrics go to the run's own store; Ray Train only wants a place to put nothing.
            run_config=RunConfig(
                name=config.run.name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return {rank: _original(failure) for rank, failure in error.worker_failures.items()}
        except ControllerError as error:
            if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise CapstanError(f"Ray Train gave up: {error.controller_failure}") from error
            timeout = config.cluster.ray.start_timeout
            raise ConfigError(
                f"cluster.ray.start_timeout: {workers} workers did not start within {timeout:.0f} seconds "
                f"({type(error.controller_failure).__name__}). Free resources, lower cluster.workers, or raise it."
            ) from error
    return None


def _original(error: BaseException) -> BaseException:
    """Ray wraps what the train function raised, to carry its traceback; a dead process has an error of its own."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    if isinstance(error, RayActorError):
        return retry.RankDied(str(error))
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def _rank(arguments: dict[str, Any]) -> None:
    """The train function: one rank, in a Ray worker. The only place where the launcher meets torch."""
    from trainer.rank import run_rank

    run_rank(parse_config(arguments["config"]), Datasets(**arguments["datasets"]), resume=arguments["resume"])


@contextmanager
def local_ray(workers: int) -> Iterator[str]:
    """A Ray of this process's own on this machine, with room for `workers` ranks; its address. Ends with the process."""
    # OpenMP's idle threads spin at barriers by default: on cores that two ranks share, that is many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import ray

    # One CPU a worker is what Ray books; ranks may outnumber the cores of a laptop.
    cpus = max(os.cpu_count() or 1, workers)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextmanager
def _joined_ray(address: str) -> Iterator[str]:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cluster.ray.address: no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). "
            "Start one with `ray start --head`, or leave the setting out to start Ray here."
        ) from error
    try:
        yield address
    finally:
        ray.shutdown()


def _workers(config: Config, *, patience: float) -> tuple[int, int]:
    """(ranks, GPUs of each), once the cluster has room for them: its machines may still be joining.

    Raises `ConfigError` when after `patience` seconds it is still too small for what was asked.
    """
    import ray

    deadline = time.monotonic() + patience
    while True:
        resources = ray.cluster_resources()
        available = int(resources.get("GPU", 0))
        gpus = config.cluster.gpus_per_worker if config.cluster.gpus_per_worker is not None else int(available > 0)
        workers = config.cluster.most_workers or (available if gpus else 1)
        wanted = (("GPUs", workers * gpus, available), ("CPUs", workers, int(resources.get("CPU", 0))))
        short = next(((what, needed, has) for what, needed, has in wanted if needed > has), None)
        if short is None:
            return workers, gpus
        if time.monotonic() > deadline:
            raise ConfigError(
                f"cluster.workers: {workers} workers need {short[1]} {short[0]}, the cluster has {short[2]}. Lower it."
            )
        time.sleep(0.5)
