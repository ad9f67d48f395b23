"""`capstan submit slurm`: one batch file, written down with the run and given to sbatch."""

import json
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from launcher.cluster.ray.cluster import check_ray
from launcher.cluster.slurm import script
from launcher.cluster.slurm.queue import SubmittedJobs, call, cancel, check_no_job, submitted_jobs, words
from launcher.start import snapshot
from launcher.start.check import anchored, checked
from launcher.start.claim import claimed
from launcher.view.runs import find_run
from trainer.config import Config, override
from trainer.config.paths import absolute_path
from trainer.errors import ConfigError
from trainer.processes.children import OF_A_RANK
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.store.store import Store

# torchrun, srun and Ray set these for the process that submits; they must not reach the job's own ranks.
_OF_THIS_PROCESS = (
    *OF_A_RANK,
    "RAY_ADDRESS",
    "RAY_JOB_ID",
)
_OPTION_OF = {"timelimit": "time", "mempernode": "mem"}  # where SBATCH_ variables have names of their own
_OF_ITS_JOB = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "TMPDIR")


@dataclass(frozen=True)
class SlurmSubmission:
    """A run as it was handed over to Slurm, or with `dry_run` would be; `script` is the batch file."""

    run: str
    uri: str
    jobs: list[int]
    output: str
    script: str
    snapshot: str
    next: str
    dry_run: bool

    def text(self) -> str:
        """For people: the job, the run and the next command; of a dry run the batch file, ready for sbatch."""
        if self.dry_run:
            return self.script.rstrip()
        jobs = f"job {self.jobs[0]}" if len(self.jobs) == 1 else f"jobs {', '.join(map(str, self.jobs))}"
        return f"run {self.run}: submitted to Slurm as {jobs}\nsnapshot: {self.snapshot}\nnext: {self.next}"


def submit(
    config: Config,
    *,
    resume: bool,
    take_over: bool,
    after: str | None,
    dry_run: bool,
    log: Callable[[str], None],
) -> SlurmSubmission:
    """Check, write the batch file, claim the name, keep the code, and submit; returns without waiting for the job.

    `after` is a run, a name in the same store or a URI, that has to finish first.

    Raises:
        ConfigError: a setting is wrong, Ray is not installed, the name is taken, or Slurm refuses (with its own words;
            the name is free again).
        NothingToResume: `resume`, and nothing is committed.
    """
    config = inside_a_job(anchored(config))
    slurm = config.cluster.slurm
    if slurm.launch == "ray" and not (slurm.python or slurm.container):  # the nodes run this environment
        check_ray("cluster.slurm.launch: ray")
    config, seen = checked(config, resume=resume, take_over=take_over, dry_run=dry_run, log=log)
    code = snapshot.take(Path.cwd())
    run = run_folder(config)
    if seen:
        check_no_job(run)
    output = _output_folder(config, run) / "slurm-%j.out"
    options = script.options(
        config, str(output).replace("%", "%%").replace("%%j", "%j"), [_finished(after, config)] if after else []
    )
    submission = secrets.token_hex(4)
    batch_file = script.render(config, run.uri, submission, options)
    done = SlurmSubmission(
        run=config.run.name,
        uri=run.uri,
        jobs=[],
        output=str(output),
        script=batch_file,
        snapshot=code.sentence(),
        next=f"capstan status {shlex.quote(run.uri)} --watch",
        dry_run=dry_run,
    )
    if dry_run:
        return done
    how = {"take_over": take_over, "group": submission, "waits": True}
    with claimed(config, by="capstan submit slurm", resume=resume, code=code, log=log, **how):
        run.put(layout.SLURM_SCRIPT, batch_file.encode())
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = _sbatch(batch_file, max(1, config.cluster.slurm.chain), clean_environment(os.environ, options))
    found = SubmittedJobs(jobs, submission, str(output), run.uri)
    run.put(layout.SLURM_JOB, json.dumps(asdict(found)).encode())
    return replace(done, jobs=jobs)


def inside_a_job(config: Config) -> Config:
    """The run's settings with those that its job decides. Raises `ConfigError` as `script.shape` does."""
    job_shape, cluster = script.shape(config), config.cluster
    if cluster.workers is None:
        config = override(config, f"cluster.workers={job_shape.ranks}")
    if cluster.slurm.gpus_per_node and cluster.gpus_per_worker is None:
        # On a node that shows them no GPU the ranks would else compute on its CPUs.
        config = override(config, "cluster.gpus_per_worker=1")
    if config.retry.preemptions is None:
        # No machine comes in place of a lost one inside a job: the driver ends at once, and the job is requeued.
        config = override(config, "retry.preemptions=0")
    return config


def _sbatch(batch_file: str, count: int, environment: Mapping[str, str]) -> list[int]:
    jobs: list[int] = []
    for _ in range(count):
        answer = call("sbatch", "--parsable", given=batch_file, environment=environment)
        if answer.returncode:
            cancel(jobs)
            raise ConfigError(f"Slurm refuses the job: {words(answer)}")
        jobs.append(int(answer.stdout.strip().partition(";")[0]))  # "JOB" or "JOB;CLUSTER"
    return jobs


def clean_environment(environment: Mapping[str, str], options: Mapping[str, str | None]) -> dict[str, str]:
    """The environment that the job inherits: nothing of a job or a rank that this process itself is part of.

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


def _output_folder(config: Config, folder: Store) -> Path:
    if config.cluster.slurm.output:
        return absolute_path(config.cluster.slurm.output, "cluster.slurm.output")
    return Path(urlsplit(folder.uri).path) if folder.uri.startswith("file://") else Path.cwd()


def _finished(run: str, config: Config) -> str:
    """The dependency on the end of `run`."""
    folder = find_run(run, config.run.store)
    found = submitted_jobs(folder)
    if found is None:
        raise ConfigError(f"--after: {run!r} was not submitted to Slurm, so no job can wait for it.")
    return f"afterok:{found.jobs[-1]}"
