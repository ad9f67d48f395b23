"""The owner of a run: known exactly where its process is, by its beats elsewhere; one start at a time has a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.start.attempts import give_up_waiting
from launcher.start.check import check_idle, check_name
from launcher.view.listing import list_runs
from launcher.view.runs import find_run
from launcher.view.status import read_status
from tests.unit.run.made_records import stamp
from trainer.errors import ConfigError, StorageError, Superseded
from trainer.run import layout, owner
from trainer.run.folder import store_of
from trainer.run.owner import (
    FRESH_SECONDS,
    Owner,
    Ownership,
    OwnerWatch,
    StoreClock,
    end_group,
    newest_number,
    preparer,
    preparing,
    read_owner,
    take,
)
from trainer.run.records import record_line
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    run = open_store(str(tmp_path / "runs")).sub("mine")
    run.put(layout.CONFIG, b"run: {name: mine}\n")
    return run


def taken(run: Store, by: str = "capstan train", **options: Any) -> Ownership:
    return take(run, by, newest_number(run), **options)


def newest(run: Store) -> Owner:
    found = read_owner(run)
    assert found is not None
    return found


def put(run: Store, found: Owner) -> None:
    run.put(layout.owner(newest_number(run)), json.dumps(asdict(found)).encode())


def elsewhere(found: Owner) -> Owner:
    return replace(found, place="another machine", host="node7")


def test_a_run_is_owned_as_long_as_its_process_says_so(run: Store) -> None:
    own = taken(run)
    with pytest.raises(ConfigError, match=rf"in use by `capstan train` \(process {os.getpid()} on .*--take-over"):
        check_idle(run, resume=True)
    assert read_status(run).state == "starting"
    own.end()
    assert read_owner(run) is None
    check_idle(run, resume=True)


def test_a_store_that_is_gone_fails_no_end(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own = taken(run)

    def refused(store: Store, key: str, data: bytes) -> None:
        raise StorageError("it is gone")

    monkeypatch.setattr(Store, "put", refused)
    own.end()
    assert read_owner(run) is not None


def test_a_process_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"/proc/7/stat": "7 (a) b) S ", "/proc/8/stat": "8 (Z) X "}
    fields = " ".join(f"{number}" for number in range(1, 40))
    monkeypatch.setattr(Path, "read_text", lambda path: stats[str(path)] + fields)
    assert (owner._born(7), owner._born(8)) == ("19", None)


def test_of_several_who_take_a_run_at_once_one_gets_it(run: Store) -> None:
    seen = newest_number(run)
    take(run, "capstan train", seen)
    with pytest.raises(ConfigError, match="somebody else has just taken"):
        take(run, "capstan train", seen)


def test_a_process_that_was_killed_is_gone_at_once_even_while_nobody_has_waited_for_it(run: Store) -> None:
    code = (
        "import sys; from trainer.store.store import open_store; from trainer.run.owner import take;"
        " take(open_store(sys.argv[1]), 'x', 0); input()"
    )
    command = [sys.executable, "-c", code, run.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 60
            while not newest_number(run):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with pytest.raises(ConfigError, match=f"process {process.pid}"):
                check_idle(run, resume=True)
        finally:
            process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie by now
        check_idle(run, resume=True)
    status = read_status(run)
    assert status.state == "silent"
    assert "start it again" in status.reason
    check_name(run)


def test_a_number_that_another_process_has_by_now_is_not_the_owners(run: Store) -> None:
    taken(run)
    assert not replace(newest(run), born="1").is_alive(time.time)


def test_a_process_that_proc_hides_is_judged_by_its_beats(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(run)
    found = replace(newest(run), process=1)
    monkeypatch.setattr(owner, "_born", lambda process: owner._HIDDEN)
    assert found.is_alive(lambda: found.time + FRESH_SECONDS - 1)
    assert not found.is_alive(lambda: found.time + FRESH_SECONDS + 1)


def test_an_owner_elsewhere_lives_until_it_has_not_been_heard_of_for_a_while(run: Store) -> None:
    taken(run)
    far = elsewhere(newest(run))
    assert far.is_alive(lambda: far.time + FRESH_SECONDS - 1)
    assert far.is_alive(lambda: far.time - 1000), "clocks differ"
    assert not far.is_alive(lambda: far.time + FRESH_SECONDS + 1)
    told = [far.sentence(far.time + seconds).partition("heard of ")[2] for seconds in (12, -2)]
    assert told == ["12 s ago", "0 s ago"], "another clock may be behind"


def test_an_owner_says_how_many_starts_the_run_had_when_it_took_it(run: Store) -> None:
    assert taken(run).owner.starts == 0
    for generation in (1, 2, 3):
        run.put(layout.metrics(generation), b"")
    assert taken(run).owner.starts == 3


def test_a_watch_of_a_group_heeds_no_other_one(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(owner.time, "monotonic", lambda: clock[0])
    own = taken(run, group="ours")
    watches = {group: OwnerWatch(run, group) for group in (None, "ours", "theirs")}
    assert [watch.is_gone() for watch in watches.values()] == [False] * 3
    assert [watch.is_unheard for watch in watches.values()] == [False, False, True]
    own.end()
    clock[0] += 9
    assert [watch.is_gone() for watch in watches.values()] == [False] * 3, "it may start anew"
    clock[0] += 2
    assert [watch.is_gone() for watch in watches.values()] == [True, True, False]


def test_rank_0_is_known_by_the_owner_and_the_others_by_their_processes(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"owner": True, 1: False, 2: True}
    monkeypatch.setattr(owner, "OwnerWatch", lambda folder: SimpleNamespace(is_gone=lambda: gone["owner"]))
    monkeypatch.setattr(owner, "Siblings", lambda: SimpleNamespace(is_gone=lambda rank: gone.get(rank, False)))
    is_gone = owner.lost_ranks(run)
    assert [is_gone(rank) for rank in range(3)] == [True, False, True]
    gone["owner"] = False
    assert not is_gone(0)


@pytest.fixture
def store_is_behind(monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds by which this machine's clock is ahead of the store's, and of all other machines'."""
    seconds, plain = 86_400.0, time.time
    monkeypatch.setattr(time, "time", lambda: plain() + seconds)
    return seconds


