"""`capstan submit slurm`: it writes one batch file, stores it with the run, and gives it to sbatch."""

import json
import math
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher.cluster.ray.cluster import check_ray
from launcher.cluster.slurm.queue import (
    SubmittedJobs,
    call,
    cancel,
    check_no_job,
    job_name,
    slurm_message,
    submitted_jobs,
)
from launcher.plan.notes import refuse_empty_rows
from launcher.plan.planning import needs_of
from launcher.plan.summary import binary, fits_line
from launcher.start import snapshot
from launcher.start.check import anchored, checked, refuse_replacing
from launcher.start.claim import claimed
from launcher.start.environment import Environment, carry, to_carry
from launcher.start.sidecars import sidecars_sentence
from launcher.view.runs import find_run
from trainer.config import Config, override
from trainer.config.objective import SERVE
from trainer.config.paths import absolute_path
from trainer.errors import CapstanError, ConfigError, counted
from trainer.evaluate.rollout.rewards import check_reward
from trainer.processes.children import OF_A_RANK
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.store.store import Store

_BODY = Path(__file__).resolve().parents[3] / "slurm" / "run.sh"


@dataclass(frozen=True)
class JobShape:
    """The nodes of a job, all ranks, the ranks' nodes, and the ranks and CPUs of each.

    The spare nodes follow those of the ranks. The last nodes are those of the servers that srun starts.
    """

    nodes: int
    ranks: int
    rank_nodes: int
    ranks_per_node: int
    cpus_per_node: int
    server_nodes: int = 0


def shape(config: Config) -> JobShape:
    """Return the layout of the run's ranks and servers over the job's nodes.

    Raises:
        ConfigError: the ranks do not divide over the nodes, or a node has fewer GPUs or CPUs than ranks, or no room is
            left for the servers.
    """
    slurm, workers = config.cluster.slurm, config.cluster.most_workers
    if workers is None and not slurm.gpus_per_node:
        raise ConfigError(
            "cluster.workers: missing. Set it, or cluster.slurm.gpus_per_node, which gives every GPU a rank."
        )
    serving = config.rollout.serving_gpus
    server_nodes = _server_nodes(config)
    # Servers are on their own nodes if there are several nodes; else they have the last GPUs of the nodes. Ray finds
    # room for them by itself.
    apart = serving and slurm.launch == "direct" and slurm.nodes > 1
    nodes = slurm.nodes - server_nodes if apart else slurm.nodes
    gpus = nodes * (slurm.gpus_per_node or 0) - (0 if apart else serving)
    ranks = workers or gpus
    if slurm.gpus_per_node and (gpus < 1 or (serving and ranks > gpus and config.cluster.gpus_per_worker != 0)):
        raise ConfigError(
            f"rollout.serve: {config.rollout.serve.replicas} x {config.rollout.serve.gpus} GPUs for servers leave"
            f" {max(gpus, 0)} of cluster.slurm.nodes: {slurm.nodes} x gpus_per_node: {slurm.gpus_per_node} for"
            f" {workers or 'the'} ranks. Ask for more nodes, or lower rollout.serve.replicas or cluster.workers."
        )
    per_node, rest = divmod(ranks, nodes)
    if rest and serving and slurm.launch == "ray":
        per_node, rest = per_node + 1, 0
    if rest:
        raise ConfigError(
            f"cluster.workers: {ranks} ranks do not divide over cluster.slurm.nodes: {nodes}. Use a multiple of it."
        )
    if slurm.gpus_per_node and per_node > slurm.gpus_per_node:
        raise ConfigError(
            f"cluster.workers: {per_node} ranks on each node need as many GPUs; cluster.slurm.gpus_per_node is "
            f"{slurm.gpus_per_node}. Lower the one or raise the other."
        )
    # Beside each GPU run its rank's main thread, its data, the upload of checkpoints and NCCL's threads.
    usual = 8 if slurm.gpus_per_node else 1
    each = max(config.cluster.threads_per_worker or usual, config.cluster.ray.cpus_per_worker)
    cpus = slurm.cpus_per_node or math.ceil(each * (slurm.gpus_per_node or per_node if serving else per_node))
    if cpus < per_node:
        raise ConfigError(f"cluster.slurm.cpus_per_node: {cpus} is less than the {per_node} ranks on each node.")
    return JobShape(slurm.nodes + config.cluster.spares, ranks, nodes, per_node, cpus, server_nodes)


