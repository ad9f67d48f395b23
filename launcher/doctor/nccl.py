"""The network that NCCL takes between machines: its own rules, applied to what each machine has.

    python -m launcher.doctor.nccl    this machine's network as a line of JSON, as `srun` asks every node of a job

Sources: `ncclFindInterfaces` in src/misc/socket.cc and `ncclIbInit` in src/transport/net_ib.cc of NCCL, and
"Environment Variables" in its manual.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from trainer.processes import children

_ADAPTERS = Path("/sys/class/infiniband")
# Without NCCL_SOCKET_IFNAME the first of these that names an interface decides.
_DEFAULTS = ("ib", "^docker,lo,virbr", "docker", "lo", "virbr")
_STEP_SECONDS = 90


@dataclass(frozen=True)
class Network:
    """The interfaces and adapters that NCCL takes on one machine.

    `interfaces` have addresses. `sockets` are those on which it opens sockets. `adapters` are active ports of
    InfiniBand or RoCE as NAME:PORT; `idle` are such ports that no cable or subnet manager has made active.
    """

    host: str
    interfaces: dict[str, str]
    sockets: list[str]
    adapters: list[str]
    idle: list[str]

    @property
    def transport(self) -> str:
        """Say for people what carries the traffic of this machine."""
        over = ", ".join(f"{name} {self.interfaces[name]}" for name in self.sockets)
        return (
            f"InfiniBand or RoCE over {', '.join(self.adapters)}, begun over {over}"
            if self.adapters
            else f"sockets over {over}"
        )


def this_machine(environment: Mapping[str, str], adapters: Path = _ADAPTERS) -> Network:
    """Return the network of this machine, with NCCL's variables as in `environment`."""
    addresses = psutil.net_if_addrs()
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    interfaces = {name: address for name in up if (address := _address(addresses.get(name, [])))}
    active, idle = ports(adapters, environment)
    return Network(socket.gethostname(), interfaces, sockets(list(interfaces), environment), active, idle)


def _address(known: Sequence[object]) -> str | None:
    found = {getattr(one, "family", None): getattr(one, "address", None) for one in known}
    return found.get(socket.AF_INET) or found.get(socket.AF_INET6)


def sockets(interfaces: list[str], environment: Mapping[str, str]) -> list[str]:
    """Return the interfaces that NCCL opens sockets on.

    There are none if NCCL_SOCKET_IFNAME names none of them; NCCL then fails.
    """
    asked = environment.get("NCCL_SOCKET_IFNAME")
    for rule in [asked] if asked else _DEFAULTS:
        if found := [name for name in interfaces if names(rule, name)]:
            return found
    return []


def ports(adapters: Path, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the active ports of InfiniBand and RoCE that NCCL uses, and inactive ones that it would use."""
    active, idle = list[str](), list[str]()
    if environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return active, idle
    for state in sorted(adapters.glob("*/ports/*/state")):
        adapter, port = state.parts[-4], state.parts[-2]
        rule = environment.get("NCCL_IB_HCA")
        if not rule or names(rule, adapter, port):
            (active if "ACTIVE" in state.read_text() else idle).append(f"{adapter}:{port}")
    return active, idle


def names(rule: str, name: str, port: str | None = None) -> bool:
    """Return whether a list of NCCL's names this one.

    The list has beginnings of names, or after "=" whole names, each perhaps with :PORT. After "^" it means all others.
    """
    excludes, rule = rule.startswith("^"), rule.removeprefix("^")
    whole, rule = rule.startswith("="), rule.removeprefix("=")
    for word in rule.split(","):
        wanted, _, of_port = word.partition(":")
        if (name == wanted if whole else name.startswith(wanted)) and of_port in ("", port):
            return not excludes
    return excludes


def networks(environment: Mapping[str, str]) -> list[Network] | str:
    """Return the network of every node of this process's allocation, or of this machine alone.

    A node that cannot tell has the reason instead.
    """
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if nodes == 1:
        return [this_machine(environment)]
    step = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    try:
        answer = children.run(
            [*step, sys.executable, "-m", "launcher.doctor.nccl"],
            capture_output=True,
            text=True,
            env=dict(environment),
            timeout=_STEP_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the {nodes} nodes of the allocation could not be asked: {error}"
    if answer.returncode:
        return (answer.stderr.strip().splitlines() or [f"srun ended with exit code {answer.returncode}"])[-1]
    return sorted(
        (Network(**json.loads(line)) for line in answer.stdout.splitlines()), key=lambda network: network.host
    )


def troubles(found: list[Network], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the reasons why NCCL cannot work between these machines, each with what to do about it."""
    for network in found:
        if not network.sockets:
            asked, there = environment.get("NCCL_SOCKET_IFNAME"), ", ".join(network.interfaces)
            yield f"NCCL_SOCKET_IFNAME={asked} names no interface of {network.host}, which has {there}", _SAY_INTERFACE
        elif len(found) > 1 and network.sockets[0].startswith(("lo", "docker", "virbr")):
            yield (
                f"{network.host} opens sockets on {network.sockets[0]}, where no other machine reaches it",
                _SAY_INTERFACE,
            )
    without = [network.host for network in found if not network.adapters]
    if without and len(without) < len(found):
        yield (
            f"{', '.join(without)} has no active InfiniBand port, the other nodes have: NCCL does not mix them",
            "Leave such nodes out (cluster.slurm.exclude), or set cluster.nccl: {NCCL_IB_DISABLE: 1}.",
        )


_SAY_INTERFACE = "Set cluster.nccl: {NCCL_SOCKET_IFNAME: name}, or several names with commas."


if __name__ == "__main__":
    print(json.dumps(asdict(this_machine(os.environ))))
