"""Whole runs on a real Slurm: what happens to their jobs, and that their losses do not tell."""

import json
import os
import signal
import sys
from contextlib import suppress
from itertools import pairwise

import psutil
import pytest

from launcher.view.status import read_generation, read_status
from tests.cli.conftest import ENVIRONMENT, editable_environment
from tests.slurm.site import Site

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_job_goes_on_after_its_time_limit_and_a_crash(site: Site, undisturbed: dict[int, float]) -> None:
    """It was submitted from inside a job. Beside it on the same nodes runs another, which is cancelled. Then Slurm's
    time limit comes near, and in the next start the driver is killed."""
    beside = site.submit(site.config("beside", "cluster.slurm.exclude=n3", "train.steps=5000"))
    limits = ("cluster.slurm.time='60'", "cluster.slurm.signal_seconds=30", "retry.failures=1")
    hurt_config = site.config("hurt", "cluster.slurm.exclude=n3", *limits)
    inside = ["srun", "--mem=1G", "--ntasks=2", "bash", "-c", '[ "$SLURM_PROCID" = 1 ] || exec "$@"', "bash"]
    command = [*inside, sys.executable, "-m", "launcher.cli", "submit", "slurm", hurt_config]
    site.cluster.run(*command, cwd=site.folder, environment=ENVIRONMENT)
    hurt = beside + 2  # the one between is the srun that submitted it

    site.wait_for_step("hurt", generation=1)
    site.cluster.limit("n2", "1mbit")  # a step takes seconds: the run lasts until Slurm's signal
    site.wait_for_step("beside", generation=1)
    site.cluster.run("scancel", str(beside))
    site.assert_ends("beside", beside, "CANCELLED")
    site.let_time_run_out(hurt, signal_seconds=30)
    site.wait_for("hurt", lambda: site.cluster.job(hurt)["restart_cnt"] == 1, "Slurm's signal, and the requeue")
    site.cluster.limit("n2", None)
    site.cluster.run("scontrol", "update", f"JobId={hurt}", "TimeLimit=60")

    site.wait_for_step("hurt", generation=2, step=12)
    drivers = [
        pid
        for pid, command in site.cluster.processes("n1").items()
        if f"launcher.drive.driver {site.run('hurt').uri} " in command
    ]
    os.kill(drivers[0], signal.SIGKILL)
    site.assert_ends("hurt", hurt, "COMPLETED")
    site.assert_nothing_is_left()

    limited, crashed, last = site.attempts("hurt")
    assert (limited.kind, limited.exit_code, limited.goes_on) == ("preempted", 75, True)
    assert limited.reason == "Slurm's signal: the time limit was near, or the job was preempted"
    assert (crashed.kind, crashed.reason) == ("failure", "the driver was killed by signal 9")
    assert (last.kind, last.restart) == ("finished", 2)
    next_door = site.attempts("beside")[0]
    assert limited.nodes == crashed.nodes == last.nodes == next_door.nodes == ["n1", "n2"]
    assert limited.started < read_generation(site.run("beside"), 1)["step"][-1]["time"]
    status = read_status(site.run("hurt"))
    assert (status.state, status.generation, status.restarts[0].step) == ("finished", 3, limited.step)
    assert site.losses("hurt") == undisturbed
    assert read_status(site.run("beside")).last_commit_step
    assert site.status("beside")["slurm"]["jobs"][0]["state"] == "CANCELLED"


def ranks_of(site: Site, node: str) -> list[psutil.Process]:
    """The processes of the node's ranks, which its keeper has forked. Each has a session of its own."""
    keepers = [pid for pid, command in site.cluster.processes(node).items() if "launcher.start.keeper" in command]
    found = list[psutil.Process]()
    for pid in keepers:
        with suppress(psutil.Error, OSError):  # it ended while we looked
            if (rank := psutil.Process(pid)).ppid() in keepers and os.getsid(pid) == pid:
                found.append(rank)
    return found


