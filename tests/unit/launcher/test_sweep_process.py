"""The process that owns a sweep: its folder, its exit code and what it says, without Ray Tune."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.drive import sweep
from launcher.policy.trials import End
from launcher.view.sweep import read_plan
from tests.material import Workshop
from tests.unit.run.made_records import end, start, step, write
from trainer.config import Config, dump_config, override
from trainer.errors import CapstanError, ConfigError, DataError, Stopped
from trainer.run import layout
from trainer.run.folder import is_own, run_config, run_folder
from trainer.run.owner import read_owner, take
from trainer.run.requests import request_stop
from trainer.store.store import Store

TRIED = "sweep={metric: train, settings: {optim.lr: {grid: [1.0e-3, 1.0e-2]}}}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("swept"))


@pytest.fixture
def config(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sweep, "check_local_device", lambda config: None)
    return workshop.config("s", f"run.store={tmp_path}/runs", "cluster.gpus_per_worker=0", TRIED)


def ran(
    config: Config, monkeypatch: pytest.MonkeyPatch, trains: Callable[[Store, int], End | None], resume: bool = False
) -> Any:
    """Run the sweep, of which each trial trains by this function of its folder and its number."""

    class Search:
        def __init__(self, config: Config, plan: Any, owner: Any) -> None:
            self.plan, self.folder, self.ends = plan, owner.run, dict[int, End]()

        def run(self) -> None:
            for trial in self.plan.trials:
                trial_folder = run_folder(override(config, f"run.name={trial.run}"))
                trial_folder.put(layout.CONFIG, dump_config(config).encode())
                if (found := trains(trial_folder, trial.number)) is not None:
                    self.ends[trial.number] = found

    monkeypatch.setattr(sweep, "_Search", Search)
    return sweep.run_sweep(config, resume=resume, take_over=False, live=False, log=lambda line: None)


def finishes(folder: Store, number: int) -> None:
    write(folder, 1, start(1), step(20, 3.0 - number), end("finished"))


def test_a_sweep_that_finishes_keeps_its_trials_and_its_result(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(config)

    def trains(trial: Store, number: int) -> None:
        assert run_config(folder).sweep == config.sweep
        assert is_own(folder)
        assert [one.number for one in read_plan(folder).trials] == [1, 2]
        assert read_owner(folder) is not None
        finishes(trial, number)

    status = ran(config, monkeypatch, trains)
    assert (status.state, status.best) == ("finished", 2)
    kept = json.loads(folder.get(layout.SWEEP))
    assert (kept["result"]["best"], len(kept["trials"])) == (2, 2)
    assert read_owner(folder) is None
    with pytest.raises(ConfigError, match=r"is a sweep already\. `capstan resume s` continues it"):
        ran(config, monkeypatch, trains)


def test_a_sweep_whose_trials_all_fail_ends_as_the_first_of_them(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(trial: Store, number: int) -> End:
        write(trial, 1, end("failed", f"no data {number}"))
        return End(DataError.exit_code if number == 1 else 1, f"no data {number}")

    with pytest.raises(CapstanError, match="^all 2 trials failed, the first with: no data 1$") as ended:
        ran(config, monkeypatch, fails)
    assert ended.value.exit_code == DataError.exit_code

    def goes_on(trial: Store, number: int) -> End | None:
        return End(1, "no data 2") if number == 2 else None

    with pytest.raises(CapstanError, match="^all 2 trials failed") as again:
        ran(config, monkeypatch, goes_on, resume=True)
    assert again.value.exit_code == CapstanError.exit_code, "the first has failed in an earlier process"

    def one_fails(trial: Store, number: int) -> None:
        write(trial, 1, end("failed", "no data")) if number == 1 else finishes(trial, number)

    assert ran(override(config, "run.name=other"), monkeypatch, one_fails).best == 2


def test_a_sweep_that_is_stopped_says_by_whom_and_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(config)

    def stops(by: str) -> Callable[[Store, int], End | None]:
        def trains(trial: Store, number: int) -> End | None:
            assert not folder.exists(layout.STOP) or number == 2, "the request before was for the process before"
            if number == 1:
                request_stop(folder, by=by)
                return finishes(trial, number)
            write(trial, 1, start(1), step(3, 2.0), end("stopped"))
            return End(75, "stopped with its sweep")

        return trains

    said = r"^stopped by alice; 1 of 2 trials are over\. `capstan resume s` goes on with the others\.$"
    with pytest.raises(Stopped, match=said):
        ran(config, monkeypatch, stops("alice"))
    assert folder.exists(layout.STOP), "whoever looks sees who has asked"
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM; 1 of 2"):
        ran(config, monkeypatch, stops("SIGTERM"), resume=True)
    assert not folder.exists(layout.STOP)
    assert ran(config, monkeypatch, finishes, resume=True).state == "finished"


def test_a_sweep_that_runs_is_not_begun_a_second_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    take(run_folder(config), "capstan sweep", 0)
    with pytest.raises(ConfigError, match="is in use by `capstan sweep`"):
        ran(config, monkeypatch, finishes)
    run = override(config, "run.name=run")
    run_folder(run).put(layout.CONFIG, b"run: {name: run}\n")
    with pytest.raises(ConfigError, match="is a run already"):
        ran(run, monkeypatch, finishes)
