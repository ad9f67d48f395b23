"""The state of a run's jobs as Slurm reports it, beside the run's folder. This file also cancels waiting jobs."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Group, RenderableType

from launcher.policy.jobs import Attempt
from launcher.view.console import facts
from launcher.view.status import ENDED, RunStatus, read_status
from launcher.view.watch import render_status
from trainer.config.paths import NoFile, check_file
from trainer.errors import ConfigError, NotFound
from trainer.processes import children
from trainer.run import layout
from trainer.run.folder import command, name_of
from trainer.run.records import record_end
from trainer.run.requests import request_stop
from trainer.store.store import Store

_SECONDS = 60
_POLL_SECONDS = 10.0
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class SubmittedJobs:
    """A run's newest submission as its folder records it, in slurm/job.json.

    `submission` tells its jobs from those of another submission. `output` is a path with %j for the job's number. `run`
    is the folder that the jobs belong to; a copy of the folder is not that folder.
    """

    jobs: list[int]
    submission: str
    output: str
    run: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """A job as Slurm sees it.

    `reason` is Slurm's word for why it waits or ended. Times are seconds since 1970. `start` is when it began, or for a
    pending job when Slurm expects it to begin. Accounting does not tell `restarts`.
    """

    job: int
    state: str
    reason: str = ""
    start: float | None = None
    nodes: str = ""
    restarts: int | None = None

    @property
    def is_pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")

    @property
    def is_active(self) -> bool:
        return self.is_pending or self.state in ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")

    def sentence(self) -> str:
        """Describe the job, such as: RUNNING on n[1-2], restarted 2 times."""
        text = self.state
        if self.is_pending:
            text += f": {_WHY.get(self.reason, self.reason)}" if self.reason else ""
            text += f", expected to start {_when(self.start)}" if self.start else ", no start is foreseen yet"
        elif self.nodes:
            text += f" on {self.nodes}" + (f" since {_when(self.start)}" if self.start and self.is_active else "")
        return text + (f", restarted {self.restarts} times" if self.restarts else "")


# Explanations of the reasons that users meet most. https://slurm.schedmd.com/job_reason_codes.html
_WHY = {
    "Resources": "waits until enough nodes are free (Resources)",
    "Priority": "jobs of higher priority are before it (Priority)",
    "Dependency": "waits for another job (Dependency)",
    "DependencyNeverSatisfied": "the run that it waits for did not finish (DependencyNeverSatisfied)",
    "BeginTime": "starts again in a moment (BeginTime)",
    "JobHeldUser": "held; `scontrol release` lets it go (JobHeldUser)",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved (ReqNodeNotAvail)",
    "PartitionTimeLimit": "cluster.slurm.time is more than the partition allows (PartitionTimeLimit)",
}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@dataclass(frozen=True)
class SlurmStatus:
    """The state of a run by its folder, and by Slurm.

    `jobs` is empty if Slurm cannot be asked or has forgotten them.
    """

    run: RunStatus
    jobs: list[SlurmJob]
    attempts: list[Attempt]

    def to_json(self) -> dict[str, Any]:
        slurm = {"jobs": [asdict(job) for job in self.jobs], "attempts": [asdict(one) for one in self.attempts]}
        return {**asdict(self.run), "slurm": slurm}

    def table(self) -> RenderableType:
        rows = facts()
        for job in self.jobs:
            rows.add_row(f"job {job.job}", job.sentence())
        if not self.jobs:
            rows.add_row("job", "Slurm cannot be asked from here, or does not know the job any more")
        for one in self.attempts:
            if one.kind:
                because = f": {one.reason}" if one.reason else ""
                text = f"{one.kind}{because}; step {one.step:,} was committed"
                rows.add_row(f"job {one.job}.{one.restart}", text)
        return Group(render_status(self.run), rows)


def slurm_status(folder: Store, found: SubmittedJobs) -> SlurmStatus:
    return SlurmStatus(read_status(folder), jobs_of(found), attempts(folder))


def is_over(folder: Store, found: SubmittedJobs) -> Callable[[], bool]:
    """Return whether the run has ended and no job of it will go on. Slurm is asked only every few seconds."""
    asked, active = 0.0, True

    def over() -> bool:
        nonlocal asked, active
        if time.monotonic() - asked > _POLL_SECONDS or not asked:
            asked = time.monotonic()
            jobs = jobs_of(found)
            active = any(job.is_active for job in jobs) if jobs else read_status(folder).state not in ENDED
        return not active

    return over


def stop_jobs(folder: Store, found: SubmittedJobs, *, dry_run: bool) -> str:
    """Cancel the jobs that have not started, and ask the running job to commit and end.

    Returns what was done, in words.
    """
    jobs = [job for job in jobs_of(found) if job.is_active]
    waiting = [job.job for job in jobs if job.is_pending]
    running = [job.job for job in jobs if not job.is_pending]
    parts = []
    if running or not jobs:
        parts.append("the run is to commit and end")
    if waiting:
        parts.append(f"job {', '.join(map(str, waiting))}, which waits, is to be cancelled")
    sentence = f"{folder.uri}: {' and '.join(parts)}"
    if dry_run:
        return sentence
    cancel(waiting, job_name(name_of(folder)))
    if running or not jobs:
        request_stop(folder, by="capstan stop")
    elif read_status(folder).state not in ENDED:
        record_end(folder, "cancelled by capstan stop while its job waited", stopped=True)
    return sentence


def job_output(folder: Store) -> str:
    """Return the output of the newest job that has begun. Raises `ConfigError` when the run has no such job."""
    found = submitted_jobs(folder)
    if found is None:
        raise ConfigError(f"{folder.uri} was not submitted to Slurm, so there is no job's output.")
    named = Path(found.output)
    for job in reversed(found.jobs):
        output = named.parent / named.name.replace("%j", str(job))
        try:
            check_file(output)
            return output.read_text(errors="replace")
        except (FileNotFoundError, NoFile):
            continue
        except OSError as error:
            raise ConfigError(f"{output} cannot be read: {error.strerror}.") from error
    raise ConfigError(
        f"there is no {found.output} here: the job has not begun, or it wrote the file on another machine."
    )


def submitted_jobs(folder: Store) -> SubmittedJobs | None:
    """Return the run's newest submission to Slurm; None if it has none, or the record of it is damaged."""
    found = _record(folder, layout.SLURM_JOB, SubmittedJobs)
    ours = found is not None and found.jobs and (not found.run or _place(found.run) == _place(folder.uri))
    return found if ours else None


