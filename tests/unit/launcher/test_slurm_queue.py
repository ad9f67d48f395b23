"""Slurm's word as it comes from its commands, and what a job inherits from the process that submits it."""

import io
import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cluster.slurm import queue
from launcher.cluster.slurm.queue import (
    SlurmJob,
    SubmittedJobs,
    is_over,
    job_output,
    jobs_of,
    parse_sacct,
    parse_squeue,
    slurm_status,
    stop_jobs,
)
from launcher.cluster.slurm.submit import clean_environment
from launcher.policy.jobs import Attempt
from launcher.view.status import read_status
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import name_of
from trainer.run.records import record_end
from trainer.run.requests import stop_requester
from trainer.store.store import Store, open_store


def number(value: int | None) -> dict[str, Any]:
    return {"set": value is not None, "infinite": False, "number": value or 0}


def job(number_: int = 12, state: str | list[str] = "RUNNING", **more: Any) -> dict[str, Any]:
    return {
        "job_id": number_,
        "job_state": [state] if isinstance(state, str) else state,
        "state_reason": "None",
        "start_time": number(1_800_000_000),
        "nodes": "n[1-2]",
        "restart_cnt": 0,
        **more,
    }


def squeue(*jobs: dict[str, Any]) -> str:
    return json.dumps({"jobs": jobs})


def test_a_running_and_a_pending_job() -> None:
    waits = job(13, "PENDING", state_reason="Resources", start_time=number(None), nodes="")
    running, pending = parse_squeue(squeue(job(restart_cnt=2), waits))
    assert running == SlurmJob(12, "RUNNING", "", 1_800_000_000, "n[1-2]", 2)
    assert running.sentence().startswith("RUNNING on n[1-2] since 20")
    assert running.sentence().endswith("restarted 2 times")
    assert SlurmJob(12, "COMPLETED", "", 1_800_000_000, "n1").sentence() == "COMPLETED on n1", "it does not go on"
    assert pending.sentence() == ("PENDING: waits until enough nodes are free (Resources), no start is foreseen yet")
    assert (
        SlurmJob(1, "PENDING", "NewReason", start=1_800_000_000)
        .sentence()
        .startswith("PENDING: NewReason, expected to start 2027-01-1")
    )


def test_older_versions_write_states_and_numbers_plainly() -> None:
    old = {**job(), "job_state": "COMPLETED", "start_time": 7, "restart_cnt": number(1)}
    assert parse_squeue(squeue(old)) == [SlurmJob(12, "COMPLETED", "", 7, "n[1-2]", 1)]
    unset = job(start_time={"set": False, "infinite": True, "number": 9})
    assert parse_squeue(squeue(unset))[0].start is None, "its number means nothing"


def test_a_flag_says_more_than_the_base_state() -> None:
    assert parse_squeue(squeue(job(state=["RUNNING", "COMPLETING"])))[0].state == "COMPLETING"


def test_accounting_knows_jobs_of_the_past() -> None:
    text = "12|CANCELLED by 1000|None|2026-11-24T18:00:00|n[1-2]\n13|TIMEOUT|None|Unknown|\n"
    began = time.mktime((2026, 11, 24, 18, 0, 0, 0, 0, -1))
    assert parse_sacct(text) == [SlurmJob(12, "CANCELLED", "", began, "n[1-2]"), SlurmJob(13, "TIMEOUT")]


# --- a run's jobs, with Slurm's answers given


