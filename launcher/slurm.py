"""`capstan submit slurm`, and Slurm's own word on a run's jobs. The only file that calls Slurm's commands outside a job."""

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher import slurm_script, snapshot
from launcher.status import find_run, read_status
from launcher.submission import anchored, check, claim, release, run_folder
from trainer import run_layout
from trainer.config import Config, override
from trainer.errors import ConfigError, NotFound
from trainer.store import Store

_SECONDS = 60
# What torchrun, srun and Ray set for the process that submits, and must not reach the job's own ranks.
_OF_THIS_PROCESS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RAY_ADDRESS",
    "RAY_JOB_ID",
)
_OPTION_OF = {"timelimit": "time", "mempernode": "mem"}  # where SBATCH_ variables have names of their own
_OF_ITS_JOB = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "TMPDIR")


@dataclass(frozen=True)
class Submitted:
    """A run's jobs, as the folder records them: slurm/job.json. `output` is a path, with %j for the job's number."""

    run: str
    jobs: list[int]
    submission: str
    submitted: float
    output: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        name = self.run.rpartition("/")[2]
        jobs = f"job {self.jobs[0]}" if len(self.jobs) == 1 else f"jobs {self.jobs[0]} to {self.jobs[-1]}"
        return f"submitted {name} as {jobs}; `capstan status {self.run}` shows what becomes of it"


@dataclass(frozen=True)
class Prepared:
    """A run that is checked and written down as a batch file, but not submitted."""

    config: Config
    script: str
    submission: str
    output: str
    options: dict[str, str | None]


def prepare(config: Config, *, resume: bool, after: str | None = None) -> Prepared:
    """Everything before the submission; changes nothing.

    `after` is a run, a name in the same store or a URI, that has to finish first.

    Raises:
        ConfigError: the run, its layout on the nodes or `after` cannot be used.
        NothingToResume: `resume`, and nothing is committed.
    """
    config = anchored(config)
    layout = slurm_script.shape(config)
    config = override(config, f"cluster.workers={layout.nodes * layout.ranks_per_node}")
    check(config, resume=resume)
    run = run_folder(config)
    output = _output_folder(config, run).replace("%", "%%") + "/slurm-%j.out"
    options = slurm_script.options(config, output, [_finished(after, config.run.store)] if after else [])
    submission = secrets.token_hex(4)
    return Prepared(config, slurm_script.render(config, run.uri, submission, options), submission, output, options)


def submit(prepared: Prepared, *, resume: bool) -> Submitted:
    """Claim the run's name, keep the code and the batch file with it, and give the file to sbatch.

    Raises:
        ConfigError: the name is taken, or sbatch refuses; the name is then free again.
    """
    run = claim(prepared.config, resume=resume, code=snapshot.take(Path.cwd()))
    run.put(run_layout.SLURM_SCRIPT, prepared.script.encode())
    environment = clean_environment(os.environ, prepared.options)
    jobs: list[int] = []
    try:
        Path(prepared.output.replace("%%", "%")).parent.mkdir(parents=True, exist_ok=True)
        for _ in range(max(1, prepared.config.cluster.slurm.chain)):
            jobs.append(_sbatch(prepared.script, environment))
    except BaseException:
        cancel(jobs)
        if not resume:
            release(run)
        raise
    record = Submitted(run.uri, jobs, prepared.submission, time.time(), prepared.output)
    run.put(run_layout.SLURM_JOB, json.dumps(record.to_json()).encode())
    return record


def _sbatch(script: str, environment: Mapping[str, str]) -> int:
    answer = _slurm("sbatch", "--parsable", given=script, environment=environment)
    if answer.returncode:
        raise ConfigError(f"sbatch refuses the job: {_words(answer)}")
    return int(answer.stdout.strip().partition(";")[0])  # "JOB" or "JOB;CLUSTER"


def clean_environment(environment: Mapping[str, str], options: Mapping[str, str | None]) -> dict[str, str]:
    """What the job inherits: nothing of a job or a rank that this process itself is part of.

    An SBATCH_ variable would win over the file's `#SBATCH` line, so it goes where the file has that option.
    """
    in_file = {name.replace("-", "") for name in options}
    inside_a_job = "SLURM_JOB_ID" in environment

    def stays(name: str) -> bool:
        if name.startswith("SBATCH_"):
            option = name.removeprefix("SBATCH_").replace("_", "").lower()
            return _OPTION_OF.get(option, option) not in in_file
        if name.startswith(("SLURM_", "SRUN_", "PMI_", "PMIX_")):
            return name in ("SLURM_CONF", "SLURM_CLUSTERS")
        return name not in _OF_THIS_PROCESS and not (inside_a_job and name in _OF_ITS_JOB)

    return {name: value for name, value in environment.items() if stays(name)}


