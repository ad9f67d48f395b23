"""The Ray cluster of a run: joining or starting it, and how many ranks it has room for now."""

import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.config.cluster import STARTS_HERE
from trainer.errors import CapstanError, ConfigError, first_line
from trainer.processes import children
from trainer.processes.children import guarded

_UNITS = {"memory": ("GiB of memory", 2**30), "GPU": ("GPUs", 1), "CPU": ("CPUs", 1)}
BUSY = "the cluster's machines are busy, or no single one is large enough for a rank"
_LOOK_SECONDS = 1.0
_KNOCK_SECONDS = 10.0
_SETTLE_SECONDS = 5.0
"""An elastic run starts with fewer ranks than it may have once no more room has come for so long."""


def check_ray(what: str) -> None:
    """Raise `ConfigError` if Ray is not installed. `what` needs it.

    Ray is an extra, because a run on one machine needs none.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"{what} needs Ray. Install it: pip install 'capstan-llm[ray]'.")


AGENT_MILLISECONDS = "300000"
"""So long a node waits for its agents. Ray's own limit passes on a busy machine, and the node then ends."""


@contextmanager
def local_ray(workers: int) -> Iterator[str]:
    """Start this process's own Ray on this machine, with room for `workers` ranks. Yields its address.

    It ends with the process. Raises `CapstanError` if it does not start, and `ConfigError` if Ray is not installed.
    """
    check_ray("A Ray on this machine")
    # OpenMP's idle threads spin at barriers by default. On cores that two ranks share, that is many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("RAY_agent_register_timeout_ms", AGENT_MILLISECONDS)
    import ray

    # Ray books one CPU for each worker. Ranks may outnumber the cores of a laptop.
    cpus = max(os.cpu_count() or 1, workers)
    alone = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    with guarded() as started:  # a worker of Ray's does not always notice that its driver was killed
        try:
            with _on_loopback():
                quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
                ray.init(**alone, **quiet, _node_ip_address="127.0.0.1", job_config=_job_apart())
        except Exception as error:  # a plain one, for example if a busy machine makes Ray give up waiting for itself
            raise CapstanError(f"Ray did not start on this machine: {first_line(error)}. Try again.") from error
        _quiet()
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
            _end_agents(started())


def _end_agents(started: Iterable[int]) -> None:
    """End Ray's own processes among those that were `started`: a node's agents notice seconds later that it is gone."""
    for number in started:
        with suppress(OSError):  # it has ended by now
            if Path(f"/proc/{number}/cmdline").read_bytes().startswith(b"ray::"):
                os.kill(number, signal.SIGKILL)


class _NoFolders(list[str]):
    """A list that takes no folders. Ray adds the driver's current folder, from which its workers would import first."""

    def extend(self, folders: Iterable[str]) -> None:
        pass


