"""The process that owns a run: how signals and errors of it end in the run's folder and in an exit code."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.drive import driver
from launcher.drive.driver import BY_COMPILATION, ENDED_AT_ONCE, forget_own_stop, stop_on_signals
from launcher.start.claim import claimed
from launcher.view.status import read_status
from trainer.config import Config, parse_config
from trainer.errors import ConfigError, Stopped, StorageError, Superseded
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.owner import take
from trainer.run.requests import request_stop, stop_requester
from trainer.store.store import Store


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = "run: {{name: one, store: {}}}\nmodel: {{base: /m}}\ndata: {{train: [{{path: d}}]}}\ntrain: {{steps: 2}}"
    return parse_config(text.format(tmp_path))


@pytest.fixture
def run(config: Config) -> Store:
    return run_folder(config)


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_asks_the_run_to_stop_and_a_second_ctrl_c_ends_at_once(
    run: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    owner = take(run, "capstan train", 0)
    with stop_on_signals(owner):
        for number in before:
            run.delete(layout.STOP)
            signal.raise_signal(number)
            until(lambda number=number: stop_requester(run) == number.name)
        assert "Ctrl-C again ends at once" in capsys.readouterr().err
        assert ended == []
        signal.raise_signal(signal.SIGINT)
        assert ended == [ENDED_AT_ONCE]
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_to_a_driver_that_was_taken_over_stops_nobody_elses_start(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)  # which ends it as well
    owner = take(run, "capstan train", 0)
    take(run, "capstan resume", 1)
    with pytest.raises(SystemExit) as ended:
        driver._ask(owner, "SIGTERM", threading.Event())
    assert ended.value.code == ENDED_AT_ONCE
    assert not run.exists(layout.STOP)


def test_a_store_that_is_full_when_the_signal_comes_is_asked_again(
    run: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [StorageError("no space left"), StorageError("no space left"), None]

    def ask(folder: Store, by: str) -> None:
        if error := full.pop(0):
            raise error
        request_stop(folder, by=by)

    monkeypatch.setattr(driver, "request_stop", ask)
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.01)
    with stop_on_signals(take(run, "capstan train", 0)):
        signal.raise_signal(signal.SIGTERM)
        until(lambda: stop_requester(run) == "SIGTERM")
    assert capsys.readouterr().err.count("no space left") == 1


@pytest.mark.parametrize(
    ("by", "stays"), [("SIGTERM", False), ("SIGUSR1", False), ("SIGINT", False), (BY_COMPILATION, False), ("me", True)]
)
def test_only_a_persons_request_stops_the_next_start(run: Store, by: str, stays: bool) -> None:
    request_stop(run, by=by)
    forget_own_stop(run)
    assert run.exists(layout.STOP) is stays


@pytest.mark.parametrize("error", [None, ConfigError("a wrong setting")], ids=str)
def test_the_drivers_log_goes_on_and_has_its_end(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch, error: ConfigError | None
) -> None:
    owner, log = take(run, "capstan train", 0), list[str]()

    def work(config: Config, owner: Any, journal: Any, **_: Any) -> None:
        assert not run.exists(layout.STOP), "a signal to the process before"
        journal.write("launch: starts the process of 1 rank")
        request_stop(run, by="SIGTERM")
        if error:
            raise error

    reports = list[Store]()
    monkeypatch.setattr(driver, "compile_and_train", work)
    monkeypatch.setattr(driver, "keep_report", lambda folder, log: reports.append(folder))
    run.put(layout.DRIVER_LOG, b"of the driver before\n")
    request_stop(run, by="SIGUSR1")
    with nullcontext() if error is None else pytest.raises(ConfigError, match="a wrong setting"):
        driver.drive(config, owner, resume=False, live=False, log=log.append)
    assert not run.exists(layout.STOP)
    assert reports == [run]
    assert log == ["launch: starts the process of 1 rank"], "a person sees it at once"
    before, begun, launch, last = run.get(layout.DRIVER_LOG).decode().splitlines()
    assert before == "of the driver before"
    assert f"driver of process {os.getpid()} on" in begun
    assert launch.endswith(" launch: starts the process of 1 rank")
    assert last.endswith(" finished" if error is None else " ended with exit code 2: a wrong setting")


@pytest.mark.parametrize(
    ("dashboard", "here", "done"),
    [
        (None, 2, ["compiles here", "servers begin", "2 ranks here", "servers end", "compiled"]),
        (None, None, ["compiles here", "ranks on a Ray of its own", "compiled"]),
        ("http://head", 2, ["compiles on the cluster", "ranks on http://head", "compiled"]),
    ],
)
def test_ranks_are_on_this_machine_or_on_ray_beside_the_compilation(
    config: Config,
    run: Store,
    monkeypatch: pytest.MonkeyPatch,
    dashboard: str | None,
    here: int | None,
    done: list[str],
) -> None:
    did = list[str]()

    @contextmanager
    def lasting(begin: str, end: str) -> Iterator[None]:
        did.extend([begin] * bool(begin))
        yield
        did.append(end)

    def begin(*, on_cluster: bool) -> tuple[str, Iterator[int]]:
        assert not run.exists(layout.NO_MORE_DATA), "what the start before had given up is compiled now"
        did.append(f"compiles {'on the cluster' if on_cluster else 'here'}")
        return "data", iter(())

    def on_ray(attempts: Any, dashboard: str | None, log: Any, *, can_grow: bool) -> None:
        assert (attempts.datasets, attempts.resume, can_grow) == ("data", True, False)
        did.append(f"ranks on {dashboard or 'a Ray of its own'}")

    run.put(layout.NO_MORE_DATA, b"of the start before")
    compilation = SimpleNamespace(begin=begin, beside=lambda rest: lasting("", "compiled"))
    monkeypatch.setattr(driver, "Compilation", lambda *_: compilation)
    monkeypatch.setattr(driver, "ranks_here", lambda config: here)
    monkeypatch.setattr(driver, "sidecars_here", lambda *_: lasting("servers begin", "servers end"))
    monkeypatch.setattr(driver, "run_here", lambda attempts, ranks, log: did.append(f"{ranks} ranks here"))
    monkeypatch.setattr(driver, "run_on_ray", on_ray)
    owner, journal = take(run, "capstan train", 0), driver.Journal(run, print)
    how: Any = {"resume": True, "dashboard": dashboard, "log": print, "can_grow": False}
    driver.compile_and_train(config, owner, journal, **how)
    assert did == done


def test_a_driver_that_was_taken_over_leaves_the_others_stop_and_report(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = take(run, "capstan train", 0)

    def work(*_: Any, **__: Any) -> None:
        take(run, "capstan resume", 1)
        request_stop(run, by="SIGTERM")  # to the other start
        owner.check()

    monkeypatch.setattr(driver, "compile_and_train", work)
    monkeypatch.setattr(driver, "keep_report", lambda folder, log: pytest.fail("it is the other's"))
    with pytest.raises(Superseded):
        driver.drive(config, owner, resume=False, live=False, log=print)
    assert stop_requester(run) == "SIGTERM"


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (ConfigError("a wrong setting"), 2, "failed"),
        (Stopped("on request"), 75, "stopped"),
        (RuntimeError("a mistake of ours"), None, "failed"),
    ],
)
def test_the_driver_of_a_job_leaves_its_end_in_the_runs_folder(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None, state: str
) -> None:
    given = dict[str, Any]()

    def drive(*_: Any, **how: Any) -> None:
        given.update(how)
        raise error

    monkeypatch.setattr(driver, "drive", drive)
    with claimed(config, by="capstan submit", resume=False, code=None, log=print, group="job", waits=True):
        pass
    monkeypatch.setattr("sys.argv", ["driver", run.uri, "--submission", "job", "--address", "auto", "--fixed"])
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        driver.main()
    assert getattr(ended.value, "code", None) == code
    assert (given["address"], given["can_grow"], given["resume"]) == ("auto", False, False)
    status = read_status(run)
    assert status.state == state
    assert str(error) in status.reason


def test_a_driver_that_was_taken_over_writes_into_nobodys_records(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumes = list[bool]()

    def drive(*_: Any, **how: Any) -> None:
        resumes.append(how["resume"])
        raise Superseded("another start has the run")

    monkeypatch.setattr(driver, "drive", drive)
    with claimed(config, by="capstan submit", resume=False, code=None, log=print, group="job", waits=True):
        pass
    monkeypatch.setattr("sys.argv", ["driver", run.uri, "--submission", "job", "--resume"])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert (ended.value.code, resumes) == (Superseded.exit_code, [True])
    assert list(run.list(layout.METRICS)) == []
