"""A real Slurm cluster on this machine: a login machine and compute nodes, each in namespaces of its own.

A node has its own network, processes, host name, shared memory and local disk (/mnt), and runs its own slurmd; all see
this machine's files, as on a cluster's shared file system. The nodes' namespaces lie inside the login machine's, so the
network exists nowhere else, clusters beside each other cannot meet, and when the login machine's init dies the kernel
ends every process and removes every device: that happens at the latest when this process dies.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NETWORK = "198.18.0"  # for tests of networks (RFC 2544); inside the namespaces only
LOGIN = "login"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setpriv", "nsenter", "ip")
_OF_SLURM = {"slurmd", "slurmstepd"}
# Each look is a process of Slurm's or reads a run's records, which jobs wait for that share its processor.
_LOOK_SECONDS = 0.5


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    lacking = ["root"] if os.geteuid() != 0 else []
    lacking += [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"a virtual Slurm cluster needs {', '.join(lacking)} (.ci/run installs the programs)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "true"], capture_output=True)
    if probe.returncode:
        return f"this machine refuses namespaces: {probe.stderr.decode().strip()}"
    return None


class Cluster:
    """`nodes` machines n1, n2, ... with `gpus` GPUs each; leaving the context ends all of it."""

    def __init__(self, folder: Path, nodes: int = 3, gpus: int = 4) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._gpus = gpus
        self._inits: dict[str, int] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._write_configuration()
            self._boot_login()
            for node in self.nodes:
                self.boot(node)
            self.wait_until(lambda: self.states() == dict.fromkeys(self.nodes, "IDLE"), 30, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if LOGIN in self._inits:
            os.kill(self._inits[LOGIN], 9)
        for process in self._started:
            # It ends after its init, which the kernel ends after everything else in its namespace.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30 if LOGIN in self._inits else 0)
            process.kill()
            process.wait()

    # --- commands

    def run(self, *command: str | Path, on: str = LOGIN, timeout: float = 60, **options: Any) -> str:
        """The output of a command that has to succeed on a machine of the cluster."""
        done = self.attempt(*command, on=on, timeout=timeout, **options)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self,
        *command: str | Path,
        on: str = LOGIN,
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """A command on a machine of the cluster, to its end."""
        full = [*self._inside(on), *map(str, command)]
        given = {**os.environ, **(environment or {}), **self.environment}
        return subprocess.run(full, capture_output=True, text=True, timeout=timeout, env=given, **options)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def init(self, machine: str) -> int:
        """The process whose namespaces are the machine."""
        return self._inits[machine]

    def _inside(self, machine: str) -> Sequence[str]:
        return ["nsenter", "--target", str(self._inits[machine]), "--net", "--mount", "--uts", "--ipc", "--pid", "--"]

    # --- what Slurm says

    def states(self) -> dict[str, str]:
        """The state of each node, such as IDLE, ALLOCATED or DOWN; flags such as NOT_RESPONDING are appended with +."""
        answer = self.attempt("scontrol", "show", "nodes", "--json")
        nodes = json.loads(answer.stdout)["nodes"] if answer.returncode == 0 else []
        return {node["name"]: "+".join(node["state"]) for node in nodes}

    def job(self, number: int) -> dict[str, Any]:
        return json.loads(self.run("scontrol", "show", "job", str(number), "--json"))["jobs"][0]

    def wait_until(self, condition: Callable[[], Any], timeout: float, what: str) -> None:
        """Return once `condition` holds. A time-out fails and shows the controller's log."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                log = (self.folder / "log/slurmctld.log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"not within {timeout:.0f} s: {what}\n{self.attempt('squeue').stdout}\n{log}")
            time.sleep(_LOOK_SECONDS)

    # --- the machines

    def boot(self, node: str) -> None:
        """Start a node, whose cable is then plugged into the switch."""
        number = self.nodes.index(node) + 1
        up = self.folder / f"run/{node}.up"
        up.unlink(missing_ok=True)
        arguments = ["bash", str(HERE / "node.sh"), str(self.folder), node, f"{NETWORK}.{10 + number}/24"]
        outside = [*self._inside(LOGIN), *_UNSHARE]
        self._inits[node] = self._start_init([*outside, *arguments], node, up)
        pid = str(self._inits[node])
        link = ["ip", "link", "add", node, "master", "br0", "type", "veth", "peer", "name", "eth0", "netns", pid]
        inside = ["nsenter", "--target", str(self._inits[LOGIN]), "--net"]
        # The kernel removes the cable of a node that was powered off a while after the node.
        subprocess.run([*inside, "ip", "link", "delete", node], check=False, capture_output=True, timeout=10)
        subprocess.run([*inside, *link], check=True, timeout=10)
        subprocess.run([*inside, "ip", "link", "set", node, "up"], check=True, timeout=10)

    def power_off(self, node: str) -> None:
        """As if the plug were pulled: everything on the node is gone at once and nobody is told."""
        os.kill(self._inits.pop(node), 9)

    def off(self) -> list[str]:
        """The nodes that are powered off."""
        return [node for node in self.nodes if node not in self._inits]

    def processes(self, node: str) -> dict[int, str]:
        """The processes on a node beside Slurm and the node's init: host pid -> command line."""
        init = self._inits[node]
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        found = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
            with suppress(OSError):  # it ended while we looked
                if pid == init or os.readlink(f"/proc/{pid}/ns/pid") != namespace:
                    continue
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and Path(f"/proc/{pid}/comm").read_text().strip() not in _OF_SLURM:
                    found[pid] = command.strip()
        return found

    def received_bytes(self, node: str) -> int:
        """Bytes that came in over the node's network interface since it booted."""
        link = json.loads(self.run("ip", "-json", "-statistics", "link", "show", "eth0", on=node))
        return link[0]["stats64"]["rx"]["bytes"]

    def limit(self, node: str, rate: str | None) -> None:
        """Limit what the node sends and receives to `rate`, such as 1gbit; None lifts it."""
        for machine, device in ((node, "eth0"), (LOGIN, node)):
            self.attempt("tc", "qdisc", "del", "dev", device, "root", on=machine)
            if rate:
                shape = ["tbf", "rate", rate, "burst", "1mb", "latency", "200ms"]
                self.run("tc", "qdisc", "add", "dev", device, "root", *shape, on=machine)

    # --- starting

    def _boot_login(self) -> None:
        arguments = ["bash", str(HERE / "login.sh"), str(self.folder), f"{NETWORK}.1/24"]
        command = [*_UNSHARE, *arguments]
        self._inits[LOGIN] = self._start_init(command, LOGIN, self.folder / "run/login.up")

    def _start_init(self, command: Sequence[str], machine: str, up: Path) -> int:
        """Start a machine; returns its init's pid once the init has written `up`."""
        with (self.folder / f"log/{machine}.out").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_CLEAN, **self.environment},
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + 15
        while not up.exists():
            output = self.folder / f"log/{machine}.out"
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.02)
        return _innermost_child(process.pid)

    def _write_configuration(self) -> None:
        for name in ("etc", "state", "spool", "log", "run", "dev"):
            (self.folder / name).mkdir(parents=True)
        subprocess.run(["mungekey", "--create", "--keyfile", self.folder / "etc/munge.key"], check=True, timeout=30)
        for number in range(self._gpus):  # Slurm wants a device file of each GPU; nobody opens these
            os.mknod(self.folder / f"dev/gpu{number}", 0o20666, os.makedev(195, number))
        addresses = {node: f"{NETWORK}.{10 + number}" for number, node in enumerate(self.nodes, 1)}
        hosts = {"localhost": "127.0.0.1", LOGIN: f"{NETWORK}.1", **addresses}
        files = {
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
            "cgroup.conf": "CgroupPlugin=disabled\n",
            "gres.conf": (
                f"AutoDetect=off\nNodeName=n[1-{len(self.nodes)}] Name=gpu"
                f" File={self.folder}/dev/gpu[0-{self._gpus - 1}]\n"
            ),
            "slurm.conf": (
                (HERE / "slurm.conf")
                .read_text()
                .format(folder=self.folder, nodes=len(self.nodes), gpus=self._gpus, login=LOGIN, network=NETWORK)
            ),
        }
        for name, text in files.items():
            (self.folder / "etc" / name).write_text(text)


_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def _innermost_child(pid: int) -> int:
    """The pid, as seen from here, of the last of a chain of processes that each wait for one child."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{pid}/comm").read_text().strip() == "bash":
            break
        pid = int(children[0])
    return pid