def _job_apart() -> Any:
    """Return Ray's settings of a job whose workers, like all our processes, import nothing from the current folder."""
    from ray.job_config import JobConfig

    job: Any = JobConfig()
    if not children.is_checkout():
        job._py_driver_sys_path = _NoFolders()
    return job


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray take 127.0.0.1 for its own address, so that it listens there alone.

    Otherwise it would take the network's address, and listen at every address.
    """
    from ray._private import services  # no public setting keeps Ray to loopback

    with_network, services.resolve_ip_for_localhost = services.resolve_ip_for_localhost, lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = with_network


def address_of(config: Config, given: str | None = None) -> str | None:
    """Return the cluster to join: the one `given`, else that of cluster.ray.address or RAY_ADDRESS.

    None means that the run stays on this machine.
    """
    address = given or config.cluster.ray.address or os.environ.get("RAY_ADDRESS")
    return None if address == STARTS_HERE else address


@contextmanager
def joined_ray(address: str) -> Iterator[str]:
    """Join a running cluster. Yields its dashboard's address, which may be empty.

    Raises:
        ConfigError: Ray is not installed; the cluster cannot be reached, refuses the token, or runs another Ray or
            Python.
    """
    check_ray(f"cluster.ray.address: {address}")
    import ray
    from ray.exceptions import AuthenticationError

    if is_dashboard(address):
        raise ConfigError(
            f"cluster.ray.address: {address!r} is the address of a dashboard, which takes jobs (`capstan submit ray`)."
            " To train from here give the cluster's own, such as head:6379."
        )
    _knock(address)
    try:
        # A Ray that listens only at loopback is not at this machine's network address.
        with _on_loopback() if address.startswith("127.0.0.1:") else nullcontext():
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        _quiet()
    except AuthenticationError as error:
        raise refused_token(address) from error
    except Exception as error:  # Ray raises many kinds here, its own, gRPC's and the standard ones
        raise _not_joined(address, error) from error
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def is_dashboard(address: str) -> bool:
    """Return whether this address takes jobs, and no driver."""
    return address.startswith(("http://", "https://"))


def _knock(address: str) -> None:
    """Ask a HOST:PORT whether it is a Ray that lets us in: Ray itself would try for long, and not say why it gave up.

    Raises:
        ConfigError: nothing listens there, or it refuses the token.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # no public name gives a channel that carries the token
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
        channel: Any = init_grpc_channel(address)
        with channel:
            request = gcs_service_pb2.CheckAliveRequest()  # pyright: ignore[reportAttributeAccessIssue]
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(request, timeout=_KNOCK_SECONDS)
    except grpc.RpcError as error:
        if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise refused_token(address) from error
        raise _not_joined(address, error) from error
    except OSError as error:
        raise _not_joined(address, error) from error


def _quiet() -> None:
    """Turn off a dead node's last log lines, which Ray prints to every driver: the run's own messages say as much."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")


def refused_token(address: str) -> ConfigError:
    return ConfigError(
        f"the Ray cluster at {address!r} refused the token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or"
        " RAY_AUTH_TOKEN_PATH) to the cluster's own."
    )


def _not_joined(address: str, error: Exception) -> ConfigError:
    if len(versions := re.findall(r"(?:Ray|Python): (\S+)", str(error))) == 4:
        return ConfigError(
            f"cluster.ray.address: the cluster at {address!r} has Ray {versions[0]} and Python {versions[1]}, this"
            f" machine Ray {versions[2]} and Python {versions[3]}. Use the same on both, or `capstan submit ray`, whose"
            " driver runs there."
        )
    return ConfigError(
        f"cluster.ray.address: no Ray cluster answers at {address!r} ({first_line(error)}). "
        "Start one with `ray start --head`, or leave the setting out to start Ray here."
    )


def alive_nodes() -> dict[str, str]:
    """Return the cluster's nodes: Ray's id of each and a name for people, HOST/ID."""
    import ray

    return {
        node["NodeID"]: f"{node['NodeManagerHostname']}/{node['NodeID'][:8]}" for node in ray.nodes() if node["Alive"]
    }


def lost_nodes(before: Mapping[str, str], within: float) -> list[str]:
    """Return which nodes of `before` are gone, as soon as any is, or after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        now = alive_nodes()
        lost = [name for node, name in before.items() if node not in now]
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(0.2)


@dataclass(frozen=True)
class Need:
    """A run's demand on the cluster: ranks from `fewest` to `most`, and the resources of each by Ray's names."""

    fewest: int
    most: int
    each: dict[str, float]


def need(config: Config) -> Need:
    """Return the demand of the configuration. If it leaves the number open, the cluster's GPUs decide."""
    import ray

    rules = config.cluster.ray
    available = int(ray.cluster_resources().get("GPU", 0)) - config.rollout.serving_gpus
    gpus = config.cluster.gpus_per_worker if config.cluster.gpus_per_worker is not None else int(available > 0)
    each: dict[str, float] = {"CPU": rules.cpus_per_worker, **({"GPU": float(gpus)} if gpus else {}), **rules.resources}
    if rules.memory_per_worker:
        each["memory"] = rules.memory_per_worker * 2**30
    whole = max(1, available) if gpus else 1
    fewest, most = config.cluster.fewest_workers or whole, config.cluster.most_workers or whole
    return Need(fewest, most, each)