def _server_nodes(config: Config) -> int:
    """Return the nodes that the run's servers take. Raises `ConfigError` if none has room for one."""
    serve, gpus = config.rollout.serve, config.cluster.slurm.gpus_per_node or 0
    if config.rollout.engine != SERVE:
        return 0
    if serve.gpus > gpus:
        raise ConfigError(
            f"rollout.serve.gpus: {serve.gpus} GPUs for a server are more than cluster.slurm.gpus_per_node: {gpus}."
            " Lower the one (0 serves on CPUs) or raise the other."
        )
    return math.ceil(serve.replicas / (gpus // serve.gpus)) if serve.gpus else 1


def sbatch_options(config: Config, output: str, dependencies: list[str]) -> dict[str, str | None]:
    """Return sbatch's options by their long names; None if an option has no value.

    `output` is the job's output file. `dependencies` are terms of `--dependency`, all of which must hold.
    """
    slurm, node = config.cluster.slurm, shape(config)
    gpus = f"{slurm.gpu_type}:{slurm.gpus_per_node}" if slurm.gpu_type else slurm.gpus_per_node
    if slurm.chain:
        dependencies = [*dependencies, "singleton"]  # only one job with this name runs at a time
    found: dict[str, object] = {
        "job-name": job_name(config.run.name),
        "nodes": node.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": node.cpus_per_node,
        "gpus-per-node": gpus,
        "mem": slurm.memory_per_node,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "comment": slurm.comment,
        "dependency": ",".join(dependencies) or None,
        "output": output,
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
    }
    flags: dict[str, str | None] = {"no-requeue" if slurm.chain else "requeue": None}
    if config.cluster.spares:
        flags["no-kill"] = None  # Slurm would otherwise end the job with the first node that is lost
    return {name: str(value) for name, value in found.items() if value is not None} | flags


def render_batch_file(
    config: Config,
    run_uri: str,
    submission: str,
    options: dict[str, str | None],
    environment: Environment | None = None,
) -> str:
    """Return the whole batch file. `submission` tells its jobs from those of another submission of the same run.

    `environment` is the one that the run carries.
    """
    slurm, node = config.cluster.slurm, shape(config)
    values = {
        "RUN_NAME": config.run.name,
        "RUN_URI": run_uri,
        "SUBMISSION": submission,
        "PYTHON": slurm.python or sys.executable,
        "CONTAINER": slurm.container,
        **({"CARRIED": [*environment.command(config, slurm.local_dir), "-Pm"]} if environment else {}),
        "LAUNCH": slurm.launch,
        "RANK_NODES": node.rank_nodes,
        "RANKS_PER_NODE": node.ranks_per_node,
        "CPUS_PER_NODE": node.cpus_per_node,
        "RAY_CPUS": math.ceil(node.ranks_per_node * config.cluster.ray.cpus_per_worker),
        "LOCAL_DIR": slurm.local_dir,
    }
    if node.server_nodes and slurm.launch == "direct":
        values |= {"SERVERS": config.rollout.serve.replicas, "SERVER_NODES": node.server_nodes}
    if config.cluster.keeper and slurm.launch == "direct":
        values["KEEPER"] = "yes"
    if config.cluster.spares:
        values["SPARES"] = config.cluster.spares
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _option_lines(options, slurm.extra)),
        "",
        *([f"# {sidecars}"] if (sidecars := sidecars_sentence(config)) else []),
        *(f"{name}={_shell(value)}" for name, value in values.items()),
        "",
    ]
    if slurm.setup:
        lines += ["# cluster.slurm.setup", *slurm.setup, ""]
    body = _BODY.read_text(encoding="utf-8")
    return "\n".join([*lines, body])


def _option_lines(options: dict[str, str | None], extra: list[str]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name}" if value is None else f"--{name}={slurm_quoted(value)}"
    for option in extra:
        name, equals, value = option.partition("=")
        yield f"{name}{equals}{slurm_quoted(value)}" if equals else name