def _output_folder(config: Config, run: Store) -> str:
    if config.cluster.slurm.output:
        return str(Path(config.cluster.slurm.output).expanduser().absolute())
    return urlsplit(run.uri).path if run.uri.startswith("file://") else str(Path.cwd())


def _finished(run: str, store: str) -> str | None:
    """The dependency on the end of `run`; none when it has finished already."""
    folder = find_run(run, store)
    if read_status(folder).state == "finished":
        return None
    record = submitted(folder)
    if record is None:
        raise ConfigError(f"--after: {run!r} was not submitted to Slurm, so no job can wait for it.")
    return f"afterok:{record.jobs[-1]}"


# --- what Slurm says


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it. `reason` is Slurm's word for why it waits or ended; times are seconds since 1970.

    `start` is when it began, or for a pending job when Slurm expects it to.
    """

    job: int
    state: str
    reason: str = ""
    start: float | None = None
    nodes: str = ""
    restarts: int | None = None

    @property
    def is_pending(self) -> bool:
        return self.state == "PENDING"

    @property
    def is_active(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "PREEMPTED")


def submitted(run: Store) -> Submitted | None:
    """The run's newest submission to Slurm, if it has one."""
    with suppress(NotFound):
        return Submitted(**json.loads(run.get(run_layout.SLURM_JOB)))
    return None


def jobs_of(record: Submitted) -> list[Job]:
    """Slurm's word on the jobs, from the controller as long as it remembers them, else from the accounting.

    A job that neither knows is missing; without Slurm's commands on this machine all are.
    """
    numbers = ",".join(map(str, record.jobs))
    try:
        live = _slurm("squeue", "--states=all", "--json", f"--jobs={numbers}")
        found = parse_squeue(live.stdout) if live.returncode == 0 else []
        forgotten = [job for job in record.jobs if job not in {one.job for one in found}]
        if forgotten:
            fields = "--format=JobIDRaw,State,Reason,Start,NodeList"
            numbers = ",".join(map(str, forgotten))
            past = _slurm("sacct", "--allocations", "--noheader", "--parsable2", fields, f"--jobs={numbers}")
            found += parse_sacct(past.stdout) if past.returncode == 0 else []
    except ConfigError:
        return []
    return sorted(found, key=lambda job: job.job)


def parse_squeue(text: str) -> list[Job]:
    """The jobs in squeue's JSON. A state is a list of a base state and flags, of which a flag such as COMPLETING says more."""
    return [
        Job(
            job=job["job_id"],
            state=_state(job["job_state"]),
            reason="" if job["state_reason"] == "None" else job["state_reason"],
            start=_number(job["start_time"]) or None,
            nodes=job["nodes"] or "",
            restarts=_number(job["restart_cnt"]),
        )
        for job in json.loads(text)["jobs"]
    ]


def parse_sacct(text: str) -> list[Job]:
    """The lines of `sacct --parsable2`: JobIDRaw|State|Reason|Start|NodeList."""
    found = []
    for line in text.splitlines():
        number, state, reason, start, nodes = line.split("|")
        began = None
        with suppress(ValueError):
            began = time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S"))
        # "CANCELLED by 1000" names who did it.
        found.append(Job(int(number), state.partition(" ")[0], "" if reason == "None" else reason, began, nodes))
    return found


def _state(given: Any) -> str:
    states = [given] if isinstance(given, str) else given
    return states[-1] if states else "UNKNOWN"


def _number(given: Any) -> int:
    """Slurm writes a number as it is, or with whether it is set."""
    return given if isinstance(given, int) else int(given["number"]) if given.get("set") else 0


def cancel(jobs: Sequence[int], *, pending_only: bool = False) -> None:
    """Raises `ConfigError` with scancel's own words."""
    if jobs:
        only = ["--state=PENDING"] if pending_only else []
        answer = _slurm("scancel", *only, *map(str, jobs))
        if answer.returncode:
            raise ConfigError(f"scancel refuses: {_words(answer)}")


def _slurm(
    *command: str, given: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]}: not found. Use a machine that Slurm is installed on, such as the cluster's login node."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: no answer from Slurm within {_SECONDS} seconds. Try again later.") from error


def _words(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command of Slurm said, in one line and without its own prefix."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in answer.stderr.strip().splitlines()]
    return "; ".join(filter(None, lines)) or f"exit code {answer.returncode}"
