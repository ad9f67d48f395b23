"""Servers that start with a run, as actors of a Ray cluster: what is killed is started again, and nothing is left of
them.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.view.status import read_generation, read_status
from tests.cli.conftest import ENVIRONMENT
from tests.forked import run_command
from tests.material import Workshop
from tests.ray.cluster import PATIENCE, Driver, ray_cluster, write
from tests.ray.test_ray_train import refusal
from tests.served_runs import ENDS_SECONDS, SERVE, base_of, servers, sidecars, until
from trainer.run import layout
from trainer.run.requests import request_stop
from trainer.run.segments import read_stream
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster whose only machine has two GPUs that nobody computes on."""
    with ray_cluster(0) as cluster:
        cluster.add_node(num_cpus=3, num_gpus=2)
        yield str(cluster.address)


def test_servers_are_actors_with_gpus_of_their_own(workshop: Workshop, tmp_path: Path, address: str) -> None:
    store = workshop.folder / "store"
    run = open_store(str(store)).sub("served")
    settings = (f"cluster.ray.address={address}", *SERVE, base_of(run), "rollout.serve.replicas=2", "train.steps=400")
    with Driver(tmp_path, "train", write(tmp_path, workshop, "served", *settings), real=True) as driver:
        driver.wait_for(run, 1, step=3)
        first, second = until(lambda: len(found := servers(run)) == 2 and found)
        os.kill(first, signal.SIGKILL)
        until(lambda: len(found := servers(run)) == 2 and first not in found and len([*run.list(layout.SERVERS)]) == 2)
        assert second in servers(run)
        step = read_status(run).step or 0
        driver.wait_for(run, 1, step=step + 3)
        said = [read_stream(run, layout.LOGS, layout.sidecar_log(1, f"server-{number}")).decode() for number in (1, 2)]
        assert sorted(text.partition("on GPUs ")[2][0] for text in said) == ["0", "1"]
        driver.process.kill()
        driver.process.wait()
        until(lambda: not sidecars(run), ENDS_SECONDS)
    log = driver.log.read_text()
    assert log.count("answers at http://") == 3
    assert "ended with exit code -9: serves" in log

    # It goes on with another number of ranks, and ends with its servers when it is stopped.
    more = ("cluster.workers=1", "--take-over")
    with Driver(tmp_path, "resume", "served", "--store", str(store), *more, real=True) as driver:
        driver.wait_for(run, 2, step=(read_generation(run, 1)["commit"][-1]["step"]) + 2)
        request_stop(run, by="capstan stop")
        assert driver.end() == 75, driver.log.read_text()
        assert not sidecars(run)
    assert [*run.list(layout.SERVERS)] == []


def test_a_server_that_never_answers_and_a_stop_while_it_is_waited_for(
    workshop: Workshop, tmp_path: Path, address: str
) -> None:
    store = open_store(str(workshop.folder / "store"))
    settings = (f"cluster.ray.address={address}", *SERVE, "rollout.serve.options=[--silent]", "cluster.workers=1")
    run = store.sub("waits")
    with Driver(tmp_path, "train", write(tmp_path, workshop, "waits", *settings, base_of(run)), real=True) as driver:
        driver.wait_until(run, 1, lambda seen: seen.get("start"), "its ranks")
        until(lambda: servers(run))
        request_stop(run, by="capstan stop")
        assert driver.end() in (7, 75), driver.log.read_text()
    assert not sidecars(run)

    run, soon = store.sub("silent"), "rollout.serve.start_seconds=5"
    config = write(tmp_path, workshop, "silent", *settings, base_of(run), soon)
    with Driver(tmp_path, "train", config, real=True) as driver:
        assert driver.end() == 3, driver.log.read_text()
    assert "rollout.serve.start_seconds: server-1 has not answered" in driver.last_line("capstan: ")
    assert not sidecars(run)


def test_a_cluster_that_cannot_hold_both_is_a_sentence(workshop: Workshop, tmp_path: Path, address: str) -> None:
    settings = (f"cluster.ray.address={address}", *SERVE, "cluster.ray.start_timeout=2")
    three = write(tmp_path, workshop, "crowded", *settings, "rollout.serve.replicas=3")
    said = refusal(run_command(["train", three], tmp_path, ENVIRONMENT, PATIENCE))
    assert "rollout.serve: the cluster has no room after 2 seconds" in said
    assert "asked for 3 GPUs, the cluster has 2" in said
    both = write(tmp_path, workshop, "crowded", *settings, "rollout.serve.replicas=2", "cluster.gpus_per_worker=1")
    said = refusal(run_command(["train", both], tmp_path, ENVIRONMENT, PATIENCE))
    assert "cluster.workers: the cluster has no room" in said
    assert "asked for 2 GPUs, the cluster has 0, beside the 2 GPUs of its servers" in said
