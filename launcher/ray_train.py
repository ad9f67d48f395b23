"""A run's ranks under Ray Train: worker group, rendezvous and liveness are Ray's, what happens after a failure is ours.

Each attempt is one `TorchTrainer.fit()` without retries of its own; `retry.decide` then says whether there is another.
The train function restores by itself, so an attempt needs to know nothing of the one before.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from launcher import retry
from trainer.config import Config, dump_config, parse_config
from trainer.data.prepare import Datasets
from trainer.errors import ConfigError
from trainer.store import Store

# OpenMP's idle threads spin at barriers by default: on cores that two ranks share, that is many times slower.
_WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


def run_on_ray(config: Config, datasets: Datasets, run: Store, *, resume: bool, log: Callable[[str], None]) -> None:
    """Train on a Ray cluster, or on a Ray started here for this run, until done or beyond the failure budget.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    with _cluster(config) as resources:
        workers, gpus = _workers(config, resources)
        failures: list[retry.Failure] = []
        while True:
            error = _attempt(config, datasets, workers, gpus, resume=resume)
            if error is None:
                return
            failure = retry.classify(error)
            if failure.error is None:
                retry.record_crash(run, failure)
            failures.append(failure)
            decision = retry.decide(failures, config.retry.failures)
            if decision.error is not None:
                raise decision.error
            log(decision.reason)


def _attempt(config: Config, datasets: Datasets, workers: int, gpus: int, *, resume: bool) -> retry.WorkerErrors | None:
    """One life of the worker group; returns what its ranks died of, or None when they finished."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

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
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return {rank: _original(failure) for rank, failure in error.worker_failures.items()}
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
def _cluster(config: Config) -> Iterator[dict[str, float]]:
    """Connect to the configured Ray cluster, or start one on this machine that ends with this process; its resources."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = config.cluster.ray.address
    options: dict[str, Any] = {"address": address}
    if address is None:
        # One CPU a worker is what Ray books; ranks may outnumber the cores of a laptop.
        options = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, config.cluster.workers or 1),
            "include_dashboard": False,
        }
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cluster.ray.address: no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). "
            "Start one with `ray start --head`, or leave the setting out to start Ray here."
        ) from error
    try:
        yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
    finally:
        ray.shutdown()


def _workers(config: Config, resources: dict[str, float]) -> tuple[int, int]:
    """(ranks, GPUs of each); raises `ConfigError` when the cluster is too small for what was asked."""
    available = int(resources.get("GPU", 0))
    gpus = config.cluster.gpus_per_worker if config.cluster.gpus_per_worker is not None else int(available > 0)
    workers = config.cluster.workers or (available if gpus else 1)
    for what, needed, has in (("GPUs", workers * gpus, available), ("CPUs", workers, int(resources.get("CPU", 0)))):
        if needed > has:
            raise ConfigError(
                f"cluster.workers: {workers} workers need {needed} {what}, the cluster has {has}. Lower it."
            )
    return workers, gpus