def test_an_owner_elsewhere_is_judged_by_the_stores_clock_as_this_machines_may_be_wrong(
    run: Store, store_is_behind: float
) -> None:
    taken(run)
    put(run, elsewhere(newest(run)))
    with pytest.raises(ConfigError, match=r"in use by .* heard of \d s ago"):
        check_idle(run, resume=True)
    stamp(run, layout.owner(1), time.time() - store_is_behind - FRESH_SECONDS - 1)
    check_idle(run, resume=True)
    assert [entry.key for entry in run.list()] == [layout.CONFIG, layout.owner(1)], "nothing stays of the question"


def test_so_are_a_run_and_its_records_by_status_and_ls(run: Store, store_is_behind: float) -> None:
    taken(run)
    put(run, elsewhere(newest(run)))
    run.put(layout.metrics(1), b"".join(record_line(kind, {"step": 1}) for kind in ("start", "step")))
    status, (line,) = read_status(run), list_runs(store_of(run)).runs
    assert (status.state, line.state) == ("running", "running")
    assert status.quiet_seconds == pytest.approx(0, abs=60)
    assert line.age_seconds == pytest.approx(0, abs=60)
    stamp(run, layout.owner(1), time.time() - store_is_behind - FRESH_SECONDS - 1)
    assert read_status(run).state == "silent"


