"""A run's folder is taken for a start, and given back as it was when nothing comes of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launcher.start.claim import claimed
from tests.material import Workshop
from trainer.config import Config, dump_config, override
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.run import layout
from trainer.run.folder import run_config, run_folder
from trainer.run.requests import request_stop
from trainer.run.settings import Change, record_settings
from trainer.store import Store


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
    return {entry.key: run.get(entry.key) for entry in run.list()}


def resumed(config: Config, log: list[str] | None = None):
    said = [] if log is None else log
    return claimed(config, by="capstan resume", resume=True, code=None, log=said.append)


def ends_with(
    error: CapstanError, claim: AbstractContextManager[Store], meanwhile: Callable[[], None] = lambda: None
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


def test_so_does_one_of_a_new_name(config: Config) -> None:
    run = run_folder(config)
    ends_with(DataError("no data"), claimed(config, by="capstan train", resume=False, code=None, log=print))
    assert contents(run) == {}


def test_settings_that_ranks_refused_do_not_stay(config: Config, run: Store) -> None:
    claim = resumed(override(config, "train.micro_batch=2"))
    ends_with(ConfigError("refused by a rank"), claim, lambda: run.create(layout.metrics(2), b""))
    assert run_config(run).train.micro_batch == config.train.micro_batch


def test_settings_that_were_trained_with_stay_and_what_changed_is_told_and_kept(config: Config, run: Store) -> None:
    said: list[str] = []
    now = override(config, "train.steps=77", "cluster.ray.runtime_env={env_vars: {A: b}}")
    changes = list[Change]()

    def meanwhile() -> None:
        run.create(layout.metrics(2), b"")
        changes.extend(record_settings(run, 2, now))

    ends_with(DataError("later"), resumed(now, said), meanwhile)
    assert run_config(run).train.steps == 77
    assert ("train.steps", 10, 77) in changes
    assert ("cluster.ray.runtime_env.env_vars.A", None, "b") in changes
    assert "train.steps is 77 from now on; it was 10" in said


def test_the_first_resume_of_an_earlier_versions_run_knows_what_it_was_trained_with(config: Config, run: Store) -> None:
    run.delete(layout.settings(1))
    with resumed(override(config, "train.steps=77")):
        (change,) = record_settings(run, 2, override(config, "train.steps=77"))
    assert change == ("train.steps", 10, 77)


def test_of_two_claims_of_a_new_name_one_succeeds(config: Config) -> None:
    with (
        claimed(config, by="capstan train", resume=False, code=None, log=print),
        pytest.raises(ConfigError, match="has not begun|in use|just claimed"),
        claimed(config, by="capstan train", resume=False, code=None, log=print),
    ):
        raise AssertionError("the name was claimed twice")
