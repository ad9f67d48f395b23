"""The owner of a run: known exactly where its process is, by its beats elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.start.check import check_idle, check_name, in_use
from launcher.start.stopping import give_up_waiting
from launcher.view.status import read_status
from trainer.errors import ConfigError
from trainer.run import layout, owner
from trainer.run.owner import FRESH_SECONDS, own, owning, read_owner
from trainer.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    run = open_store(str(tmp_path / "runs")).sub("mine")
    run.put(layout.CONFIG, b"run: {name: mine}\n")
    return run


def elsewhere(found: owner.Owner | None) -> owner.Owner:
    assert found is not None
    return replace(found, place="another machine", host="node7")


def test_a_run_is_owned_as_long_as_its_process_says_so(run: Store) -> None:
    with owning(run, "capstan train"):
        with pytest.raises(ConfigError, match=rf"in use by `capstan train` \(process {os.getpid()} on .*--take-over"):
            check_idle(run, resume=True)
        assert read_status(run).state == "starting"
    assert read_owner(run) is None
    check_idle(run, resume=True)


def test_a_process_that_was_killed_is_gone_at_once_even_while_nobody_has_waited_for_it(run: Store) -> None:
    code = "import sys; from trainer.store import open_store; from trainer.run.owner import own; own(open_store(sys.argv[1]), 'x'); input()"
    command = [sys.executable, "-c", code, run.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 60
            while not run.exists(layout.OWNER):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert f"process {process.pid}" in (in_use(run) or "")
        finally:
            process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie by now
        assert in_use(run) is None
    status = read_status(run)
    assert status.state == "silent"
    assert "start it again" in status.reason
    check_name(run)


def test_a_number_that_another_process_has_by_now_is_not_the_owners(run: Store) -> None:
    assert not replace(own(run, "capstan train"), born="1").is_alive(time.time())


def test_an_owner_elsewhere_lives_until_it_has_not_been_heard_of_for_a_while(run: Store) -> None:
    far = elsewhere(own(run, "capstan train"))
    assert far.is_alive(far.time + FRESH_SECONDS - 1)
    assert far.is_alive(far.time - 1000), "clocks differ"
    assert not far.is_alive(far.time + FRESH_SECONDS + 1)


def test_who_was_taken_over_neither_takes_back_nor_gives_up_what_is_anothers(run: Store, monkeypatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    with owning(run, "capstan train"):
        beat = read_owner(run)
        deadline = time.monotonic() + 30
        while read_owner(run) == beat:
            assert time.monotonic() < deadline, "no beat comes"
            time.sleep(0.01)
        taken = elsewhere(read_owner(run))
        owner._write(run, taken)
        time.sleep(0.2)  # ten beats
        assert read_owner(run) == taken
    assert read_owner(run) == taken


def test_a_submitted_job_whose_turn_has_not_come_holds_the_name_until_it_is_given_up(run: Store) -> None:
    own(run, "capstan submit ray", waits=True)
    assert read_status(run).state == "starting"
    with pytest.raises(ConfigError, match="whose job has not begun.*capstan stop"):
        check_idle(run, resume=False)
    give_up_waiting(run)
    check_idle(run, resume=False)
    check_name(run)
    assert read_status(run).state == "stopped"


def test_a_run_of_before_is_known_by_its_records(run: Store) -> None:
    for generation, quiet in ((1, 5.0), (2, 500.0)):
        facts = {"kind": "start", "step": 0, "total_steps": 9, "world_size": 1, "time": time.time() - quiet}
        run.put(layout.metrics(generation), json.dumps(facts).encode() + b"\n")
        assert (in_use(run) is None) == (quiet > 100)
