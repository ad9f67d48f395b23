"""Whole runs on a real Slurm: what happens to their jobs, and that their losses do not tell."""

import json
import os
import signal
import sys

import pytest

from launcher.status import read_status
from tests.slurm.site import Site

pytestmark = pytest.mark.timeout(600)


def test_an_interrupted_job_goes_on_beside_another_on_the_same_nodes(site: Site, undisturbed: dict[int, float]) -> None:
    """One is submitted from inside a job. The other gets the signal that Slurm sends ahead of a time limit."""
    hurt = site.submit(site.config("hurt", "cluster.slurm.exclude=n3"))
    beside = site.config("beside", "cluster.slurm.exclude=n3")
    inside = ["srun", "--mem=1G", "--ntasks=2", "bash", "-c", '[ "$SLURM_PROCID" = 1 ] || exec "$@"', "bash"]
    command = [*inside, sys.executable, "-m", "launcher.cli", "submit", "slurm", beside]
    site.cluster.run(*command, cwd=site.folder)
    other = hurt + 2  # the one between is the srun that submitted it

    site.wait_for_step("hurt", generation=1)
    site.cluster.run("scancel", "--signal=USR1", "--batch", str(hurt))
    site.assert_ends("hurt", hurt, "COMPLETED")
    site.assert_ends("beside", other, "COMPLETED")
    site.assert_nothing_is_left()

    first, last = site.attempts("hurt")
    assert (first.kind, first.exit_code, first.goes_on) == ("preempted", 75, True)
    assert (last.kind, last.restart) == ("finished", 1)
    assert first.nodes == last.nodes == ["n1", "n2"]
    (next_door,) = site.attempts("beside")
    assert next_door.started < (first.ended or 0.0) < (next_door.ended or 0.0)
    assert site.cluster.job(hurt)["restart_cnt"] == 1
    status = read_status(site.run("hurt"))
    assert (status.state, status.generation, status.restarts[0].step) == ("finished", 2, first.step)
    assert site.losses("hurt") == undisturbed
    assert site.losses("beside") == undisturbed


def test_a_job_whose_node_is_gone_goes_on_with_the_nodes_that_are_left(
    site: Site, undisturbed: dict[int, float]
) -> None:
    """The driver notices before Slurm does, as on a real cluster (30 seconds and 300); here it is 10 and 30."""
    sooner = {"period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 5}
    setup = [f"export RAY_health_check_{name}={value}" for name, value in sooner.items()]
    job = site.submit(site.config("unlucky", "retry.failures=0", f"cluster.slurm.setup={json.dumps(setup)}"))
    site.wait_for_step("unlucky", generation=1)
    lost = site.attempts("unlucky")[0].nodes[1]
    site.cluster.power_off(lost)
    try:
        site.assert_ends("unlucky", job, "COMPLETED")
    finally:
        site.cluster.boot(lost)
    site.assert_nothing_is_left()

    first, last = site.attempts("unlucky")
    assert (first.kind, first.reason, first.failed_nodes) == ("node lost", f"no answer from {lost}", [lost])
    assert last.kind == "finished"
    assert lost not in last.nodes
    assert site.losses("unlucky") == undisturbed


def test_a_crash_a_stop_and_a_cancellation_in_one_run(site: Site) -> None:
    config = site.config("halted", "train.steps=400", "retry.failures=1")
    job = site.submit(config)
    site.wait_for_step("halted", generation=1)
    head = site.attempts("halted")[0].nodes[0]
    (driver,) = [pid for pid, command in site.cluster.processes(head).items() if "launcher.driver" in command]
    os.kill(driver, signal.SIGKILL)

    site.wait_for_step("halted", generation=2)
    site.capstan("stop", site.folder / "store/halted")
    site.assert_ends("halted", job, "FAILED", exit_code=75)
    site.assert_nothing_is_left()
    crashed, stopped = site.attempts("halted")
    assert (crashed.kind, crashed.reason) == ("failure", "the driver was killed by signal 9")
    assert (stopped.kind, stopped.reason) == ("stopped", "stopped by capstan stop")
    assert read_status(site.run("halted")).state == "stopped"

    again = site.submit(config, "--resume")
    assert site.wait_for_step("halted", generation=3, step=stopped.step + 1)["step"] == stopped.step
    site.cluster.run("scancel", str(again))
    site.assert_ends("halted", again, "CANCELLED")
    site.assert_nothing_is_left()
    assert site.status("halted")["slurm"]["jobs"][0]["state"] == "CANCELLED"


def test_where_jobs_must_not_be_requeued_the_next_of_a_chain_goes_on(site: Site, undisturbed: dict[int, float]) -> None:
    first = site.submit(site.config("chained", "cluster.slurm.launch=direct", "cluster.slurm.chain=3"))
    site.wait_for_step("chained", generation=1)
    site.cluster.run("scancel", "--signal=USR1", "--batch", str(first))
    site.assert_ends("chained", first, "FAILED", exit_code=75)
    for following in (first + 1, first + 2):
        site.assert_ends("chained", following, "COMPLETED")
    site.assert_nothing_is_left()
    assert [attempt.kind for attempt in site.attempts("chained")] == ["preempted", "finished"]
    assert site.losses("chained") == undisturbed
