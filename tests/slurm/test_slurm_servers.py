"""Servers that start with a run on a real Slurm: as actors of its Ray, or as a step of srun, and nothing is left of
them.
"""

import os
import signal

import pytest

from launcher.view.status import read_status
from tests.dist import stub_server
from tests.served_runs import SERVE
from tests.slurm.site import Site
from trainer.run import layout
from trainer.run.segments import read_stream

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

OF_JOB = (*SERVE, "cluster.slurm.gpus_per_node=4")


def servers(site: Site) -> dict[int, str]:
    """The node of each server that runs, by its process."""
    return {
        number: node
        for node in site.cluster.nodes
        for number, command in site.cluster.processes(node).items()
        if f" {stub_server.__file__} " in command and "launcher" not in command
    }


@pytest.mark.parametrize("launch", ["direct", "ray"])
def test_a_job_has_servers_beside_its_ranks(site: Site, launch: str) -> None:
    nodes = {"direct": 3, "ray": 2}[launch]
    settings = (
        f"cluster.slurm.launch={launch}",
        f"cluster.slurm.nodes={nodes}",
        "train.steps=40",
        "rollout.serve.gpus=2",
    )
    replicas = "rollout.serve.replicas=2"
    name = f"served-{launch}"
    config = site.config(name, *OF_JOB, *settings, replicas)
    shown = site.capstan("submit", "slurm", config, "--dry-run").stdout
    assert "# beside the ranks: 2 servers (" in shown
    assert ("SERVERS=2\nSERVER_NODES=1\n" in shown) == (launch == "direct")
    job = site.submit(config)
    site.wait_for_step(name, generation=1, step=2)
    (first, node), (_, other) = servers(site).items()
    assert launch == "ray" or (node, other) == ("n3", "n3")
    os.kill(first, signal.SIGKILL)
    site.wait_for(name, lambda: len(now := servers(site)) == 2 and first not in now, "the server is started again")
    site.assert_ends(name, job, "COMPLETED")
    site.assert_nothing_is_left()
    run = site.run(name)
    said = [read_stream(run, layout.LOGS, layout.sidecar_log(1, f"server-{number}")).decode() for number in (1, 2)]
    assert sum(text.count("serves ") for text in said) == 3
    gpus = sorted(text.partition("on GPUs ")[2].partition(" ")[0] for text in said)
    assert launch == "ray" or gpus == ["0,1", "2,3"]
    assert read_status(run).state == "finished"


def test_a_job_that_is_cancelled_leaves_no_server(site: Site) -> None:
    settings = ("cluster.slurm.launch=direct", "rollout.serve.gpus=1", "train.steps=5000", "cluster.workers=1")
    job = site.submit(site.config("cancelled", *OF_JOB, *settings))
    site.wait_for_step("cancelled", generation=1, step=3)
    site.cluster.run("scancel", str(job))
    site.assert_ends("cancelled", job, "CANCELLED")
    site.assert_nothing_is_left()


def test_a_server_that_does_not_start_ends_the_job_with_its_words(site: Site) -> None:
    settings = ("cluster.slurm.launch=direct", "rollout.serve.options=[--broken]", "cluster.workers=1")
    job = site.submit(site.config("broken", *OF_JOB, *settings))
    site.assert_ends("broken", job, "FAILED", exit_code=3)
    site.assert_nothing_is_left()
    (attempt,) = site.attempts("broken")
    assert attempt.kind == "mistake"
    assert "rollout.serve: server-1 ended with exit code 1" in attempt.reason
    assert "the engine did not start" in site.output("broken")