def slurm_quoted(value: str) -> str:
    """Return `value` as one word of an `#SBATCH` line: quotes group, a backslash takes the next character as it is.

    Source: `_get_argument` of src/sbatch/opt.c in Slurm. Raises `ConfigError` for a value that one line cannot hold.
    """
    if not value.isprintable():
        raise ConfigError(
            f"{value!r} cannot be an option of sbatch: it holds a line break or another unprintable character."
        )
    if value and all(c.isascii() and (c.isalnum() or c in "-_./:,@%+=[]") for c in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shell(value: object) -> str:
    if isinstance(value, list):
        return f"({' '.join(shlex.quote(word) for word in value)})"
    return shlex.quote(str(value))


# torchrun, srun and Ray set these for the process that submits. They must not reach the job's own ranks.
_OF_THIS_PROCESS = (
    *OF_A_RANK,
    "RAY_ADDRESS",
    "RAY_JOB_ID",
)
_OPTION_OF = {"timelimit": "time", "mempernode": "mem"}  # some SBATCH_ variables have names of their own
_OF_ITS_JOB = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "TMPDIR")


@dataclass(frozen=True)
class SlurmSubmission:
    """A run that was submitted to Slurm, or with `dry_run` one that would be. `script` is the batch file."""

    run: str
    uri: str
    jobs: list[int]
    output: str
    script: str
    snapshot: str
    next: str
    dry_run: bool

    def text(self) -> str:
        """The text for people: the job, the run and the next command; for a dry run the batch file for sbatch."""
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
    """Check, write the batch file, claim the name, keep the code, and submit. Returns without waiting for the job.

    `after` is a run, a name in the same store or a URI, that has to finish first.

    Raises:
        ConfigError: a setting is wrong, Ray is not installed, the name is taken, or Slurm refuses (with its own words;
            the name is free again).
        NothingToResume: `resume`, and nothing is committed.
    """
    config = inside_a_job(anchored(config))
    slurm = config.cluster.slurm
    if slurm.chain:
        refuse_replacing(config, "the jobs of cluster.slurm.chain are submitted before it is known which node is slow")
    nodes_run_this = config.cluster.environment == "archive" or not (slurm.python or slurm.container)
    if slurm.launch == "ray" and nodes_run_this:
        check_ray("cluster.slurm.launch: ray")
    config, seen = checked(config, resume=resume, take_over=take_over, dry_run=dry_run, log=log)
    _check_reward(config, log)
    if not resume:
        refuse_empty_rows(config, shape(config).ranks)
    code, environment = snapshot.take(Path.cwd()), to_carry(config)
    run = run_folder(config)
    if seen:
        check_no_job(run)
    folder, name = _output_folder(config, run), "slurm-%j.out"
    output = folder / name
    chosen = sbatch_options(
        config, str(Path(str(folder).replace("%", "%%"), name)), [_finished(after, config)] if after else []
    )
    submission = secrets.token_hex(4)
    batch_file = render_batch_file(config, run.uri, submission, chosen, environment)
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
        carried = [f"environment: {environment.sentence()}"] if environment else []
        for line in (*carried, *_memory(config), *_doubts(config)):
            log(line)
        return done
    if environment:
        carry(config, environment, log)
    how = {"take_over": take_over, "group": submission, "waits": True}
    with claimed(config, by="capstan submit slurm", resume=resume, code=code, log=log, **how):
        run.put(layout.SLURM_SCRIPT, batch_file.encode())
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = _sbatch(batch_file, max(1, config.cluster.slurm.chain), clean_environment(os.environ, chosen))
    found = SubmittedJobs(jobs, submission, str(output), run.uri)
    run.put(layout.SLURM_JOB, json.dumps(asdict(found)).encode())
    return replace(done, jobs=jobs)


def _check_reward(config: Config, log: Callable[[str], None]) -> None:
    """Refuse a reward that is not found here. The job runs this Python in this folder, unless settings change that."""
    slurm = config.cluster.slurm
    try:
        check_reward(config.rollout)
    except ConfigError as error:
        if not (slurm.python or slurm.container or slurm.setup or slurm.extra):
            raise
        log(f"Attention: not known from here whether the job finds the reward: {error}")


