"""Ranks that are started come together, or say who is missing, long before a collective's time limit."""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import ClassVar

import pytest

from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config
from trainer.errors import CapstanError
from trainer.processes import ranks
from trainer.processes.ranks import join


def test_ranks_that_all_come_are_together() -> None:
    assert launch(3, runs.meet, 30, []) == ["3 together"] * 3


def test_a_rank_that_never_comes_is_named_within_the_limit() -> None:
    said = launch(3, runs.meet, 2, [1])
    expected = "2 of 3 ranks came together within 2 s (timeouts.meet); missing: 1."
    assert [text.startswith(expected) for text in said] == [True, False, True]


def test_where_rank_0_never_comes_the_others_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    began = time.monotonic()
    with pytest.raises(CapstanError, match="rank 1 cannot reach rank 0 at 127.0.0.1:.* within 2 s \\(timeouts.meet\\)"):
        join(meeting=timedelta(seconds=2))
    assert time.monotonic() - began < 120


def test_a_rank_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(ranks, "_ATTEMPT", timedelta(seconds=0.2))
    for rank, said in (
        (0, r"1 of 2 ranks came together within \d s; missing: 1\."),
        (1, r"rank 1 cannot reach rank 0 at .* it did not come within \d s"),
    ):
        given = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(CapstanError, match=said):
            join(meeting=timedelta(seconds=60), is_gone=lambda other, rank=rank: other != rank)


class Counted(ranks.PrefixStore):
    """The store of a meeting, which counts what it is asked."""

    asked: ClassVar[Counter[str]] = Counter()

    def set(self, key: str, value: str) -> None:
        self.asked["set"] += 1
        super().set(key, value)

    def add(self, key: str, value: int) -> int:
        self.asked["add"] += 1
        return super().add(key, value)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.asked["wait"] += len(keys)
        super().wait(keys, timeout)

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return super().get(key)

    def check(self, keys: list[str]) -> bool:
        self.asked["check"] += len(keys)
        return super().check(keys)

    def list_keys(self) -> list[str]:
        self.asked["list_keys"] += 1
        return super().list_keys()


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function by which so many ranks meet, threads of this process, eight on each node: what became of each. Those of
    `late` come only after two looks of the others, or never."""
    monkeypatch.setattr(ranks, "_ATTEMPT", timedelta(seconds=0.5))
    monkeypatch.setattr(ranks, "_PATIENT_ATTEMPT", timedelta(seconds=3))
    monkeypatch.setattr(ranks, "PrefixStore", Counted)
    Counted.asked.clear()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    kept = list[object]()  # the server lives until all are through

    def meet(size: int, late: int, *, comes: bool, gone: bool = False) -> list[str]:
        looks = threading.Event()

        def is_gone(rank: int) -> bool:
            looks.set()
            return gone and rank == late and Counted.asked["add"] == size - 1  # all others are there

        def one(rank: int) -> str:
            if rank == late and not (looks.wait(60) and comes):
                return "absent"
            try:
                kept.append(ranks._meet(rank, size, timedelta(seconds=60), is_gone, looks=rank % 8 == 0))
            except CapstanError as error:
                return str(error)
            return "met"

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))

    return meet


def test_a_meeting_costs_each_rank_a_few_requests_however_many_they_are(meeting: Callable[..., list[str]]) -> None:
    assert meeting(64, late=63, comes=True) == ["met"] * 64
    assert Counted.asked["check"] == 0
    assert Counted.asked.total() <= 6 * 64
    assert Counted.asked["list_keys"] <= 2 * 64 / 8, "only one rank of a node looks who is missing"


def test_the_rank_that_finds_one_gone_tells_all_others(meeting: Callable[..., list[str]]) -> None:
    began = time.monotonic()
    said = meeting(16, late=13, comes=False, gone=True)
    assert said.pop(13) == "absent"
    assert "15 of 16 ranks came together within" in said[0]
    assert "missing: 13." in said[0]
    # The store ends with rank 0. Whoever asks it after that says so.
    assert all(text == said[0] or "missing: 13." in text or "or has given up" in text for text in said)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("host", "ranks_here", "address"), [("127.0.0.1", "2", "127.0.0.1"), ("127.0.0.1", "1", "::")])
def test_ranks_of_one_machine_meet_where_no_other_reaches_them(
    monkeypatch: pytest.MonkeyPatch, host: str, ranks_here: str, address: str
) -> None:
    """A name that is this machine's own, such as 127.0.1.1, says nothing of where ranks of other machines reach it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    with socket.socket(fileno=ranks._listening(host, port)) as listening:
        assert listening.getsockname()[:2] == (address, port)


def test_every_rank_has_the_settings_variables_of_nccl(workshop: Workshop) -> None:
    config = workshop.config("network", "cluster.nccl={NCCL_SOCKET_IFNAME: ib0, NCCL_IB_TIMEOUT: 22}")
    names = ("NCCL_SOCKET_IFNAME", "NCCL_IB_TIMEOUT", "NCCL_DEBUG")
    given = {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"}
    found = launch(2, runs.environment, dump_config(config), *names, extra_environment=given)
    assert found == [["ib0", "22", "WARN"]] * 2
