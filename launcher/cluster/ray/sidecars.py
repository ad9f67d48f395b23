"""Ray actors run beside a run's ranks on a Ray cluster: one for each server, and one for `capstan rollout`.

The servers' GPUs are reserved in one placement group before the ranks ask for theirs.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from launcher.cluster.ray.cluster import BUSY, shortage
from launcher.start.sidecars import Child, Sidecar, sidecars_alive, sidecars_of
from trainer.config import Config
from trainer.errors import CapstanError, ConfigError, first_line
from trainer.store.store import Store

_LOOK_SECONDS = 0.5
_SAY_SECONDS = 5.0


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
                    f"rollout.serve: the cluster has no room{waited} for {serve.replicas} x {serve.gpus} GPUs for"
                    f" servers and {ranks} for ranks: {short}. Lower rollout.serve.replicas or rollout.serve.gpus (0"
                    " serves on CPUs), or free GPUs of the cluster."
                )
            if not told and time.monotonic() - began >= _SAY_SECONDS:
                told = True
                log(f"waiting for room for servers, {serve.replicas} x {serve.gpus} GPUs: {short}")
        yield group
    finally:
        remove_placement_group(group)


class _Holder:
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
        holder: Any = ray.remote(_Holder).options(max_concurrency=2, **options)
        self._actor = holder.remote(one, run.uri, os.getcwd(), variables)

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