def fitting_ranks(free: Mapping[str, Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Return how many ranks fit into the free resources of each node."""
    return sum(
        int(min(node.get(name, 0.0) // amount for name, amount in each.items() if amount > 0)) for node in free.values()
    )


def room(each: Mapping[str, float], without: Sequence[str] = ()) -> int:
    """Return how many more ranks the cluster has room for now, on other nodes than those `without`, by Ray's ids."""
    from ray._private.state import available_resources_per_node  # no public name gives the free resources of each node

    free = available_resources_per_node()
    return fitting_ranks({node: free[node] for node in free.keys() - set(without)}, each)


def other_nodes(without: Sequence[str]) -> dict[str, str] | None:
    """Return Ray's selector of all nodes but these, by their ids; None for all nodes."""
    return {"ray.io/node-id": f"!in({', '.join(without)})"} if without else None


def _total(without: Sequence[str]) -> dict[str, float]:
    """Return all resources of the cluster's nodes but these."""
    import ray

    total = dict[str, float](ray.cluster_resources())
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] in without:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) - amount
    return total


def shortage(asked: int, each: Mapping[str, float], total: Mapping[str, float]) -> str:
    """Return the resources that a cluster with `total` lacks for `asked` ranks, even if it were free.

    For example "asked for 16 GPUs, the cluster has 8". The text is empty if it lacks nothing.
    """
    missing = []
    for name, amount in each.items():
        needed, has = amount * asked, total.get(name, 0.0)
        if needed > has:
            unit, scale = _UNITS.get(name, (name, 1))
            missing.append(f"asked for {needed / scale:g} {unit}, the cluster has {has / scale:g}")
    return " and ".join(missing)


def wait_for_room(
    config: Config,
    *,
    can_grow: bool,
    log: Callable[[str], None],
    stop: Callable[[], None],
    without: Sequence[str] = (),
) -> tuple[Need, int]:
    """Return the demand on the cluster, which may depend on the nodes that have joined, and how many ranks to start, on
    other nodes than those `without`.

    Returns once there is room for enough. `stop` may raise to end the wait. Meanwhile a placement group asks for all
    ranks, which makes an autoscaling cluster add nodes.

    Raises:
        ConfigError: there is no room for the fewest within cluster.ray.start_timeout, or, without `can_grow`, there
            never will be.
    """
    from ray.util import placement_group, remove_placement_group

    began = changed = time.monotonic()
    timeout, serving = config.cluster.ray.start_timeout, config.rollout.serving_gpus  # the servers have theirs already
    seen, told = -1, False
    demand = None
    try:
        while True:
            stop()
            wanted = need(config)
            now, found = time.monotonic(), min(room(wanted.each, without), wanted.most)
            if demand is not None and demand.wait(0):
                found = wanted.most  # the demand itself takes the room
            if found != seen:
                seen, changed = found, now
            if found >= wanted.most or (found >= wanted.fewest and now - changed >= _SETTLE_SECONDS):
                return wanted, found
            total = _total(without)
            total["GPU"] = total.get("GPU", 0.0) - serving
            lacks = shortage(wanted.fewest, wanted.each, total)
            short = lacks or BUSY
            short += f", beside the {serving} GPUs of its servers" if serving else ""
            if found < wanted.fewest and (now - began >= timeout or (lacks and not can_grow)):
                waited = f" after {timeout:.0f} seconds (cluster.ray.start_timeout)" if can_grow else ""
                raise ConfigError(
                    f"cluster.workers: the cluster has no room{waited} for {wanted.fewest} ranks: {short}. Lower"
                    " cluster.workers, or end other work on the cluster."
                )
            if demand is None and can_grow and lacks:
                others = other_nodes(without)
                selectors = [others] * wanted.most if others else None
                demand = placement_group([wanted.each] * wanted.most, bundle_label_selector=selectors)  # pyright: ignore[reportArgumentType]
            if found < wanted.fewest and not told:
                told = True
                demanded = f". An autoscaler is asked for {wanted.most} times {wanted.each}" if demand else ""
                log(f"waiting for room for {wanted.fewest} ranks: {short}{demanded}")
            time.sleep(_LOOK_SECONDS)
    finally:
        if demand is not None:
            remove_placement_group(demand)
