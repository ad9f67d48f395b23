"""Devices of ranks: a GPU each, or the CPU if that is meant or all there is. Without torch, which only ranks import."""

import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ConfigError

_DRIVER_SECONDS = 30


class LocalGpu(NamedTuple):
    """A GPU of this machine: its name and its bytes of memory."""

    name: str
    memory: int


def described_gpus(environment: Mapping[str, str] = os.environ) -> list[LocalGpu]:
    """The GPUs of this machine that a process may use, by NVIDIA's driver; none where there is no driver."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if told.returncode != 0 or _hides_all(environment):
        return []
    rows = [line.rpartition(",") for line in told.stdout.splitlines()]
    found = [
        LocalGpu(name.strip(), int(size) * 2**20) for name, _, size in rows if size.strip().isdigit()
    ]  # a size may be "[N/A]"
    numbers = [int(part) for part in (shown or "").split(",") if part.strip().isdigit()]
    return [found[number] for number in numbers if number < len(found)] if numbers else found


def local_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs of this machine as NVIDIA's driver tells; 0 where CUDA_VISIBLE_DEVICES hides them all."""
    if _hides_all(environment):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=_DRIVER_SECONDS)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        pass
    return sum(_opens(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def _hides_all(environment: Mapping[str, str]) -> bool:
    return environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")


def _opens(path: Path) -> bool:
    """A container or a job's cgroup may show devices that it does not hand out."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def check_device(gpus_per_worker: int | None, torch_gpus: int, torch_build: str | None) -> None:
    """Nobody finds out after a day that a run is on the CPU.

    Args:
        gpus_per_worker: the setting `cluster.gpus_per_worker`.
        torch_gpus: GPUs that torch sees in this environment.
        torch_build: the CUDA or ROCm version that torch was built for; None for a CPU build.

    Raises:
        ConfigError: the ranks would compute on the CPU here, though the setting or the machine says otherwise.
    """
    if gpus_per_worker == 0 or torch_gpus:
        return
    there, machine = local_gpus(), socket.gethostname()
    if there:
        why, remedy = "is a CPU build", "Install one for CUDA (https://pytorch.org/get-started/locally)"
        if torch_build is not None:
            why, remedy = f"(built for {torch_build}) finds none", "Compare its version with the driver's (nvidia-smi)"
        raise ConfigError(
            f"cluster.gpus_per_worker: {machine} has {there} GPUs, but this torch {why}. {remedy}, or set it to 0 to compute "
            "on the CPU."
        )
    if gpus_per_worker:
        raise ConfigError(
            f"cluster.gpus_per_worker: {gpus_per_worker}, but {machine} shows no GPU to this process. Start where there is one, "
            "or set it to 0 to compute on the CPU."
        )


def stay_on_cpu() -> None:
    """Hide the GPUs of this machine from torch and DeepSpeed, which must not have been imported yet."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