_UNITS = {"": 2**20, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _memory(config: Config) -> Iterator[str]:
    """Yield whether the run fits into the GPUs and the nodes that the job asks for, as its plan says."""
    slurm = config.cluster.slurm
    try:
        needs = needs_of(config, None, shape(config).ranks_per_node)
    except CapstanError as error:
        yield f"memory: not known from here whether it fits: {error}"
        return
    plan, machine = needs.plan, needs.machine
    if machine.gpu is None and plan.device == "gpu":
        named = f"{slurm.gpu_type!r} is none whose memory is known" if slurm.gpu_type else "none is named"
        yield (
            f"memory: {binary(plan.memory_per_gpu.total)} on each GPU. cluster.slurm.gpu_type: {named}, so capstan plan"
            " --gpu says whether that fits"
        )
    else:
        yield f"memory: {fits_line(plan, machine.gpu, machine.whose)}"
    given, on_host = slurm.memory_per_node or "0", plan.memory_per_host.total
    asked = int(given.rstrip("KMGT")) * _UNITS[given.lstrip("0123456789")]
    if 0 < asked < on_host:
        yield (
            f"Attention: cluster.slurm.memory_per_node: {given} is less than the {binary(on_host)} that a node's ranks"
            " take beside their processes. Raise it"
        )


def _doubts(config: Config) -> Iterator[str]:
    """Yield what may be wrong with the job and shows only when its turn comes."""
    slurm = config.cluster.slurm
    if slurm.memory_per_node is None:
        yield (
            "cluster.slurm.memory_per_node is not set: the job gets the partition's default, which is often too little."
            " 0 asks for all of a node's memory"
        )
    if slurm.cpus_per_node is None and (cpus := shape(config).cpus_per_node) > 1:
        yield (
            f"the job asks for {counted(cpus, 'CPU')} on each node, as cluster.slurm.cpus_per_node is not set. Where"
            " nodes have fewer, Slurm refuses the job or never starts it; sinfo -o '%P %c' shows how many they have"
        )
    if not (slurm.python or slurm.container) and Path(sys.prefix).is_relative_to("/tmp"):
        yield (
            f"Attention: the job runs the Python of {sys.prefix}, which lies below /tmp, where other nodes do not see"
            " it. Install Capstan on a shared file system, or set cluster.slurm.python or cluster.slurm.container"
        )


def inside_a_job(config: Config) -> Config:
    """Return the run's settings with those that its job decides. Raises `ConfigError` as `shape` does."""
    job_shape, cluster = shape(config), config.cluster
    if cluster.workers is None:
        config = override(config, f"cluster.workers={job_shape.ranks}")
    if cluster.slurm.gpus_per_node and cluster.gpus_per_worker is None:
        # On a node that shows them no GPU the ranks would otherwise compute on its CPUs.
        config = override(config, "cluster.gpus_per_worker=1")
    if config.retry.preemptions is None:
        # Inside a job only a spare replaces a lost machine. Without one the driver ends, and the job is requeued.
        config = override(config, f"retry.preemptions={cluster.spares}")
    return config


def _sbatch(batch_file: str, count: int, environment: Mapping[str, str]) -> list[int]:
    jobs: list[int] = []
    for _ in range(count):
        answer = call("sbatch", "--parsable", given=batch_file, environment=environment)
        if answer.returncode:
            cancel(jobs)
            raise ConfigError(f"Slurm refuses the job: {slurm_message(answer)}")
        jobs.append(int(answer.stdout.strip().partition(";")[0]))  # "JOB" or "JOB;CLUSTER"
    return jobs


def clean_environment(environment: Mapping[str, str], options: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment that the job inherits: nothing of a job or a rank that this process itself is part of.

    An SBATCH_ variable would override the file's `#SBATCH` line, so it is removed if the file has that option.
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
    return folder.local_folder or Path.cwd()


def _finished(run: str, config: Config) -> str:
    """Return the dependency on the end of `run`."""
    folder = find_run(run, config.run.store)
    found = submitted_jobs(folder)
    if found is None:
        raise ConfigError(f"--after: {run!r} was not submitted to Slurm, so no job can wait for it.")
    return f"afterok:{found.jobs[-1]}"