def test_ranks_that_are_killed_come_back_in_the_same_job(site: Site, undisturbed: dict[int, float]) -> None:
    """They are forked from keepers, so no update is made twice and nothing is read again. The updates of a node whose
    keeper is killed, too, are at the other node, and so are the records of rank 0."""
    settings = ("cluster.slurm.launch=direct", "cluster.keeper=true", "cluster.slurm.exclude=n3", "retry.failures=9")
    job = site.submit(site.config("kept", *settings, "checkpoint.every_steps=50"))
    run = site.run("kept")
    for generation, node in ((1, "n2"), (2, "n1")):
        site.wait_for("kept", lambda of=generation: len(read_generation(run, of)["step"]) > 3, "steps")
        (rank,) = ranks_of(site, node)
        (rank if generation == 1 else psutil.Process(rank.ppid())).kill()
    site.wait_for("kept", lambda: ranks_of(site, "n1"), "a rank that another keeper on n1 has forked")
    site.assert_ends("kept", job, "COMPLETED")
    site.assert_nothing_is_left()
    assert site.cluster.job(job)["restart_cnt"] == 0
    starts = [read_generation(run, generation) for generation in (1, 2, 3)]
    assert [start["start"][0].get("restored") for start in starts] == [None, "memory", "neighbour"]
    assert starts[1]["start"][0]["read_bytes"] == 0
    for before, after in pairwise(starts):
        # An update that rank 0 has recorded is made again if a rank was killed before it could keep it.
        assert after["step"][0]["step"] - before["step"][-1]["step"] in (0, 1)
    assert site.losses("kept") == undisturbed
    assert [attempt.kind for attempt in site.attempts("kept")] == ["failure", "failure", "finished"]
    first, second = read_status(run).restarts
    assert first.reason.startswith("rank 1 died")
    assert second.reason.startswith("rank 0 died")
    assert first.died is not None


WATCH_SOON = "cluster.slurm.setup=[export WATCH_SECONDS=2]"


def test_a_spare_node_takes_the_place_of_a_lost_one_in_the_same_job(site: Site, undisturbed: dict[int, float]) -> None:
    """Its keeper waited there. The lost rank's updates are at the other node, which reads nothing again. Then the node
    of the batch script is lost, too: the job starts again, from the newest checkpoint."""
    settings = ("cluster.slurm.launch=direct", "cluster.keeper=true", "cluster.spares=1", WATCH_SOON)
    job = site.submit(site.config("spared", *settings, "checkpoint.every_steps=50"))
    run = site.run("spared")
    assert site.cluster.job(job)["node_count"]["number"] == 3
    try:
        site.wait_for("spared", lambda: len(read_generation(run, 1)["step"]) > 3, "steps")
        first = read_generation(run, 1)["start"][0]
        assert first["hosts"] == ["n1", "n2"]
        assert any("launcher.start.keeper" in command for command in site.cluster.processes("n3").values())
        site.cluster.power_off("n2")
        site.wait_for("spared", lambda: len(read_generation(run, 2).get("step", ())) > 3, "steps on the spare node")
        second = read_generation(run, 2)["start"][0]
        assert (second["hosts"], second["restored"]) == (["n1", "n3"], "neighbour")
        assert 0 < second["read_bytes"] < first["read_bytes"]
        before, after = (read_generation(run, generation)["step"] for generation in (1, 2))
        assert after[0]["step"] - before[-1]["step"] in (0, 1)
        assert site.cluster.job(job)["restart_cnt"] == 0
        site.cluster.boot("n2")
        site.cluster.power_off("n1")
        site.wait_for("spared", lambda: site.cluster.job(job)["restart_cnt"] == 1, "the requeue")
        site.cluster.boot("n1")
        site.assert_ends("spared", job, "COMPLETED")
    finally:
        site.boot_all()
    site.assert_nothing_is_left()
    assert site.losses("spared") == undisturbed
    lost, again, last = site.attempts("spared")
    assert (lost.kind, lost.reason) == ("node lost", "no answer from n2; n3 takes the place of n2")
    assert [attempt.kind for attempt in (again, last)] == ["node lost", "finished"]
    assert (lost.nodes, again.nodes) == (["n1", "n2", "n3"], ["n1", "n3"])


