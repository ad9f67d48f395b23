"""The group of ranks that torchrun or srun has started this process in, by its environment."""

import os
import subprocess
from collections.abc import Mapping


def is_rank() -> bool:
    """Whether torchrun or srun made this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_silent_rank() -> bool:
    """Whether another rank speaks for this process."""
    return is_rank() and os.environ["RANK"] != "0"


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, for a task of an srun step with several tasks; empty elsewhere."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.split()
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // len(nodes)),
        "MASTER_ADDR": nodes[0],
        # Every task derives the same port, and jobs that share a node derive different ones.
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }
