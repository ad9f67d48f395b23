"""Devices of ranks: one GPU each, or the CPU if that is meant or there is no GPU. Without torch, which only ranks
import. Also the host's memory beside them: what is left of it, and how much a pinned block takes.
"""

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ConfigError, counted
from trainer.processes import children

_DRIVER_SECONDS = 30
_CGROUPS = Path("/sys/fs/cgroup")
# Controllers of a line of /proc/self/cgroup -> the folder below, and the files of a group's limit and use.
_MEMORY_FILES = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@dataclass(frozen=True)
class ListedGpu:
    """A GPU of this machine, by its UUID, and the UUIDs of its MIG instances. The UUID is empty if only its device file
    shows the GPU.
    """

    uuid: str = ""
    instances: list[str] = field(default_factory=list)


def local_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The GPUs of this machine on which a process computes: those of NVIDIA's driver that CUDA_VISIBLE_DEVICES
    shows.
    """
    return count_visible(listed_gpus(), environment.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus() -> list[str]:
    """The words with which CUDA_VISIBLE_DEVICES shows each of these GPUs to a process."""
    count, setting = local_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (list(map(str, range(count))) if setting is None else [word.strip() for word in setting.split(",")])[:count]


def listed_gpus() -> list[ListedGpu]:
    """All GPUs of this machine in the driver's order, regardless of CUDA_VISIBLE_DEVICES."""
    listing = _told_by_driver("--list-gpus")
    if listing is None:
        return [ListedGpu() for path in Path("/dev").glob("nvidia[0-9]*") if _opens(path)]
    found = list[ListedGpu]()
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: (\S+)\)", listing, re.MULTILINE):
        if kind == "GPU":
            found.append(ListedGpu(uuid))
        else:
            found[-1].instances.append(uuid)
    return found


def count_visible(gpus: list[ListedGpu], setting: str | None) -> int:
    """The number of devices that CUDA shows a process whose CUDA_VISIBLE_DEVICES is `setting`.

    The list ends at its first word that names no device, and a word that comes twice empties it (torch's
    `_parse_visible_devices`). A process that sees a MIG instance gets this one alone ("CUDA Device Enumeration" in
    NVIDIA's MIG user guide).
    """
    chosen = list(_chosen(gpus, setting))
    if any(instance or gpu.instances for gpu, instance in chosen):
        return 1
    return len(chosen)


