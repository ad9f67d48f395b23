"""A rank's log has all that its process prints, with bounded memory and few requests."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.view.watch import read_log
from trainer.run import layout
from trainer.run.background import Every
from trainer.run.log import log_allowance, rank_log, tell
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_a_line_of_the_log_does_not_wait_for_a_full_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(reading) as read, open(writing, "w") as printed:
        monkeypatch.setattr(sys, "stdout", printed)
        tell("step 1")
        os.set_blocking(reading, False)
        assert read.readline() == "step 1\n"
        monkeypatch.undo()


def test_a_ranks_log_has_what_python_and_child_processes_print(run: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled(), rank_log(run, 2, 3, 4, flush_seconds=3600):
        print("from python", flush=True)
        os.write(2, b"from C\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True, timeout=300)
    log = run.get(layout.rank_log(2, 3)).decode()
    assert log.splitlines() == ["from python", "from C", "from a child"]
    os.write(2, b"afterwards\n")
    assert "afterwards" not in run.get(layout.rank_log(2, 3)).decode()


def test_what_a_rank_prints_is_still_shown(run: Store, capfd: pytest.CaptureFixture[str]) -> None:
    before = [os.fstat(output).st_ino for output in (1, 2)]
    with rank_log(run, 2, 3, 4, flush_seconds=3600):
        os.write(1, b"from C\n")
    assert "from C\n" in capfd.readouterr().err
    assert [os.fstat(output).st_ino for output in (1, 2)] == before, "both go where they went before"


def test_a_log_with_much_to_send_does_not_wait_for_its_turn(
    run: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lose what it has no memory for."""
    looks: list[Any] = []
    monkeypatch.setattr(Every, "_loop", lambda self: looks.append(self._action))
    monkeypatch.setattr("trainer.run.log.log_allowance", lambda *_: SimpleNamespace(take=lambda: False))
    monkeypatch.setattr("trainer.run.log.BLOCK_BYTES", 10)
    with rank_log(run, 1, 0, 1, flush_seconds=3600):
        os.write(1, b"fifteen bytes.\n")
        deadline = time.monotonic() + 30
        while not run.exists(layout.rank_log(1, 0)) and time.monotonic() < deadline:
            looks[0]()
            time.sleep(0.01)
        assert run.get(layout.rank_log(1, 0)) == b"fifteen bytes.\n"
    capfd.readouterr()


def test_a_rank_that_prints_nothing_keeps_its_allowance(
    run: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, taken = list[Any](), list[int]()
    monkeypatch.setattr(Every, "_loop", lambda self: looks.append(self._action))
    monkeypatch.setattr("trainer.run.log.log_allowance", lambda *_: SimpleNamespace(take=lambda: taken.append(1)))
    with rank_log(run, 1, 0, 1, flush_seconds=3600):
        for _ in range(3):
            looks[0]()
    capfd.readouterr()
    assert taken == []


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each write to the store."""
    sizes: list[int] = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, key, data: (sizes.append(len(data)), put(self, key, data))[1])
    return sizes


def test_a_log_is_sent_again_only_when_it_has_grown(
    run: Store, sent: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    monkeypatch.setattr(Every, "_loop", lambda self: looks.append(self._action))
    with capfd.disabled(), rank_log(run, 1, 0, 1, flush_seconds=3600) as flush:
        flush()
        print("grown", flush=True)
        for _ in range(3):
            flush()
    assert sent == [len("grown\n")]
    assert len(looks) == 1


def test_ranks_that_print_all_the_time_make_few_requests_together() -> None:
    now = [0.0]
    ranks = 64
    allowances = [log_allowance(rank, ranks, lambda: now[0]) for rank in range(1, ranks)]
    taken = []
    for look in range(5 * 720):  # five hours, each rank looks every five seconds
        now[0] = look * 5.0
        taken.append(sum(allowance.take() for allowance in allowances))
    assert 10 * (ranks - 1) <= sum(taken[:12]) < 11 * (ranks - 1)  # the first minute of all comes at once
    for hour in range(1, 5):
        assert sum(taken[hour * 720 : (hour + 1) * 720]) <= 3600 / 20 + 1
    quiet = allowances[0]
    now[0] += 20 * ranks * 3
    assert [quiet.take() for _ in range(3)] == [True] * 3  # a quiet time was earned back
    now[0] += 20 * ranks * 1000
    assert [quiet.take() for _ in range(12)] == [True] * 10 + [False] * 2, "and no more than there was at first"
    first = log_allowance(0, ranks, lambda: now[0])
    assert sum(first.take() for _ in range(12)) == 10
    now[0] += 29.5
    assert not first.take(), "the first rank's share is its own: once in 30 seconds"
    now[0] += 1
    assert [first.take(), first.take()] == [True, False]


def test_a_log_that_is_sent_in_pieces_is_read_as_one(
    run: Store, sent: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled(), rank_log(run, 1, 5, 8, flush_seconds=3600) as flush:
        for number in range(40):
            print("line", number, flush=True)
            flush()
        assert len(run.list(layout.LOGS)) > 1
        assert read_log(run, 5) == "".join(f"line {number}\n" for number in range(40))
    assert [entry.key for entry in run.list(layout.LOGS)] == [layout.rank_log(1, 5)]
    assert read_log(run, 5) == "".join(f"line {number}\n" for number in range(40))
