"""A run's folder is taken for a start, and given back as it was when nothing comes of it."""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launcher.cluster.ray import jobs
from launcher.start.claim import claimed, keep_code, turn, wait_for_first_rank
from launcher.start.group import group_name, restarted_as
from launcher.view.status import read_status
from launcher.view.watch import read_driver_log
from tests.material import Workshop
from trainer.config import Config, dump_config, override, parse_config
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.run import layout
from trainer.run.folder import SettingChange, is_own, record_settings, run_config, run_folder, submitted_config
from trainer.run.owner import Ownership, OwnerWatch, read_owner, take
from trainer.run.records import record_end
from trainer.run.requests import request_stop
from trainer.store.store import Store


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Workshop(tmp_path).config("mine")


@pytest.fixture
def run(config: Config) -> Store:
    """The folder of a run that has trained once, and that a person has asked to stop."""
    run = run_folder(config)
    run.put(layout.CONFIG, dump_config(config).encode())
    run.create(layout.metrics(1), b"")
    record_settings(run, 1, config)
    request_stop(run, by="alice")
    return run


def contents(run: Store) -> dict[str, bytes]:
    """All but who has had it: that somebody has tried to take a run stays known."""
    return {entry.key: run.get(entry.key) for entry in run.list() if not entry.key.startswith(layout.OWNERS)}


def resumed(config: Config, log: list[str] | None = None):
    said = [] if log is None else log
    return claimed(config, by="capstan resume", resume=True, code=None, log=said.append, take_over=True)


def ends_with(
    error: CapstanError, claim: AbstractContextManager[Ownership], meanwhile: Callable[[], None] = lambda: None
) -> None:
    def start() -> None:
        with claim:
            meanwhile()
            raise error

    with pytest.raises(type(error)):
        start()


def test_a_start_that_comes_to_nothing_leaves_the_folder_as_it_was(config: Config, run: Store) -> None:
    before = contents(run)

    def meanwhile() -> None:
        assert run_config(run).train.steps == 77
        assert not run.exists(layout.STOP)

    ends_with(DataError("no data"), resumed(override(config, "train.steps=77")), meanwhile)
    assert contents(run) == before
    assert read_owner(run) is None, "and free"


def test_so_does_one_of_a_new_name(config: Config) -> None:
    run = run_folder(config)
    ends_with(DataError("no data"), claimed(config, by="capstan train", resume=False, code=None, log=print))
    assert contents(run) == {}


