"""Lines that only those who know a secret can write, and the address by which other machines reach this one."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.processes import between_machines
from trainer.processes.between_machines import own_address, sign, verified


def test_a_line_is_read_with_the_secret_alone() -> None:
    line = sign(b"secret", {"told": [1, "ä"]})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert verified(b"secret", line) == {"told": [1, "ä"]}
    assert verified(b"other", line) is None
    assert verified(b"secret", line.replace(b"1", b"2")) is None
    assert verified(b"secret", b"") is None


class _Routes:
    """The addresses by which this machine reaches others: `routes`, or none."""

    routes: dict[str, str]

    def __init__(self, kind: int, protocol: int) -> None:
        assert protocol == socket.SOCK_DGRAM
        self._to = ""

    def __enter__(self) -> "_Routes":
        return self

    def __exit__(self, *error: object) -> None: ...

    def connect(self, place: tuple[str, int]) -> None:
        if place[0] not in self.routes:
            raise OSError("no route")
        self._to = place[0]

    def getsockname(self) -> tuple[str, int]:
        return self.routes[self._to], 0


@pytest.mark.parametrize(
    ("first", "routes", "found"),
    [
        ("10.0.0.1", {"10.0.0.1": "10.0.0.2", "198.51.100.1": "192.0.2.9"}, "10.0.0.2"),
        ("node0", {"127.0.1.1": "127.0.0.1", "198.51.100.1": "192.0.2.9"}, "192.0.2.9"),
        ("node0", {"127.0.1.1": "127.0.0.1"}, "node0"),
        ("127.0.0.1", {"127.0.0.1": "127.0.0.1", "198.51.100.1": "192.0.2.9"}, "127.0.0.1"),
        ("fe80::1", {"fe80::1": "fe80::2%eth0", "198.51.100.1": "192.0.2.9"}, "fe80::2%eth0"),
    ],
)
def test_the_own_address_is_one_by_which_other_machines_come(
    first: str, routes: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(target: str, port: int, *_: Any) -> list[Any]:
        return [(socket.AF_INET, 0, 0, "", ("127.0.1.1" if target == "node0" else target, port))]

    routed = type("Routed", (_Routes,), {"routes": routes})
    replaced = SimpleNamespace(getaddrinfo=lookup, socket=routed, SOCK_DGRAM=socket.SOCK_DGRAM)
    monkeypatch.setattr(between_machines, "socket", replaced)
    assert own_address(first) == found