def _place(uri: str) -> str:
    """Return the real path of a folder, which may have been reached through a link."""
    return str(Path(uri.removeprefix("file://")).resolve()) if uri.startswith("file://") else uri


def check_no_job(folder: Store) -> None:
    """Raise `ConfigError` when a job of the run waits or runs: two starts of one run would fence each other off."""
    found = submitted_jobs(folder)
    active = [job for job in jobs_of(found) if job.is_active] if found else []
    if active:
        raise ConfigError(
            f"run.name: job {active[0].job} of {folder.uri} is {active[0].state}. {command('stop', folder)} ends it"
            " first."
        )


def attempts(folder: Store) -> list[Attempt]:
    """Return the starts of the run's jobs, oldest first, without those whose record is damaged."""
    found = (_record(folder, entry.key, Attempt) for entry in folder.list(layout.SLURM_ATTEMPTS))
    return [attempt for attempt in found if attempt is not None]


def _record(folder: Store, key: str, kind: type[_Record]) -> _Record | None:
    """Return the record under `key`; None if there is none, or it is unusable."""
    with suppress(NotFound, ValidationError):
        return TypeAdapter(kind).validate_json(folder.get(key))
    return None


def jobs_of(found: SubmittedJobs) -> list[SlurmJob]:
    """Return what Slurm says about the jobs: the controller as long as it remembers them, else the accounting.

    A job that neither knows is missing. Without Slurm's commands on this machine all jobs are missing.
    """
    try:
        live = call("squeue", "--states=all", "--json", f"--jobs={','.join(map(str, found.jobs))}")
        jobs = parse_squeue(live.stdout) if live.returncode == 0 else []
        forgotten = set(found.jobs) - {job.job for job in jobs}
        if forgotten:
            fields = "--format=JobIDRaw,State,Reason,Start,NodeList"
            which = f"--jobs={','.join(map(str, forgotten))}"
            past = call("sacct", "--allocations", "--noheader", "--parsable2", fields, which)
            jobs += parse_sacct(past.stdout) if past.returncode == 0 else []
    except ConfigError:
        return []
    return sorted(jobs, key=lambda job: job.job)


def parse_squeue(text: str) -> list[SlurmJob]:
    """Return the jobs in squeue's JSON.

    A state is a list of a base state and flags. A flag such as COMPLETING says more than the base state.
    """
    return [
        SlurmJob(
            job=job["job_id"],
            state=_state(job["job_state"]),
            reason="" if job["state_reason"] == "None" else job["state_reason"],
            start=_number(job["start_time"]) or None,
            nodes=job["nodes"] or "",
            restarts=_number(job["restart_cnt"]),
        )
        for job in json.loads(text)["jobs"]
    ]


def parse_sacct(text: str) -> list[SlurmJob]:
    """Parse the lines of `sacct --parsable2`: JobIDRaw|State|Reason|Start|NodeList."""
    found = []
    for line in text.splitlines():
        number, state, reason, start, nodes = line.split("|")
        began = None
        with suppress(ValueError):
            began = time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S"))
        # "CANCELLED by 1000" names who did it.
        found.append(SlurmJob(int(number), state.partition(" ")[0], "" if reason == "None" else reason, began, nodes))
    return found


def _state(given: Any) -> str:
    states = [given] if isinstance(given, str) else given
    return states[-1] if states else "UNKNOWN"


def _number(given: Any) -> int:
    """Return a number of Slurm's. Slurm writes it as it is, or together with a mark that says whether it is set."""
    return given if isinstance(given, int) else int(given["number"]) if given.get("set") else 0


def job_name(run: str) -> str:
    """Return the name of a run's jobs."""
    return f"capstan:{run}"


def cancel(jobs: Sequence[int], name: str | None = None) -> None:
    """Cancel `jobs`, or those of them that have this `name`. Raises `ConfigError` with scancel's own words.

    Whoever may write to a run's folder may name any job there, so the name is checked.
    """
    if jobs:
        answer = call("scancel", *([f"--name={name}"] if name else []), *map(str, jobs))
        if answer.returncode:
            raise ConfigError(f"scancel refuses: {slurm_message(answer)}")


def call(
    *command: str, given: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's. Raises `ConfigError` when it is not installed or does not answer."""
    try:
        return children.run(
            command, input=given, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]}: not found. Use a machine that Slurm is installed on, such as the cluster's login node."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: no answer from Slurm within {_SECONDS} seconds. Try again later.") from error


def slurm_message(answer: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a command of Slurm's, in one line and without its own prefix."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in answer.stderr.strip().splitlines()]
    return "; ".join(filter(None, lines)) or f"exit code {answer.returncode}"