def _chosen(gpus: list[ListedGpu], setting: str | None) -> Iterator[tuple[ListedGpu, str | None]]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or all if it is not set; each with the MIG instance that is meant."""
    if setting is None:
        yield from ((gpu, None) for gpu in gpus)
        return
    words = [word.strip() for word in setting.split(",")]
    if len(set(words)) < len(words):
        return
    every = [(gpu, None) for gpu in gpus] + [(gpu, instance) for gpu in gpus for instance in gpu.instances]
    for word in words:
        if word.isdecimal():
            found = every[int(word) : int(word) + 1] if int(word) < len(gpus) else []
        elif word.startswith(("GPU-", "MIG-")):
            # Device files have no UUIDs, so such a word counts as one of theirs. No GPU is overlooked then.
            found = [one for one in every if (one[1] or one[0].uuid or word).startswith(word)]
        else:
            found = []
        if not found:
            return
        yield found[0]


class LocalGpu(NamedTuple):
    """A GPU of this machine: its name, and its bytes of memory."""

    name: str
    memory: int


def described_gpus() -> list[LocalGpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES shows a process, as NVIDIA's driver describes them. Empty without the driver,
    and without parts of a GPU.
    """
    told = _told_by_driver("--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits") or ""
    # A size may be "[N/A]". A name has no comma.
    rows = [row for line in told.splitlines() if len(row := line.split(", ")) == 3]
    described = {uuid: LocalGpu(name, int(size) * 2**20) for uuid, name, size in rows if size.isdecimal()}
    visible = _chosen([ListedGpu(uuid) for uuid, _, _ in rows], os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [described[gpu.uuid] for gpu, _ in visible if gpu.uuid in described]


def visible_capabilities(environment: Mapping[str, str] = os.environ) -> list[float]:
    """The compute capabilities of the GPUs that CUDA_VISIBLE_DEVICES shows a process. Empty if the driver does not tell
    them.
    """
    told = _told_by_driver("--query-gpu=uuid,compute_cap", "--format=csv,noheader") or ""
    rows = [row for line in told.splitlines() if len(row := line.split(", ")) == 2]
    known = {uuid: float(text) for uuid, text in rows if re.fullmatch(r"\d+\.\d+", text)}
    visible = _chosen([ListedGpu(uuid) for uuid, _ in rows], environment.get("CUDA_VISIBLE_DEVICES"))
    return [known[gpu.uuid] for gpu, _ in visible if gpu.uuid in known]


def _told_by_driver(*question: str) -> str | None:
    """The answer of nvidia-smi; None if it does not exist, fails, or does not answer."""
    try:
        told = children.run(["nvidia-smi", *question], capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if told.returncode else told.stdout


def _opens(path: Path) -> bool:
    """Whether a device file can be opened. A container or a job's cgroup may show devices that it does not hand out."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def check_device(gpus_per_worker: int | None, torch_gpus: int, torch_build: str | None) -> None:
    """Make sure that the ranks do not compute on the CPU by mistake, which would otherwise be noticed after a day.

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
        why, remedy = unused(torch_build)
        raise ConfigError(
            f"cluster.gpus_per_worker: {machine} has {counted(there, 'GPU')}, but this torch {why}. {remedy}, or "
            "set it to 0 to compute on the CPU."
        )
    if gpus_per_worker:
        raise ConfigError(
            f"cluster.gpus_per_worker: {gpus_per_worker}, but {machine} shows no GPU to this process. Start where there"
            " is one, or set it to 0 to compute on the CPU."
        )


def unused(torch_build: str | None) -> tuple[str, str]:
    """Why torch sees none of the existing GPUs, and what to do about it."""
    if torch_build is None:
        return "is a CPU build", "Install one for CUDA (https://pytorch.org/get-started/locally)"
    return f"(built for {torch_build}) finds none", "Compare its version with the driver's (nvidia-smi)"


def host_memory_left() -> int:
    """Bytes of this machine's memory that are free or in caches that Linux would give up, but at most what the
    process's control groups, such as those of a container or a job, have left.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return min([1024 * int(fields["MemAvailable"].split()[0]), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes left below the limits of the process's control group and of its parents, in version 2 or version 1 of
    cgroups.
    """
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _MEMORY_FILES:
            continue
        folder, limit, used = _MEMORY_FILES[controllers]
        group = _CGROUPS / folder / path.lstrip("/")
        for around in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" is no limit, and the root of version 2 has none
                counts = dict(line.split() for line in (around / "memory.stat").read_text().splitlines())
                cached = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))  # by version 1, or 2
                yield int((around / limit).read_text()) - int((around / used).read_text()) + cached


def stay_on_cpu() -> None:
    """Hide the GPUs of this machine from torch and DeepSpeed, which must not be imported yet."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


_ALIGNED = 64  # bytes; any type of values may begin there


def pinned_bytes(size: int) -> int:
    """Bytes of a block of pinned memory of this size. PyTorch rounds each up to a power of two
    (ATen/core/CachingHostAllocator.h).
    """
    return 2 ** (size - 1).bit_length() if size else 0


def place_bytes(size: int) -> int:
    """Bytes of a place for a tensor of this size among others in one block."""
    return -(-size // _ALIGNED) * _ALIGNED


def places_in_blocks(size: int, count: int) -> list[int]:
    """The numbers of places in each block, for `count` places of this size such that rounding takes the least
    memory.
    """
    ways = ([each] * (count // each) + [count % each] * bool(count % each) for each in range(1, count + 1))
    return min(ways, key=lambda way: sum(pinned_bytes(places * size) for places in way), default=[])


_MOST_READERS = 16


def picture_readers(cores: int, ranks: int) -> int:
    """Return how many processes read pictures for each of the `ranks` of a machine, which itself takes a core."""
    return min(_MOST_READERS, max(0, cores // ranks - 1))