def notices_soon() -> str:
    """The setting by which a job's Ray notices a lost node within seconds."""
    sooner = {"period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
    setup = [f"export RAY_health_check_{name}={value}" for name, value in sooner.items()]
    return f"cluster.slurm.setup={json.dumps(setup)}"


def test_a_job_with_ray_that_loses_a_node_and_its_spare_at_once_starts_again(
    site: Site, undisturbed: dict[int, float]
) -> None:
    """Nobody waits for a machine that could take their place, because a job gets no other one."""
    settings = ("cluster.keeper=true", "cluster.spares=1", notices_soon(), "cluster.ray.start_timeout=3000")
    job = site.submit(site.config("both", *settings, "cluster.workers=2"))
    run = site.run("both")
    try:
        site.wait_for("both", lambda: len(read_generation(run, 1).get("step", ())) > 3, "steps")
        (rank,) = ranks_of(site, next(host for host in read_generation(run, 1)["start"][0]["hosts"] if host != "n1"))
        rank.suspend()  # the other one waits for it
        site.wait_for("both", lambda: "waits with a keeper" in site.output("both"), "the spare")
        for node in ("n2", "n3"):
            site.cluster.power_off(node)
        site.wait_for("both", lambda: site.cluster.job(job)["restart_cnt"] == 1, "the requeue")
        site.boot_all()
        site.assert_ends("both", job, "COMPLETED")
    finally:
        site.boot_all()
    site.assert_nothing_is_left()
    assert site.losses("both") == undisturbed
    assert [attempt.kind for attempt in site.attempts("both")] == ["node lost", "finished"]


def test_a_spare_node_takes_the_place_of_a_lost_one_of_a_job_with_ray(
    site: Site, undisturbed: dict[int, float]
) -> None:
    """Another node is lost, for which there is no spare: the job starts again."""
    settings = ("cluster.keeper=true", "cluster.spares=1", notices_soon())
    job = site.submit(site.config("spared-ray", *settings, "cluster.workers=2"))
    run = site.run("spared-ray")
    lost = list[str]()
    try:
        for generation in (1, 2):
            site.wait_for(
                "spared-ray", lambda of=generation: len(read_generation(run, of).get("step", ())) > 3, "steps"
            )
            hosts = read_generation(run, generation)["start"][0]["hosts"]
            if generation == 1:
                spare = next(node for node in site.cluster.nodes if node not in hosts)
                (rank,) = ranks_of(site, hosts[-1])
                rank.suspend()  # the other one waits for it
                site.wait_for("spared-ray", lambda: "waits with a keeper" in site.output("spared-ray"), "the spare")
                rank.resume()
            else:
                assert spare in hosts
                assert site.cluster.job(job)["restart_cnt"] == 0
            lost.append(next(node for node in reversed(hosts) if node != "n1"))
            site.cluster.power_off(lost[-1])
        site.wait_for("spared-ray", lambda: site.cluster.job(job)["restart_cnt"] == 1, "the requeue")
        site.boot_all()
        site.assert_ends("spared-ray", job, "COMPLETED")
    finally:
        site.boot_all()
    site.assert_nothing_is_left()
    assert site.losses("spared-ray") == undisturbed
    assert [attempt.kind for attempt in site.attempts("spared-ray")] == ["node lost", "finished"]


def test_each_node_unpacks_the_environment_that_the_job_carries_once(site: Site, undisturbed: dict[int, float]) -> None:
    python = site.folder / "venv/bin/python"
    variables = editable_environment(site.folder / "venv")
    settings = ("cluster.slurm.launch=direct", "cluster.environment=archive", "cluster.slurm.exclude=n3")
    config = site.config("carried", *settings)
    submit = [python, "-m", "launcher.cli", "submit", "slurm", config, "--json"]
    done = site.cluster.attempt(*submit, cwd=site.folder, environment=variables, timeout=300)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["jobs"][0]
    site.wait_for_step("carried", generation=1)
    for node in ("n1", "n2"):
        ranks = [line for line in site.cluster.processes(node).values() if "launcher.cluster.slurm.step rank" in line]
        assert any(line.startswith("/mnt/capstan-environments-") for line in ranks), ranks
    site.assert_ends("carried", job, "COMPLETED")
    assert site.output("carried").count("capstan: unpacked ") == 2
    for node in ("n1", "n2"):
        site.cluster.run("bash", "-c", "rm -r /mnt/capstan-environments-*", on=node)
    site.assert_nothing_is_left()
    assert site.losses("carried") == undisturbed


def test_a_job_that_slurm_preempts_commits_and_goes_on(site: Site, undisturbed: dict[int, float]) -> None:
    """A job of a partition with a higher priority takes its nodes."""
    settings = ("cluster.workers=4", "cluster.slurm.exclude=n3", "cluster.slurm.launch=direct")
    job = site.submit(site.config("preempted", *settings))
    site.wait_for_step("preempted", generation=1)
    site.cluster.limit("n2", "1mbit")  # a step takes seconds: the run lasts until the other job has come
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclude=n3", "--exclusive"]
    taker = int(site.cluster.run(*urgent, "--output=/dev/null", "--wrap=true", cwd=site.folder))
    site.wait_for("preempted", lambda: site.cluster.job(job)["restart_cnt"] == 1, "the preemption, and the requeue")
    site.cluster.limit("n2", None)
    site.assert_ends("preempted", job, "COMPLETED")
    assert site.cluster.job(taker)["job_state"] == ["COMPLETED"]
    site.assert_nothing_is_left()

    first, last = site.attempts("preempted")
    assert (first.kind, first.exit_code, last.kind) == ("preempted", 75, "finished")
    before, after = (read_generation(site.run("preempted"), generation) for generation in (1, 2))
    assert before["step"][-1]["step"] == first.step == after["start"][0]["step"]
    assert site.losses("preempted") == pytest.approx(undisturbed, abs=1e-3)  # four ranks here, two there


def test_a_job_whose_node_is_gone_goes_on_with_the_nodes_that_are_left(
    site: Site, undisturbed: dict[int, float]
) -> None:
    """The driver notices before Slurm does, as on a real cluster (30 seconds and 300); here it is 6 and 20."""
    sooner = {"period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
    setup = [f"export RAY_health_check_{name}={value}" for name, value in sooner.items()]
    job = site.submit(site.config("unlucky", f"cluster.slurm.setup={json.dumps(setup)}"))
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


def test_where_jobs_must_not_be_requeued_the_next_of_a_chain_goes_on(site: Site, undisturbed: dict[int, float]) -> None:
    """The second of three is stopped, which takes the third with it; submitted again, the run finishes in the first of
    three, and the others find nothing to do."""
    config = site.config("chained", "cluster.slurm.launch=direct", "cluster.slurm.chain=3")
    first = site.submit(config)
    site.wait_for_step("chained", generation=1)
    site.cluster.run("scancel", "--signal=USR1", "--batch", str(first))
    site.assert_ends("chained", first, "FAILED", exit_code=75)

    site.wait_for_step("chained", generation=2, step=12)
    stopped = site.capstan("stop", site.folder / "store/chained")
    assert f"is to commit and end and job {first + 2}, which waits, is to be cancelled" in stopped.stderr
    site.assert_ends("chained", first + 1, "FAILED", exit_code=75)
    site.assert_ends("chained", first + 2, "CANCELLED")
    assert read_status(site.run("chained")).state == "stopped"

    again = site.submit(config, "--resume")
    for job in (again, again + 1, again + 2):
        site.assert_ends("chained", job, "COMPLETED")
    site.assert_nothing_is_left()
    assert [attempt.kind for attempt in site.attempts("chained")] == ["preempted", "stopped", "finished"]
    assert site.losses("chained") == undisturbed
