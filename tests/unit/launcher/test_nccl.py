"""NCCL's choice of interfaces and adapters by its own rules, and what of it cannot work between machines."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_PACKET
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.doctor.doctor import check_network
from launcher.doctor.nccl import Network, _address, networks, ports, sockets, this_machine, troubles

MACHINE = ["lo", "docker0", "eno1", "eno2np0", "ib0"]


@pytest.mark.parametrize(
    ("setting", "interfaces", "taken"),
    [
        (None, MACHINE, ["ib0"]),
        (None, ["lo", "docker0", "eno1", "enp3"], ["eno1", "enp3"]),
        (None, ["lo", "docker0"], ["docker0"]),
        (None, ["lo"], ["lo"]),
        ("eno", MACHINE, ["eno1", "eno2np0"]),
        ("=eno1,ib0", MACHINE, ["eno1", "ib0"]),
        ("=eno", MACHINE, []),
        ("^eno,docker", MACHINE, ["lo", "ib0"]),
        ("^=eno1,lo", MACHINE, ["docker0", "eno2np0", "ib0"]),
        ("eth0", MACHINE, []),
    ],
)
def test_interfaces_are_taken_as_nccls_manual_has_it(
    setting: str | None, interfaces: list[str], taken: list[str]
) -> None:
    assert sockets(interfaces, {} if setting is None else {"NCCL_SOCKET_IFNAME": setting}) == taken


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """The kernel's folder of a machine with three adapters, one of which has a second port, without a cable."""
    for name, port, state in (
        ("mlx5_0", 1, "4: ACTIVE"),
        ("mlx5_0", 2, "1: DOWN"),
        ("mlx5_1", 1, "4: ACTIVE"),
        ("mlx5_10", 1, "4: ACTIVE"),
    ):
        folder = tmp_path / name / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "active", "idle"),
    [
        ({}, ["mlx5_0:1", "mlx5_1:1", "mlx5_10:1"], ["mlx5_0:2"]),
        ({"NCCL_IB_HCA": "mlx5_1"}, ["mlx5_1:1", "mlx5_10:1"], []),
        ({"NCCL_IB_HCA": "=mlx5_1:1,mlx5_0:2"}, ["mlx5_1:1"], ["mlx5_0:2"]),
        ({"NCCL_IB_HCA": "^mlx5_1"}, ["mlx5_0:1"], ["mlx5_0:2"]),
        ({"NCCL_IB_DISABLE": "1"}, [], []),
        ({"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": ""}, ["mlx5_0:1", "mlx5_1:1", "mlx5_10:1"], ["mlx5_0:2"]),
        ({"NCCL_IB_DISABLE": "", "NCCL_IB_HCA": "=mlx5_1"}, ["mlx5_1:1"], []),
    ],
)
def test_adapters_are_taken_as_nccls_manual_has_it(
    adapters: Path, environment: dict[str, str], active: list[str], idle: list[str]
) -> None:
    assert ports(adapters, environment) == (active, idle)


def test_an_interface_has_its_address_of_ipv4_or_else_that_of_ipv6() -> None:
    known: Any = [
        SimpleNamespace(family=family, address=address)
        for family, address in ((AF_PACKET, "0a:1b"), (AF_INET6, "fd00::1"), (AF_INET, "10.0.0.1"))
    ]
    assert [_address(known[:count]) for count in (3, 2, 1, 0)] == ["10.0.0.1", "fd00::1", None, None]


def test_an_interface_that_is_down_or_has_no_address_carries_nothing(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = {"lo": True, "ib0": False, "eth0": True, "ib1": True}
    known = {name: [SimpleNamespace(family=AF_INET, address=f"10.0.0.{at}")] for at, name in enumerate(up) if at < 3}
    monkeypatch.setattr(
        "psutil.net_if_stats", lambda: {name: SimpleNamespace(isup=is_up) for name, is_up in up.items()}
    )
    monkeypatch.setattr("psutil.net_if_addrs", lambda: known)
    network = this_machine({"NCCL_IB_HCA": "=mlx5_0"}, adapters)
    assert network.interfaces == {"lo": "10.0.0.0", "eth0": "10.0.0.2"}
    assert (network.sockets, network.adapters, network.idle) == (["eth0"], ["mlx5_0:1"], ["mlx5_0:2"])
    assert network.transport == "InfiniBand or RoCE over mlx5_0:1, begun over eth0 10.0.0.2"


def machine(host: str, interface: str = "ib0", adapters: tuple[str, ...] = ("mlx5_0:1",)) -> Network:
    return Network(host, {interface: "10.0.0.1"}, [interface], list(adapters), [])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([machine("n1"), machine("n2", "eth0")], []),
        ([machine("n1", "lo")], []),  # alone it reaches itself
        ([machine("n1"), machine("n2", "docker0")], ["n2 opens sockets on docker0, where no other machine reaches it"]),
        ([machine("n1"), machine("n2", adapters=())], ["n2 has no active InfiniBand port, the other nodes have"]),
        ([machine("n1", adapters=()), machine("n2", adapters=())], []),
        (
            [Network("n1", {"eth0": ""}, [], [], [])],
            ["NCCL_SOCKET_IFNAME=ib1 names no interface of n1, which has eth0"],
        ),
    ],
)
def test_what_cannot_work_is_said_of_its_machine(found: list[Network], words: list[str]) -> None:
    said = list(troubles(found, {"NCCL_SOCKET_IFNAME": "ib1"}))
    assert len(said) == len(words)
    for (trouble, remedy), word in zip(said, words, strict=True):
        assert word in trouble
        assert "cluster.nccl: {" in remedy


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that stands for Slurm's: what it prints, and how it ends, are the test's."""
    command = tmp_path / "srun"
    command.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return command


def test_every_node_of_an_allocation_tells_its_network(srun: Path, tmp_path: Path) -> None:
    lines = "".join(f"{json.dumps(asdict(machine(host)))}\n" for host in ("n2", "n1"))
    (tmp_path / "lines").write_text(lines)
    srun.write_text(f'#!/bin/sh\necho "$NCCL_SOCKET_IFNAME $*" > {tmp_path}/asked\nexec cat {tmp_path}/lines\n')
    found = networks({**os.environ, "SLURM_JOB_NUM_NODES": "2", "NCCL_SOCKET_IFNAME": "ib7"})
    assert found == [machine("n1"), machine("n2")]
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in (tmp_path / "asked").read_text()
    assert (tmp_path / "asked").read_text().startswith("ib7 ")
    assert (tmp_path / "asked").read_text().endswith("-m launcher.doctor.nccl\n")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo one >&2; echo 'srun: error: no node' >&2; exit 1", "srun: error: no node"),
        ("exit 3", "srun ended with exit code 3"),
    ],
)
def test_nodes_that_cannot_be_asked_say_why(srun: Path, script: str, said: str) -> None:
    srun.write_text(f"#!/bin/sh\n{script}\n")
    environment = {**os.environ, "SLURM_JOB_NUM_NODES": "2"}
    assert networks(environment) == said
    (check,) = check_network(environment)
    assert (check.state, check.found) == ("missing", said)


def test_the_doctor_tells_this_machines_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    network = this_machine({}, Path("/nowhere"))
    (check,) = check_network({"NCCL_IB_DISABLE": "1"})
    assert (check.state, check.found) == ("ok", f"{network.host}: {network.transport}")
    assert network.sockets[0] in check.found
    (check,) = check_network({"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "nope"})
    assert (check.state, "nope names no interface" in check.found) == ("missing", True)
