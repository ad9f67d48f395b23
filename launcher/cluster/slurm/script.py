"""The batch file of a run, as text: `#SBATCH` options, the run's values as quoted shell words, then slurm/run.sh as it
is.

Nothing is interpolated into code. An option is quoted for Slurm, which splits `#SBATCH` lines itself, and a value for
bash. The user's `cluster.slurm.setup` is shell, and stands in the file as shell.
"""

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster.slurm.queue import job_name
from launcher.start.sidecars import sidecars_sentence
from trainer.config import Config
from trainer.config.objective import SERVE
from trainer.errors import ConfigError

_BODY = Path(__file__).resolve().parents[3] / "slurm" / "run.sh"


@dataclass(frozen=True)
class Shape:
    """The nodes of a job; all ranks, their nodes, and the ranks and CPUs of each. The last nodes are those of the
    servers that srun starts.
    """

    nodes: int
    ranks: int
    rank_nodes: int
    ranks_per_node: int
    cpus_per_node: int
    server_nodes: int = 0


def shape(config: Config) -> Shape:
    """The layout of the run's ranks and servers over the job's nodes.

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
    # On their own nodes where there are several; else the servers have the last GPUs of the nodes. Ray finds room for
    # them by itself.
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
    # Beside a GPU work its rank's main thread, its data, the upload of checkpoints and NCCL's threads.
    usual = 8 if slurm.gpus_per_node else 1
    each = max(config.cluster.threads_per_worker or usual, config.cluster.ray.cpus_per_worker)
    cpus = slurm.cpus_per_node or math.ceil(each * (slurm.gpus_per_node or per_node if serving else per_node))
    if cpus < per_node:
        raise ConfigError(f"cluster.slurm.cpus_per_node: {cpus} is less than the {per_node} ranks on each node.")
    return Shape(slurm.nodes, ranks, nodes, per_node, cpus, server_nodes)


def _server_nodes(config: Config) -> int:
    """The nodes that the run's servers take. Raises `ConfigError` where none has room for one."""
    serve, gpus = config.rollout.serve, config.cluster.slurm.gpus_per_node or 0
    if config.rollout.engine != SERVE:
        return 0
    if serve.gpus > gpus:
        raise ConfigError(
            f"rollout.serve.gpus: {serve.gpus} GPUs for a server are more than cluster.slurm.gpus_per_node: {gpus}."
            " Lower the one (0 serves on CPUs) or raise the other."
        )
    return math.ceil(serve.replicas / (gpus // serve.gpus)) if serve.gpus else 1


def options(config: Config, output: str, dependencies: list[str]) -> dict[str, str | None]:
    """sbatch's options by their long names; None where an option has no value.

    `output` is the job's output file, `dependencies` are terms of `--dependency`, all of which must hold.
    """
    slurm, node = config.cluster.slurm, shape(config)
    gpus = f"{slurm.gpu_type}:{slurm.gpus_per_node}" if slurm.gpu_type else slurm.gpus_per_node
    if slurm.chain:
        dependencies = [*dependencies, "singleton"]  # one at a time of the jobs of this name
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
    return {name: str(value) for name, value in found.items() if value is not None} | flags


def render(config: Config, run_uri: str, submission: str, options: dict[str, str | None]) -> str:
    """The whole batch file. `submission` tells its jobs from those of another submission of the same run."""
    slurm, node = config.cluster.slurm, shape(config)
    values = {
        "RUN_NAME": config.run.name,
        "RUN_URI": run_uri,
        "SUBMISSION": submission,
        "PYTHON": slurm.python or sys.executable,
        "CONTAINER": slurm.container,
        "LAUNCH": slurm.launch,
        "RANK_NODES": node.rank_nodes,
        "RANKS_PER_NODE": node.ranks_per_node,
        "CPUS_PER_NODE": node.cpus_per_node,
        "RAY_CPUS": math.ceil(node.ranks_per_node * config.cluster.ray.cpus_per_worker),
        "LOCAL_DIR": slurm.local_dir,
    }
    if node.server_nodes and slurm.launch == "direct":
        values |= {"SERVERS": config.rollout.serve.replicas, "SERVER_NODES": node.server_nodes}
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
    """`value` as one word of an `#SBATCH` line: quotes group, a backslash takes the next character as it is.

    Source: `_get_argument` of src/sbatch/opt.c in Slurm. Raises `ConfigError` for what one line cannot hold.
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