class FakeSlurm:
    """Answers each command with what it was told to, and notes the calls."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        answer = self.answers.get(command[0])
        return subprocess.CompletedProcess(command, 0 if answer is not None else 1, answer or "", "no such thing")


@pytest.fixture
def run(tmp_path: Path) -> Store:
    run = open_store(str(tmp_path)).sub("big")
    run.put(layout.CONFIG, b"run: {name: big}\n")
    return run


def slurm(monkeypatch: pytest.MonkeyPatch, **answers: str) -> FakeSlurm:
    fake = FakeSlurm(**answers)
    monkeypatch.setattr(queue, "call", fake)
    return fake


RECORD = SubmittedJobs([12, 13], "s", "/nowhere/slurm-%j.out")


def test_what_the_controller_has_forgotten_accounting_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = slurm(monkeypatch, squeue=squeue(job(13)), sacct="12|COMPLETED|None|Unknown|n1\n")
    assert [(found.job, found.state) for found in jobs_of(RECORD)] == [(12, "COMPLETED"), (13, "RUNNING")]
    assert "--jobs=12" in fake.calls[-1]
    slurm(monkeypatch)
    assert jobs_of(RECORD) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_status_has_the_jobs_and_how_each_attempt_ended(
    known: bool, monkeypatch: pytest.MonkeyPatch, run: Store
) -> None:
    ended = Attempt(1, "s", 12, 3, ["n1"], 1.0, 2.0, 1, "node lost", "n1 is gone", step=1500)
    quiet = Attempt(2, "s", 13, 0, ["n1"], 3.0, 4.0, 0, "preempted")
    monkeypatch.setattr(queue, "attempts", lambda folder: [ended, quiet, Attempt(3, "s", 14, 0, ["n1"], 5.0)])
    jobs = [SlurmJob(14, "RUNNING", nodes="n1", restarts=2)] if known else []
    monkeypatch.setattr(queue, "jobs_of", lambda found: jobs)
    found = slurm_status(run, RECORD)
    console = Console(file=io.StringIO(), width=150, record=True)
    console.print(found.table())
    shown = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert shown[-3:] == [
        "job 14 RUNNING on n1, restarted 2 times"
        if known
        else "job Slurm cannot be asked from here, or does not know the job any more",
        "job 12.3 node lost: n1 is gone; step 1,500 was committed",
        "job 13.0 preempted; step 0 was committed",
    ]
    told = found.to_json()
    assert (told["state"], [job["job"] for job in told["slurm"]["jobs"]]) == ("starting", [14] * known)
    assert [one["step"] for one in told["slurm"]["attempts"]] == [1500, 0, 0]


def test_stop_cancels_what_waits_and_asks_what_runs(monkeypatch: pytest.MonkeyPatch, run: Store) -> None:
    fake = slurm(monkeypatch, squeue=squeue(job(12), job(13, "PENDING")), scancel="")
    sentence = stop_jobs(run, RECORD, dry_run=True)
    assert sentence.endswith("the run is to commit and end and job 13, which waits, is to be cancelled")
    assert stop_requester(run) is None
    stop_jobs(run, RECORD, dry_run=False)
    assert fake.calls[-1] == ("scancel", f"--name=capstan:{name_of(run)}", "13")
    assert stop_requester(run) == "capstan stop"


def test_stop_works_through_the_folder_where_slurm_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, run: Store) -> None:
    slurm(monkeypatch)
    stop_jobs(run, RECORD, dry_run=False)
    assert stop_requester(run) == "capstan stop"


def test_a_job_cancelled_while_it_waits_is_a_stopped_run(monkeypatch: pytest.MonkeyPatch, run: Store) -> None:
    slurm(monkeypatch, squeue=squeue(job(12, "PENDING")), scancel="")
    stop_jobs(run, RECORD, dry_run=False)
    status = read_status(run)
    assert (status.state, status.reason) == ("stopped", "cancelled by capstan stop while its job waited")
    assert stop_requester(run) is None


@pytest.mark.parametrize(
    ("state", "over"),
    [
        *((state, False) for state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "RUNNING", "COMPLETING")),
        *((state, False) for state in ("SUSPENDED", "STOPPED")),
        ("CANCELLED", True),
    ],
)
def test_watching_ends_when_no_job_goes_on(monkeypatch: pytest.MonkeyPatch, run: Store, state: str, over: bool) -> None:
    clock = [5.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: clock[0])
    fake = slurm(monkeypatch, squeue=squeue(job(12, state), job(13, "COMPLETED")))
    ended = is_over(run, RECORD)
    assert ended() is over
    fake.answers = {"squeue": squeue(job(12, "FAILED"), job(13, "FAILED"))}
    assert ended() is over
    assert len(fake.calls) == 1, "the controller is asked every ten seconds at most"
    clock[0] += 11
    assert ended()


def test_watching_goes_by_the_folder_where_slurm_knows_no_job(monkeypatch: pytest.MonkeyPatch, run: Store) -> None:
    slurm(monkeypatch)
    assert not is_over(run, RECORD)()
    record_end(run, "done with", stopped=True)
    assert is_over(run, RECORD)()


@pytest.mark.parametrize(("state", "free"), [("PENDING", False), ("RUNNING", False), ("COMPLETED", True)])
def test_a_run_whose_job_waits_or_runs_is_not_submitted_again(
    monkeypatch: pytest.MonkeyPatch, run: Store, state: str, free: bool
) -> None:
    run.put(layout.SLURM_JOB, json.dumps(asdict(RECORD)).encode())
    slurm(monkeypatch, squeue=squeue(job(12, "COMPLETED"), job(13, state)))
    if free:
        queue.check_no_job(run)
        return
    with pytest.raises(ConfigError, match=f"job 13 of .* is {state}. `capstan stop big --store .*` ends it first"):
        queue.check_no_job(run)


def test_a_slurm_that_does_not_answer_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: Any, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(queue.children, "run", hangs)
    with pytest.raises(ConfigError, match="squeue: no answer from Slurm within 60 seconds"):
        queue.call("squeue")


def test_the_output_is_that_of_the_newest_job_that_has_begun(run: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was not submitted to Slurm"):
        job_output(run)
    folder = tmp_path / "of%j"
    folder.mkdir()
    record = {"jobs": [12, 13], "submission": "s", "submitted": 0.0, "output": f"{folder}/slurm-%j.out"}
    run.put(layout.SLURM_JOB, json.dumps(record).encode())
    with pytest.raises(ConfigError, match="the job has not begun"):
        job_output(run)
    (folder / "slurm-12.out").write_text("hello\n")
    assert job_output(run) == "hello\n"
    (folder / "slurm-13.out").write_text("the next\n")
    assert job_output(run) == "the next\n"
    run.put(layout.SLURM_JOB, json.dumps({**record, "jobs": [12], "output": f"{tmp_path}/of%"}).encode())
    (tmp_path / "of%").mkdir()
    with pytest.raises(ConfigError, match=r"/of% cannot be read: Is a directory\.$"):
        job_output(run)


def test_a_machine_without_slurm_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch: not found\. Use a machine that Slurm is installed on"):
        queue.call("sbatch")
    assert jobs_of(RECORD) == []


def test_a_job_inherits_nothing_of_the_job_or_rank_that_submits_it() -> None:
    kept = {"PATH": "/bin", "AWS_ENDPOINT_URL": "http://s3", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_RESERVATION": "r"}
    kept["SLURM_CLUSTERS"] = "of the user's choice"
    gone = {
        "SLURM_JOB_ID": "1",
        "SLURM_MEM_PER_NODE": "5",
        "SRUN_DEBUG": "3",
        "PMIX_RANK": "0",
        "RANK": "0",
        "MASTER_PORT": "1",
        "RAY_ADDRESS": "other:6379",
        "CUDA_VISIBLE_DEVICES": "0",
        "SBATCH_PARTITION": "debug",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_MEM_PER_NODE": "1",
        "TMPDIR": "/tmp/of-job-1",
    }
    options = {"partition": "gpu", "time": "10", "no-requeue": None, "mem": "0"}
    assert clean_environment({**kept, **gone}, options) == kept
    # Outside a job the user's own choice of GPUs is meant.
    assert clean_environment({"CUDA_VISIBLE_DEVICES": "0"}, options) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert clean_environment({"SBATCH_PARTITION": "debug"}, {"time": "10"}) == {"SBATCH_PARTITION": "debug"}


def test_a_copied_run_does_not_have_the_jobs_of_the_one_it_was_copied_from(tmp_path: Path) -> None:
    runs = open_store(str(tmp_path / "runs"))
    orig, fork = runs.sub("orig"), runs.sub("fork")
    record = json.dumps(asdict(SubmittedJobs([12], "s", "out", orig.uri))).encode()
    for folder in (orig, fork):
        folder.put(layout.SLURM_JOB, record)
    assert queue.submitted_jobs(fork) is None
    assert queue.submitted_jobs(orig) is not None
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert queue.submitted_jobs(open_store(str(tmp_path / "link/orig"))) is not None, "the same folder by another way"
    (tmp_path / "runs").rename(tmp_path / "runs#2")
    moved = json.dumps(asdict(SubmittedJobs([12], "s", "out", f"file://{tmp_path}/runs#1/orig"))).encode()
    copied = open_store(str(tmp_path / "runs#2/orig"))
    copied.put(layout.SLURM_JOB, moved)
    assert queue.submitted_jobs(copied) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"jobs": 12, "submission": "s", "submitted": 0, "output": "o"}', b"\xff"],
    ids=str,
)
def test_a_damaged_record_of_a_job_is_none(run: Store, content: bytes) -> None:
    run.put(layout.SLURM_JOB, content)
    assert queue.submitted_jobs(run) is None
    queue.check_no_job(run)
    whole = [Attempt(number, "s", 12, 0, ["n1"], 0.0, failed_nodes=["n1"]) for number in (1, 3)]
    for attempt in whole:
        run.put(layout.slurm_attempt(attempt.number), json.dumps(asdict(attempt)).encode())
    run.put(layout.slurm_attempt(2), content)
    assert queue.attempts(run) == whole


def test_a_submission_without_a_job_is_none(run: Store) -> None:
    run.put(layout.SLURM_JOB, json.dumps(asdict(SubmittedJobs([], "s", "out"))).encode())
    assert queue.submitted_jobs(run) is None