def test_a_clock_that_is_set_while_it_is_watched_is_compared_with_the_stores_anew(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, plain = StoreClock(run), time.time
    before, asked = clock(), list[str]()
    monkeypatch.setattr(time, "time", lambda: plain() + 7200)
    monkeypatch.setattr(
        Store, "put", lambda store, key, data, put=Store.put: (asked.append(key), put(store, key, data))
    )
    assert [clock() - before for _ in range(3)] == pytest.approx([0, 0, 0], abs=6)
    assert asked == [layout.CLOCK], "it is asked once"


def test_clocks_that_differ_by_moments_are_one(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = time.time
    for ahead, counts in ((3, False), (60, True)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: plain() + ahead)
        assert (owner._ahead(run) == 0.0) is not counts


def test_where_nothing_can_be_written_the_machines_clock_stands_for_the_stores(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: Store, key: str, data: bytes) -> None:
        raise StorageError("403")

    monkeypatch.setattr(Store, "put", refused)
    assert StoreClock(run)() == pytest.approx(time.time(), abs=5)


def test_an_owner_that_a_late_listing_does_not_have_yet_is_known(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(run).end()
    plain, late = Store.list, run.list(layout.OWNERS)
    monkeypatch.setattr(
        Store, "list", lambda store, prefix="": late if prefix == layout.OWNERS else plain(store, prefix)
    )
    second = taken(run)
    with pytest.raises(ConfigError, match="in use by"):
        check_idle(run, resume=True)
    second.end()
    check_idle(run, resume=True)
    assert taken(run, "capstan resume").lost is False
    assert second.lost


def test_a_run_that_a_start_prepares_is_one_for_status_and_ls(tmp_path: Path) -> None:
    run = open_store(str(tmp_path / "runs")).sub("new")
    with preparing(run, "capstan train"):
        assert find_run("new", str(tmp_path / "runs"), prepared=True).uri == run.uri
        status, (line,) = read_status(run), list_runs(store_of(run)).runs
        assert status.state == line.state == "starting"
        assert status.reason == line.reason
        assert re.fullmatch(r"`capstan train` \(process \d+ on .*\), heard of \d s ago, checks .*", status.reason)
        with pytest.raises(
            ConfigError, match=r"new is no run yet: `capstan train` \(process .* Wait until `capstan status"
        ):
            find_run("new", str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == [], "nothing stays of a start that was refused"
    run.put(layout.CONFIG, b"run: {name: new}\n")
    with preparing(run, "capstan resume"):
        assert preparer(run) is None, "a run that is there has an owner for that"
    run.delete(layout.CONFIG)
    with pytest.raises(ConfigError, match="there is no run"):
        find_run("new", str(tmp_path / "runs"), prepared=True)


def test_nothing_is_said_of_a_start_that_was_killed_while_it_prepared(run: Store) -> None:
    new = store_of(run).sub("new")
    taken(run)
    new.put(layout.PREPARING, json.dumps(asdict(replace(newest(run), run="new", born="1"))).encode())
    assert preparer(new) is None
    assert [line.run for line in list_runs(store_of(run)).runs] == ["mine"]


def test_who_was_taken_over_knows_it_and_changes_nothing_of_the_other(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    own = taken(run)
    with own.kept_fresh():
        beat = newest(run)
        deadline = time.monotonic() + 30
        while newest(run) == beat:
            assert time.monotonic() < deadline, "no beat comes"
            time.sleep(0.01)
        own.check()
        taken(run, "capstan resume")
        other = newest(run)
        assert own.lost
        with pytest.raises(Superseded, match="taken over"):
            own.check()
        time.sleep(0.2)  # ten beats
    own.end()
    assert newest(run) == other


def test_a_submitted_job_whose_turn_has_not_come_holds_the_name_until_it_is_given_up(run: Store) -> None:
    taken(run, "capstan submit ray", waits=True)
    assert read_status(run).state == "starting"
    with pytest.raises(ConfigError, match="whose job has not begun.*capstan stop"):
        check_idle(run, resume=False)
    give_up_waiting(run)
    check_idle(run, resume=False)
    check_name(run)
    assert read_status(run).state == "stopped"


def test_the_owner_of_the_run_that_a_folder_was_copied_from_is_not_the_copys(run: Store) -> None:
    taken(run)
    copy = open_store(run.uri.rpartition("/")[0]).sub("fork")
    for entry in run.list():
        copy.put(entry.key, run.get(entry.key))
    assert read_owner(copy) is None
    check_idle(copy, resume=True)
    assert take(copy, "capstan resume", newest_number(copy)).lost is False


@pytest.mark.parametrize("text", ["", "{", "[]", '{"by": "x"}', '{"by": "x", "time": "y"}', "[" * 10_000])
def test_an_unreadable_owner_is_somebody_until_it_is_old(run: Store, text: str) -> None:
    run.put(layout.owner(1), text.encode())
    with pytest.raises(ConfigError, match="in use by `an unreadable owner`"):
        check_idle(run, resume=True)
    assert read_status(run).state == "starting"
    stamp(run, layout.owner(1), time.time() - FRESH_SECONDS - 1)
    check_idle(run, resume=True)


@pytest.mark.parametrize("process", [2**40, -1, "x"])
def test_an_owner_whose_process_can_be_none_is_unreadable(run: Store, process: Any) -> None:
    taken(run)
    run.put(layout.owner(1), json.dumps({**asdict(newest(run)), "process": process, "born": "1"}).encode())
    assert newest(run).by == "an unreadable owner"
    with pytest.raises(ConfigError, match="in use by"):
        check_idle(run, resume=True)


def test_an_owner_of_a_later_version_is_read(run: Store) -> None:
    taken(run)
    run.put(layout.owner(1), json.dumps({**asdict(newest(run)), "colour": "blue"}).encode())
    assert newest(run).by == "capstan train"


def test_a_run_whose_owner_came_after_its_last_end_is_starting(run: Store) -> None:
    records = [
        {"kind": "start", "step": 0, "total_steps": 9, "world_size": 1, "time": time.time() - 9},
        {"kind": "end", "outcome": "stopped", "step": 4, "reason": "asked", "time": time.time() - 5},
    ]
    run.put(layout.metrics(1), "".join(json.dumps(record) + "\n" for record in records).encode())
    assert read_status(run).state == "stopped"
    own = taken(run, "capstan resume")
    status = read_status(run)
    assert (status.state, status.reason.startswith("`capstan resume` (process")) == ("starting", True)
    own.end()
    assert read_status(run).state == "stopped"


def test_so_is_one_whose_owner_has_a_clock_that_is_hours_behind(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    end = {"kind": "end", "outcome": "finished", "step": 4, "reason": "", "time": time.time()}
    run.put(layout.metrics(1), json.dumps(end).encode() + b"\n")
    with monkeypatch.context() as behind:
        behind.setattr(time, "time", lambda now=time.time: now() - 7200)
        own = taken(run, "capstan resume")
    assert (read_status(run).state, list_runs(store_of(run)).runs[0].state) == ("starting", "starting")
    run.put(layout.metrics(2), json.dumps(end | {"outcome": "failed"}).encode() + b"\n")
    assert read_status(run).state == "failed", "what its own start says counts"
    own.end()


def test_a_process_that_is_given_the_run_has_it_as_long_as_it_lives(run: Store, tmp_path: Path) -> None:
    own = taken(run)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        own.hand_to(process.pid, tmp_path / "said")
        given, clock = newest(run), StoreClock(run)
        assert (given.process, given.output) == (process.pid, str(tmp_path / "said"))
        assert given.is_alive(clock)
        process.communicate(b"\n")
    assert not newest(run).is_alive(clock)


def test_a_run_is_released_for_the_group_that_had_it_and_for_no_other(run: Store) -> None:
    taken(run, group="one")
    end_group(run, "two")
    assert newest(run).group == "one"
    end_group(run, "one")
    assert read_owner(run) is None
    ended = run.get(layout.owner(1))
    end_group(run, "one")
    assert run.get(layout.owner(1)) == ended