def test_a_new_run_that_waits_for_its_job_is_there_and_its_submitters_own(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = run_folder(config)
    with claimed(config, by="capstan submit ray", resume=False, code=None, log=print, group="job", waits=True):
        pass
    assert run_config(run) == submitted_config(run) == config
    assert run.exists(layout.SUBMITTED)
    assert is_own(run)


@pytest.mark.parametrize("waiting", [True, False], ids=["over a job that waits", "alone"])
def test_a_submission_that_fails_leaves_no_settings_and_those_of_the_job_that_waits(
    config: Config, run: Store, waiting: bool
) -> None:
    how = {"by": "capstan submit ray", "resume": True, "code": None, "log": print, "take_over": True, "waits": True}
    if waiting:
        with claimed(override(config, "train.steps=55"), **how, group="waiting"):
            pass
    run.put(layout.DRIVER_LOG, b"said")
    run.put(layout.SLURM_SCRIPT, b"#!/bin/bash")
    before = contents(run)

    def meanwhile() -> None:
        assert submitted_config(run).train.steps == 77
        run.put(layout.DRIVER_LOG, b"of the job that was refused")
        run.put(layout.SLURM_SCRIPT, b"of the job that was refused")

    ends_with(ConfigError("refused"), claimed(override(config, "train.steps=77"), **how, group="job"), meanwhile)
    assert contents(run) == before


def test_a_name_with_checkpoints_is_not_taken_for_a_new_run(config: Config) -> None:
    run = run_folder(config)
    run.create(layout.manifest(4), b"a checkpoint")
    with (
        pytest.raises(ConfigError, match="exists and has checkpoints. `capstan resume mine --store .*` continues it"),
        claimed(config, by="capstan train", resume=False, code=None, log=print),
    ):
        raise AssertionError("the run was replaced")


def test_settings_and_code_that_ranks_refused_do_not_stay(config: Config, run: Store) -> None:
    now = override(config, "train.micro_batch=2")
    code: Any = SimpleNamespace(archive=lambda settings: f"code beside {settings}".encode())
    run.put(layout.SNAPSHOT, b"as before")

    def meanwhile() -> None:
        assert run.get(layout.SNAPSHOT).decode() == f"code beside {dump_config(now)}"
        run.create(layout.metrics(2), b"")

    claim = claimed(now, by="capstan resume", resume=True, code=code, log=print, take_over=True)
    ends_with(ConfigError("refused by a rank"), claim, meanwhile)
    assert run_config(run).train.micro_batch == config.train.micro_batch
    assert run.get(layout.SNAPSHOT) == b"as before"


def test_a_new_run_whose_ranks_began_stays_with_its_settings(config: Config) -> None:
    run = run_folder(config)
    claim = claimed(config, by="capstan train", resume=False, code=None, log=print)
    ends_with(DataError("later"), claim, lambda: run.create(layout.metrics(1), b""))
    assert run_config(run) == config


def test_settings_that_were_trained_with_stay_and_what_changed_is_told_and_kept(config: Config, run: Store) -> None:
    said: list[str] = []
    now = override(config, "train.steps=77", "cluster.ray.runtime_env={env_vars: {A: b}}")
    changes = list[SettingChange]()

    def meanwhile() -> None:
        run.create(layout.metrics(2), b"")
        changes.extend(record_settings(run, 2, now))

    ends_with(DataError("later"), resumed(now, said), meanwhile)
    assert run_config(run).train.steps == 77
    assert ("train.steps", 10, 77) in changes
    assert ("cluster.ray.runtime_env.env_vars.A", None, "b") in changes
    assert "train.steps is 77 from now on; it was 10" in said


@pytest.mark.parametrize("damaged", [b"", b"a: [", b"\xff", b"- 1\n", b"a: !unknown 1\n"], ids=str)
def test_settings_that_cannot_be_read_are_as_if_they_were_not_kept(config: Config, run: Store, damaged: bytes) -> None:
    run.put(layout.settings(2), damaged)
    now = override(config, "train.steps=77")
    (change,) = record_settings(run, 3, now)
    assert change.setting == "train.steps", "as compared with the start before"
    run.put(layout.settings(1), damaged)
    run.delete(layout.settings(3))
    assert record_settings(run, 3, now) == []
    assert parse_config(run.get(layout.settings(3))) == now


def test_what_changed_is_told_against_the_last_start_alone(config: Config, run: Store) -> None:
    now = override(config, "train.steps=77")
    assert record_settings(run, 2, now) == [("train.steps", 10, 77)]
    assert record_settings(run, 3, now) == []
    assert record_settings(run, 4, config) == [("train.steps", 77, 10)]
    assert record_settings(run, 3, config) == [("train.steps", 77, 10)], "later starts do not count"


def test_of_two_claims_of_a_new_name_one_succeeds(config: Config) -> None:
    with (
        claimed(config, by="capstan train", resume=False, code=None, log=print),
        pytest.raises(ConfigError, match="has not begun|in use|just claimed"),
        claimed(config, by="capstan train", resume=False, code=None, log=print),
    ):
        raise AssertionError("the name was claimed twice")


def test_a_start_that_was_taken_over_puts_nothing_back(config: Config, run: Store) -> None:
    now = override(config, "train.steps=99")

    def meanwhile() -> None:
        with resumed(now):
            run.create(layout.metrics(2), b"")
            record_settings(run, 2, now)

    ends_with(DataError("too late"), resumed(override(config, "train.steps=77")), meanwhile)
    assert run_config(run).train.steps == 99
    assert read_owner(run) is None, "the other has ended in order"


def test_settings_of_a_start_that_trained_stay_though_its_next_attempt_did_not_begin(
    config: Config, run: Store
) -> None:
    now = override(config, "train.steps=77")

    def meanwhile() -> None:
        run.create(layout.metrics(2), b"")
        record_settings(run, 2, now)
        run.create(layout.metrics(3), b"")

    ends_with(DataError("later"), resumed(now), meanwhile)
    assert run_config(run).train.steps == 77


def test_a_submitted_resume_changes_the_run_only_when_its_ranks_train(config: Config, run: Store) -> None:
    now = override(config, "train.steps=77")
    how = {"by": "capstan submit ray", "resume": True, "code": None, "log": print, "take_over": True, "group": "job"}
    with claimed(now, **how, waits=True):
        pass
    owner = read_owner(run)
    assert owner is not None, "its job has the run until its turn comes"
    assert owner.group == "job"
    assert run_config(run).train.steps == 10
    assert submitted_config(run).train.steps == 77

    def its_turn() -> AbstractContextManager[Ownership]:
        return turn(submitted_config(run), "job", by="capstan submit ray", log=print)

    ends_with(DataError("no data there"), its_turn())
    assert run_config(run).train.steps == 10
    assert submitted_config(run).train.steps == 77, "the job may be started again"
    request_stop(run, by="me")
    with its_turn():
        assert run_config(run).train.steps == 77
        assert run.exists(layout.STOP), "whoever stops a job that waits is heard when its turn comes"
        assert run.exists(layout.SUBMITTED), "other processes of the job are about to read it"

    with resumed(config):
        assert not run.exists(layout.STOP)
        assert submitted_config(run) == run_config(run), "the job has nothing to do with the run any more"
    with pytest.raises(ConfigError, match="was taken by `capstan resume` on .* since this job was submitted"):
        its_turn()


def test_a_group_that_is_started_again_goes_on_with_its_own_run_alone(config: Config) -> None:
    how = {"by": "capstan train", "resume": False, "code": None, "log": print}
    with claimed(config, **how, group="slurm-1.0 torchrun-a"):
        with (
            pytest.raises(ConfigError, match="in use|has not begun"),
            claimed(config, **how, group="slurm-1.0 torchrun-b", again="torchrun-b"),
        ):
            raise AssertionError("another group's run was taken")
        with claimed(config, **how, group="slurm-1.0 torchrun-a", again="torchrun-a"):
            pass


@pytest.mark.parametrize("again", [False, True], ids=["a new run", "a run that goes on"])
def test_what_a_driver_without_a_terminal_said_is_found_where_it_never_began(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run.delete(layout.metrics(1))
    if again:
        record_end(run, "stopped by a person", stopped=True)
    owner = take(run, "capstan submit ray", 0, group="job", waits=True)
    program = "import os; print('its own session:', os.getsid(0) == os.getpid()); input(); print('no torch here')"
    kept = tmp_path / "capstan" / "drivers"
    kept.mkdir(parents=True)
    for days, name in ((40, "old"), (20, "new")):
        (kept / f"{name}.out").touch()
        then = time.time() - 86400 * days
        os.utime(kept / f"{name}.out", (then, then))
    jobs._start_process([sys.executable, "-c", program], owner)
    assert [(kept / f"{name}.out").exists() for name in ("old", "new")] == [False, True], "a month is kept"
    assert owner.owner.process is not None
    deadline = time.monotonic() + 120
    while (told := read_status(run)).state != "silent":
        assert told.state == "starting"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "died before its first record" in told.reason
    assert re.search(
        rf"Its output is in {tmp_path}/capstan/drivers/\S+\.out on {socket.gethostname()}; it ends: ", told.reason
    )
    assert "EOFError" in told.reason
    assert read_driver_log(run).startswith("its own session: True\n"), "it outlives the terminal"
    # Nobody makes another person's command show a file of theirs, or one of another machine.
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for other in (replace(owner.owner, output=str(secret)), replace(owner.owner, place="elsewhere")):
        run.put(layout.owner(1), json.dumps(asdict(other)).encode())
        with pytest.raises(ConfigError, match=f"What its driver says is in {other.output} on {socket.gethostname()}"):
            read_driver_log(run)


@pytest.mark.parametrize(
    ("environment", "name", "again"),
    [
        ({}, None, None),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}, "torchrun-x", None),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}, "torchrun-x", "torchrun-x"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, "slurm-7.0", None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "2"}, "slurm-7.0", "slurm-7.0"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x"}, "slurm-7.batch torchrun-x", None),
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"},
            "slurm-7.batch torchrun-x",
            "torchrun-x",
        ),
    ],
)
def test_a_group_keeps_its_name_over_restarts(environment: dict[str, str], name: str | None, again: str | None) -> None:
    assert (group_name(environment), restarted_as(environment)) == (name, again)


