"""This process as a rank: the group in which torchrun or srun started it, by its environment, and the program."""

import os
import socket
from collections.abc import Callable, Mapping

from trainer.processes import children
from trainer.processes.devices import stay_on_cpu

RANK_NODES = "CAPSTAN_RANK_NODES"
"""The variable by which our batch file gives the nodes of a step in the order of their ranks, with commas. Slurm itself
orders them by their names."""


def imported_rank(gpus_per_worker: int | None) -> Callable[..., None]:
    """Import and return `run_rank`. The import is that of torch, which sees the devices that the run leaves it, by
    `cluster.gpus_per_worker`.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait keep cores from other ranks
    if gpus_per_worker == 0:
        stay_on_cpu()
    from trainer.rank import run_rank

    return run_rank


def is_rank() -> bool:
    """Return whether torchrun or srun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_silent_rank() -> bool:
    """Return whether another rank speaks for this process."""
    return is_rank() and os.environ["RANK"] != "0"


def group_name(environment: Mapping[str, str]) -> str | None:
    """Return names of this process's srun step and torchrun, one word each; None without either."""
    return " ".join(filter(None, (_step_name(environment), _torchrun_name(environment)))) or None


def restarted_as(environment: Mapping[str, str]) -> str | None:
    """Return the one of those names that was there before, if this group was started again; else None."""
    if int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return _torchrun_name(environment)
    return _step_name(environment) if int(environment.get("SLURM_RESTART_COUNT", 0)) else None


def _step_name(environment: Mapping[str, str]) -> str | None:
    job = environment.get("SLURM_JOB_ID")
    return f"slurm-{job}.{environment.get('SLURM_STEP_ID', 'batch')}" if job else None


def _torchrun_name(environment: Mapping[str, str]) -> str | None:
    """Name the torchrun by --rdzv-id, which all its nodes share.

    Without one it is named by the agent, which starts the ranks of its node again.
    """
    name = environment.get("TORCHELASTIC_RUN_ID")
    return f"torchrun-{socket.gethostname()}-{os.getppid()}" if name == "none" else name and f"torchrun-{name}"


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torchrun would have set, for one of several tasks of an srun step; else none."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    tasks, local_rank = int(environment["SLURM_STEP_NUM_TASKS"]), environment["SLURM_LOCALID"]
    of_node, rank = tasks // int(environment["SLURM_STEP_NUM_NODES"]), environment["SLURM_PROCID"]
    if nodes := environment.get(RANK_NODES):
        rank = str(nodes.split(",").index(environment["SLURMD_NODENAME"]) * of_node + int(local_rank))
    return {
        "RANK": rank,
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(of_node),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(environment["SLURM_STEP_NODELIST"]),
        # Every task derives the same port, and jobs that share a node derive different ones.
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }


def _first_node(nodes: str) -> str:
    """Return the first of the nodes that Slurm writes as a list such as gpu[07,11]."""
    command = ["scontrol", "show", "hostnames", nodes]
    return children.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
