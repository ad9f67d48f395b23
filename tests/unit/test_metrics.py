"""Starts of a run get numbers of their own; metrics, logs and stop requests reach the run's folder."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.background import Every
from trainer.run.log import rank_log
from trainer.run.metrics import Metrics, claim_generation
from trainer.run.requests import StopSignal
from trainer.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_generations_count_from_one(run: Store) -> None:
    assert [claim_generation(run) for _ in range(3)] == [1, 2, 3]


def test_starts_that_race_never_share_a_generation(run: Store) -> None:
    racers = 12
    start = threading.Barrier(racers)

    def race(_: int) -> int:
        start.wait(timeout=30)
        return claim_generation(run)

    with ThreadPoolExecutor(racers) as pool:
        assert sorted(pool.map(race, range(racers))) == list(range(1, racers + 1))


def metrics(run: Store, *, writes: bool = True, tensorboard: bool = False) -> Metrics:
    return Metrics(run, 1, writes=writes, flush_seconds=3600, tensorboard=tensorboard)


def records(run: Store) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]


def test_each_record_is_one_json_object_a_line(run: Store) -> None:
    ours = metrics(run)
    ours.write("step", step=1, loss=2.5)
    ours.flush()
    assert [record["loss"] for record in records(run)] == [2.5]
    ours.write("step", step=2, loss=2.25)
    ours.close()
    assert [(record["kind"], record["step"], record["loss"]) for record in records(run)] == [
        ("step", 1, 2.5),
        ("step", 2, 2.25),
    ]
    assert all(isinstance(record["time"], float) for record in records(run))


def test_other_ranks_write_nothing(run: Store) -> None:
    theirs = metrics(run, writes=False, tensorboard=True)
    theirs.write("step", step=1, loss=2.5)
    theirs.close()
    assert run.list() == []


def test_tensorboard_events_lie_in_the_runs_folder(run: Store) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ours = metrics(run, tensorboard=True)
    for step in (1, 2):
        ours.write("step", step=step, loss=1.0 / step, samples="88ed09c9")  # a text is no curve
    ours.close()
    folder = run.uri.removeprefix("file://") + "/" + layout.tensorboard(1)
    events = EventAccumulator(folder).Reload().Scalars("step/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5)]


def test_a_store_that_fails_once_is_tried_again(capfd: pytest.CaptureFixture[str]) -> None:
    again = threading.Event()
    calls: list[int] = []

    def flaky() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise StorageError("the bucket is away")
        again.set()

    every = Every(0.001, flaky)
    assert again.wait(timeout=30)
    every.stop()
    assert "will be tried again: the bucket is away" in capfd.readouterr().err


def test_a_stop_key_is_seen(run: Store) -> None:
    stop = StopSignal(run, watches=False, seconds=60)
    stop._look()
    assert not stop.requested
    run.put(layout.STOP, b"")
    stop._look()
    assert stop.requested
    stop.close()


def test_a_ranks_log_has_what_python_and_child_processes_print(run: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled(), rank_log(run, 2, 3, flush_seconds=3600):
        print("from python", flush=True)
        os.write(2, b"from C\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True, timeout=60)
    log = run.get(layout.rank_log(2, 3)).decode()
    assert log.splitlines() == ["from python", "from C", "from a child"]
    os.write(2, b"afterwards\n")
    assert "afterwards" not in run.get(layout.rank_log(2, 3)).decode()


def test_a_ranks_log_is_sent_again_only_when_it_has_grown(
    run: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    several = threading.Event()

    def observed(_: Store, key: str, data: bytes) -> None:
        sent.append(len(data))

    def beat(self: Every) -> None:
        for _ in range(3):
            self._action()
        several.set()

    monkeypatch.setattr(Store, "put", observed)
    monkeypatch.setattr(Every, "_loop", beat)
    with capfd.disabled(), rank_log(run, 1, 0, flush_seconds=3600):
        assert several.wait(timeout=30)
        print("grown", flush=True)
    assert sent == [len("grown\n")]