def test_torchruns_agent_names_a_group_that_was_given_no_name() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert restarted_as(environment) == group_name(environment)
    assert str(os.getppid()) in (group_name(environment) or "")


def test_a_rank_waits_for_data_as_long_as_rank_0_lives(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = run_folder(config)
    first = take(run, "capstan train", 0, group="srun")

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 10 * config.timeouts.meet:
            first.end()

    with pytest.raises(DataError, match="rank 0, which compiles the data, has ended"):
        wait_for_first_rank(config, "srun", sleep)
    assert 0 < clock[0] - 10 * config.timeouts.meet < 20


def test_a_rank_does_not_wait_for_a_rank_0_whose_process_is_gone_before_it_had_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [0.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def is_gone(rank: int) -> bool:
        asked.append(rank)
        return len(asked) == 3

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("launcher.start.claim.Siblings", lambda: SimpleNamespace(is_gone=is_gone))
    with pytest.raises(DataError, match="rank 0, which compiles the data, has ended"):
        wait_for_first_rank(config, "srun", sleep)
    assert asked == [0, 0, 0]
    assert clock[0] < 10

    asked.clear()
    first = take(run_folder(config), "capstan train", 0, group="srun")

    def ends(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 100:
            first.end()

    with pytest.raises(DataError, match="has ended"):
        wait_for_first_rank(config, "srun", ends)
    assert asked == [], "what the run's owner says counts once it is there"
    assert clock[0] > 100


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (ConfigError("it has 3 GB"), ["no copy of the code is kept with the run: it has 3 GB"]),
        ("left out: a.key", ["the copy of the code that is kept with the run: left out: a.key"]),
        ("", []),
    ],
    ids=str,
)
def test_a_run_goes_on_without_its_code_and_says_what_is_missing(
    taken: CapstanError | str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(left_out=lambda: taken)

    def take(directory: Path) -> Any:
        assert directory == tmp_path
        if isinstance(taken, CapstanError):
            raise taken
        return found

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.start.snapshot.take", take)
    log = list[str]()
    assert keep_code(log.append) is (None if isinstance(taken, CapstanError) else found)
    assert log == said


def test_a_rank_waits_for_so_long_for_a_rank_0_that_never_comes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    with pytest.raises(DataError, match=r"timeouts\.meet: rank 0, which compiles the data"):
        wait_for_first_rank(config, "srun", sleep)
    assert config.timeouts.meet < clock[0] < 1.1 * config.timeouts.meet


def test_the_more_ranks_wait_the_less_often_each_asks_the_store(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = [0.0], dict[int, int]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        looks[ranks] += 1

    for ranks in (2, 1024):
        clock[0], looks[ranks] = 0.0, 0
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        with pytest.raises(DataError, match=r"timeouts\.meet"):
            wait_for_first_rank(config, "srun", sleep)
    assert 1024 * looks[1024] <= 70 * clock[0] < 1024 * looks[2]


def test_a_rank_knows_that_rank_0_was_killed_before_they_met(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = run_folder(config)
    watch = OwnerWatch(run)
    first = take(run, "capstan train", 0)
    assert not watch.is_gone()
    killed = replace(first.owner, born="never")  # its number is another process's by now
    run.put(layout.owner(1), json.dumps(asdict(killed)).encode())
    assert not watch.is_gone()  # it may be starting anew
    clock[0] += 11
    assert watch.is_gone()
    far = replace(take(run, "capstan train", 1).owner, place="another machine")
    assert not watch.is_gone()
    run.put(layout.owner(2), json.dumps(asdict(far)).encode())
    assert not watch.is_gone()
    os.utime(Path(run.uri.removeprefix("file://"), layout.owner(2)), (0, 0))
    clock[0] += 1000
    assert not watch.is_gone(), "one on another machine may only be silent"


def test_a_secret_of_an_earlier_versions_settings_is_not_written_again(config: Config, run: Store) -> None:
    run.delete(layout.settings(1))
    secret = "hf_" + "Ab3" * 11
    old = config.model_dump(mode="json")
    old["cluster"]["ray"]["runtime_env"] = {"env_vars": {"HF_TOKEN": secret}}
    run.put(layout.CONFIG, yaml.safe_dump(old).encode())
    said: list[str] = []
    with resumed(config, said):
        pass
    assert not [key for key, data in contents(run).items() if secret.encode() in data]
    assert [line for line in said if "HF_TOKEN" in line and secret not in line]
