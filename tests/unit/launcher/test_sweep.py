"""The policy of a sweep: what is tried, whose turn it is, who is stopped early, and what the metric depends on."""

import io
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from launcher.drive.sweep import _sharing_base, laid_out
from launcher.drive.tune import STEP, VALUE, TuneTrial, train_trial
from launcher.policy.comparable import Metric
from launcher.policy.trials import SearchPlan, planned, trial_config, trial_in_words
from launcher.start.attempts import stop_if_asked
from launcher.start.check import check
from launcher.view.listing import list_runs
from launcher.view.status import RunStatus
from launcher.view.sweep import (
    BY,
    EARLY,
    STOPPED_EARLY,
    Scores,
    SweepStatus,
    TrialStatus,
    best_trial,
    changes_since,
    read_plan,
    read_sweep,
    render_sweep,
    summary,
    trial_state,
)
from trainer.config import Config, dump_config, override, parse_config
from trainer.config.sweep import Sweep
from trainer.errors import ConfigError, Damaged, DataError, Stopped, Superseded
from trainer.run import layout
from trainer.run.folder import run_config
from trainer.run.owner import last_owner, take
from trainer.run.records import generations, read_records, record_line
from trainer.run.requests import read_stop, request_stop
from trainer.store.store import Store, open_store

LR = {"log_uniform": [1e-5, 1e-2]}
LOSS = Metric("eval", "loss", "min")


def config(sweep: dict[str, Any], **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "s", "store": "runs"},
        "model": {"base": "base"},
        "data": {"train": [{"path": "train.jsonl"}], "held_out": 0.1},
        "train": {"steps": 100},
        "eval": {"every": 10, "sets": {"general": {"path": "general.jsonl"}}},
        "sweep": sweep,
    }
    for name, changed in sections.items():
        tree[name] = {**tree.get(name, {}), **changed}
    return parse_config(yaml.safe_dump(tree, sort_keys=False))


def test_grids_are_crossed_and_draws_stay_within_their_bounds() -> None:
    tried = {
        "tuning.rank": {"grid": [8, 64]},
        "optim.lr": LR,
        "tuning.targets": {"grid": ["auto", ["q_proj"]]},
        "optim.warmup_steps": {"int": [3, 5]},
        "tuning.dropout": {"uniform": [0.0, 0.1]},
        "optim.schedule": {"choice": ["linear", "cosine"]},
    }
    trials = planned(config({"settings": tried, "samples": 50})).trials
    assert [trial.run for trial in trials] == [f"s-{number}" for number in range(1, 201)]
    grid = list(itertools.product([8, 64], ["auto", ["q_proj"]]))
    assert [(t.settings["tuning.rank"], t.settings["tuning.targets"]) for t in trials] == grid * 50
    rates = [trial.settings["optim.lr"] for trial in trials]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 10**-3.5 for rate in rates) == pytest.approx(100, abs=25)  # as many in each half of the decades
    assert {trial.settings["optim.warmup_steps"] for trial in trials} == {3, 4, 5}
    assert all(0 <= trial.settings["tuning.dropout"] <= 0.1 for trial in trials)
    assert {trial.settings["optim.schedule"] for trial in trials} == {"linear", "cosine"}
    narrow = {"optim.lr": {"uniform": [0.123441, 0.123442]}, "tuning.dropout": {"uniform": [0.098766, 0.098767]}}
    (trial,) = planned(config({"settings": narrow, "samples": 1})).trials
    assert trial.settings == {"optim.lr": 0.123441, "tuning.dropout": 0.098767}, "rounding leaves no bound behind"


def test_a_trial_has_its_settings_in_the_order_in_which_they_are_written() -> None:
    (trial,) = planned(config({"settings": {"optim.lr": LR, "tuning.rank": {"grid": [4]}}, "samples": 1})).trials
    assert list(trial.settings) == ["optim.lr", "tuning.rank"]


def test_the_same_seed_tries_the_same_and_more_samples_or_settings_change_none_of_it() -> None:
    first = planned(config({"settings": {"optim.lr": LR}})).trials
    assert len(first) == 8
    assert planned(config({"settings": {"optim.lr": LR}, "samples": 12})).trials[:8] == first
    both = planned(config({"settings": {"tuning.dropout": {"uniform": [0, 0.5]}, "optim.lr": LR}})).trials
    assert [trial.settings["optim.lr"] for trial in both] == [trial.settings["optim.lr"] for trial in first]
    assert planned(config({"settings": {"optim.lr": LR}, "seed": 1})).trials != first


@pytest.mark.parametrize("wrong", [[], ["quant.cache: true has no effect, as the base is quantized already."]])
def test_trials_share_a_quantized_base_if_it_may_be_kept(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = SimpleNamespace(in_4_bits=False, mismatches=lambda config: wrong if config.quant.cache else [])
    monkeypatch.setattr("launcher.drive.sweep.describe_base", lambda model: base)
    begun = config({"settings": {"optim.lr": LR}}, quant={"type": "nf4"})
    assert bool(_sharing_base(begun).quant.cache) is (not wrong)
    own = config({"settings": {"optim.lr": LR}}, quant={"type": "nf4", "cache": False})
    assert _sharing_base(own) == own


def test_no_two_trials_are_the_same_and_there_are_no_more_than_there_are_values() -> None:
    ranks = {"tuning.rank": {"choice": [8, 16, 64]}}
    tried = planned(config({"settings": ranks, "samples": 8})).trials
    assert sorted(trial.settings["tuning.rank"] for trial in tried) == [8, 16, 64]
    assert [trial.run for trial in tried] == ["s-1", "s-2", "s-3"]
    assert planned(config({"settings": ranks, "samples": 2})).trials == tried[:2]
    both = {**ranks, "optim.schedule": {"grid": ["linear", "cosine", "linear"]}, "optim.warmup_steps": {"int": [3, 4]}}
    trials = planned(config({"settings": both, "samples": 50})).trials
    assert len(trials) == len({tuple(trial.settings.values()) for trial in trials}) == 3 * 2 * 2
    assert len(planned(config({"settings": {**ranks, "optim.lr": LR}, "samples": 50})).trials) == 50


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (
            [
                *("sweep.samples=5", "sweep.concurrent=1", "cluster.workers=2", "track.print_steps=7"),
                *("retry.failures=9", "timeouts.meet=77"),
            ],
            None,
        ),
        (["sweep.samples=6"], r"trial 6 \(lr=.*\): model\.base: "),
        (["train.steps=99"], "train.steps: 99 would set later trials of .* apart from those before, which had 100"),
        (["data.train=[{path: /other.jsonl}]"], "data.train: "),
        (["model.base=/other"], "model.base: "),
        (["sweep.settings={optim.lr: {log_uniform: [1.0e-5, 1.0e-3]}}"], "sweep: .* has tried other values"),
    ],
)
def test_a_sweep_goes_on_with_what_its_trials_had(tmp_path: Path, overrides: list[str], refused: str | None) -> None:
    sections = {"run": {"name": "s", "store": str(tmp_path)}, "quant": {"cache": False}, "model": {"base": "/base"}}
    data = {
        "data": {"train": [{"path": "/train.jsonl"}], "held_out": 0.1},
        "eval": {"sets": {"general": {"path": "/g.jsonl"}}},
    }
    begun = config({"settings": {"optim.lr": LR}, "samples": 2}, **sections, **data)
    store = open_store(str(tmp_path))
    for name in ("s", *(f"s-{number}" for number in range(1, 6))):
        store.sub(name).put(layout.CONFIG, dump_config(begun).encode())
    store.sub("s").put(layout.SWEEP, json.dumps(planned(begun).to_json()).encode())
    resumed = run_config(store.sub("s"), overrides)
    if refused:
        with pytest.raises(ConfigError, match=refused):
            laid_out(resumed, resume=True)
    else:
        assert len(laid_out(resumed, resume=True)[1].trials) == 5


def test_a_search_gives_up_after_a_thousand_draws_that_were_all_tried_before(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = itertools.count()
    monkeypatch.setattr("launcher.policy.trials._draws", lambda *_: (next(drawn) * 0 + 1e-3 for _ in itertools.count()))
    assert len(planned(config({"settings": {"optim.lr": LR}, "samples": 3})).trials) == 1
    assert next(drawn) == 1 + 1000


def test_a_trial_over_a_revision_of_a_base_has_the_commit_of_that_revision() -> None:
    tried = config({"settings": {"model.revision": {"grid": ["v1", "v2", "v3"]}}}, model={"base": "a/b"})
    plan = replace(
        planned(tried), bases={"a/b@v1": {"commit": "c1"}, "a/b@v2": {"commit": "c2"}, "a/b@": {"commit": "c0"}}
    )
    assert [plan.config_of(tried, trial).model.revision for trial in plan.trials] == ["c1", "c2", "v3"]


def test_a_trial_is_the_run_with_its_values_and_without_the_sweep() -> None:
    whole = config({"settings": {"tuning.targets": {"grid": [["q_proj", "v_proj"]]}, "optim.lr": {"grid": ["1e-3"]}}})
    (trial,) = planned(whole).trials
    own = trial_config(whole, trial)
    assert (own.run.name, own.tuning.targets, own.optim.lr) == ("s-1", ["q_proj", "v_proj"], 1e-3)
    assert own.sweep == Sweep()
    assert own.data == whole.data
    assert trial_in_words(trial.settings) == 'targets=["q_proj", "v_proj"] lr=0.001'


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ({"settings": {"optim.lrr": LR}}, "sweep.settings: 'optim.lrr' is no setting. Did you mean 'optim.lr'?"),
        (
            {"settings": {"run.name": {"grid": ["a"]}}},
            "sweep.settings: 'run.name' is the same in all trials of a sweep.",
        ),
        ({"settings": {"optim.lr": 0.1}}, "sweep.settings.optim.lr: 0.1 is not allowed. Give one of grid, choice"),
        ({"settings": {"optim.lr": {"grid": [1], "choice": [2]}}}, "is not allowed. Give one of grid, choice"),
        (
            {"settings": {"cluster.ray.address": {"grid": ["auto"]}}},
            "sweep.settings: 'cluster.ray.address' is the same in all trials of a sweep.",
        ),
        ({"settings": {"optim.lr": {"uniform": [False, True]}}}, "Give [lowest, highest]."),
        ({"settings": {"optim.lr": {"log_uniform": [0, 1]}}}, "Both must be above 0."),
        ({"settings": {"optim.lr": {"uniform": [2, 1]}}}, "Give [lowest, highest]."),
        ({"settings": {"optim.lr": {"uniform": [1, 1]}}}, "Give [lowest, highest]."),
        ({"settings": {"sweep.seed": {"grid": [1]}}}, "'sweep.seed' is the same in all trials of a sweep."),
        ({"settings": {"tuning.rank": {"int": [1.5, 4]}}}, "Give two whole numbers"),
        ({"settings": {"tuning.rank": {"int": [1, 4.5]}}}, "Give two whole numbers"),
        ({"settings": {"tuning.rank": {"grid": []}}}, "Give a list of values."),
        (
            {"settings": {"tuning.rank": {"grid": [4, 8]}}, "samples": 2},
            "sweep.samples: 2 would repeat the same trials",
        ),
        ({"settings": {"optim.lr": LR}, "metric": "genral"}, "sweep.metric: 'genral' is not measured by this run."),
        ({"settings": {"optim.lr": LR}, "grace_steps": 9}, "sweep.grace_steps: 9 steps need an evaluation by then"),
        ({"setings": {}}, "sweep.setings: unknown setting. Did you mean 'settings'?"),
    ],
)
def test_a_mistake_in_the_search_is_one_sentence(sweep: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(sweep)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_search_at_the_edge_of_what_is_allowed_is_planned() -> None:
    assert len(planned(config({"settings": {"optim.lr": LR}, "grace_steps": 10, "samples": 3})).trials) == 3
    assert len(planned(config({"settings": {"tuning.rank": {"grid": [4, 8]}}, "samples": 1})).trials) == 2
    by_epoch = config(
        {"settings": {"optim.lr": LR}, "grace_steps": 10, "samples": 3}, eval={"every": 0, "per_epoch": 2}
    )
    assert len(planned(by_epoch).trials) == 3, "how many steps lie between evaluations is not known yet"
    with pytest.raises(ConfigError, match="the run evaluates only at its end. Evaluate at least so often"):
        config({"settings": {"optim.lr": LR}, "grace_steps": 10}, eval={"every": 0})


def test_a_value_that_no_run_may_have_names_the_trial() -> None:
    whole = config({"settings": {"optim.lr": {"grid": [1e-3, 5.0]}}})
    first, second = planned(whole).trials
    trial_config(whole, first)
    with pytest.raises(ConfigError, match=r"trial 2 \(lr=5\) is not allowed\. optim\.lr: 5\.0"):
        trial_config(whole, second)


def test_a_single_run_refuses_the_search() -> None:
    with pytest.raises(ConfigError, match="sweep.settings: a single run tries no settings"):
        check(config({"settings": {"optim.lr": LR}}), resume=False)
    with pytest.raises(ConfigError, match="sweep.settings: missing"):
        planned(config({}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def write_sweep(store: Store, trials: int = 4, **rules: Any) -> Store:
    folder = store.sub("s")
    settings = {"optim.lr": {"grid": [10.0**-number for number in range(1, trials + 1)]}}
    whole = config({"settings": settings, **rules}, run={"store": str(store.uri.removeprefix("file://"))})
    folder.put(layout.CONFIG, dump_config(whole).encode())
    folder.put(layout.SWEEP, json.dumps(planned(whole).to_json()).encode())
    return folder


def write_run(run: Store, *evals: tuple[int, float], end: str | None = None) -> None:
    lines = record_line("start", {"step": 0, "total_steps": 40})
    for step, loss in evals:
        lines += record_line("step", {"step": step, "loss": 9.0}) + record_line("eval", {"step": step, "loss": loss})
    if end:
        lines += record_line("end", {"outcome": end, "reason": "so"})
    run.put(layout.metrics(1), lines)


def test_a_sweeps_state_is_read_from_the_folders_of_its_trials(store: Store) -> None:
    folder = write_sweep(store)
    write_run(store.sub("s-1"), (10, 3.0), (40, 2.0), end="finished")
    write_run(store.sub("s-2"), (10, 1.5), end="stopped")
    request_stop(store.sub("s-2"), by=EARLY)
    write_run(store.sub("s-3"), (10, 4.0), end="stopped")
    status = read_sweep(folder)
    assert read_plan(folder) == SearchPlan(LOSS, read_plan(folder).trials)
    assert [trial.state for trial in status.trials] == ["finished", "stopped early", "stopped", "waiting"]
    assert (status.state, status.best) == ("stopped", 2)
    owner = take(folder, "capstan sweep", 0)
    assert read_sweep(folder).state == "running"
    owner.end()
    assert read_sweep(folder).state == "stopped"
    gone = {**asdict(take(folder, "capstan sweep", 1).owner), "born": "1"}
    folder.put(layout.owner(2), json.dumps(gone).encode())
    assert read_sweep(folder).state == "silent"
    assert status.next.startswith("capstan resume s")
    assert status.sensitivity[0].step == 10
    assert "best so far: s-2 (lr=0.01), eval 1.5000 at step 10" in summary(status)
    assert read_sweep(folder).sensitivity == [], "some of its trials may still be running"
    assert json.loads(json.dumps(asdict(status)))["trials"][1]["value"] == 1.5

    write_run(store.sub("s-3"), (10, 4.0), (40, 1.0), end="finished")
    write_run(store.sub("s-4"), (10, float("nan")), end="failed")
    status = read_sweep(folder)
    assert (status.state, status.best) == ("finished", 3)
    assert status.next.startswith("capstan export s-3 adapter/")
    assert status.sensitivity[0].trials == 3  # the one that failed has nothing to tell
    assert "best: s-3 (lr=0.001), eval 1.0000 at step 40" in summary(status)


def test_a_list_of_runs_has_a_sweep_beside_its_trials(store: Store) -> None:
    folder = write_sweep(store)
    write_run(store.sub("s-1"), (10, 3.0), end="finished")
    store.sub("s-1").put(layout.CONFIG, folder.get(layout.CONFIG))
    assert {line.run: (line.state, line.trials) for line in list_runs(store).runs} == {
        "s": ("over", 4),
        "s-1": ("finished", None),
    }
    owner = take(folder, BY, 0)
    assert [line.state for line in list_runs(store).runs if line.run == "s"] == ["running"]
    elsewhere = replace(owner.owner, place="elsewhere")
    folder.put(layout.owner(1), json.dumps(asdict(elsewhere)).encode())
    lost = read_sweep(folder, clock=lambda: elsewhere.time + 1000)
    assert (lost.state, lost.next.startswith("capstan resume s ")) == ("silent", True)
    owner.end()
    assert [line.state for line in list_runs(store).runs if line.run == "s"] == ["over"]


def test_a_folder_without_a_sweep_or_with_a_damaged_one_is_called_so(store: Store) -> None:
    with pytest.raises(ConfigError, match="holds no sweep.json, so it is no sweep"):
        read_sweep(store.sub("s"))
    folder = write_sweep(store)
    for text in ("{", "[]", '{"metric": {}, "trials": []}', '{"trials": 1}'):
        folder.put(layout.SWEEP, text.encode())
        with pytest.raises(Damaged, match=r"sweep\.json is damaged"):
            read_sweep(folder)


def test_a_line_tells_of_each_trial_that_has_changed(store: Store) -> None:
    folder = write_sweep(store, trials=2)
    before = read_sweep(folder)
    assert changes_since(None, before) == []
    write_run(store.sub("s-2"), (10, 3.0), end="failed")
    now = read_sweep(folder)
    assert changes_since(before, now) == ["s-2 (lr=0.01): failed at step 10 of 40, eval 3.0000: so"]
    assert changes_since(now, now) == []


def test_a_trial_that_is_over_or_somebody_elses_is_left_as_it_is(store: Store) -> None:
    folder = write_sweep(store, trials=2)
    first, second = (trial_config(run_config(folder), trial) for trial in read_plan(folder).trials)
    write_run(store.sub("s-1"), (40, 2.0), end="finished")
    train_trial(first, {})
    take(store.sub("s-2"), "capstan resume", 0)
    with pytest.raises(ConfigError, match="is in use by `capstan resume`"):
        train_trial(second, {})
    assert [generations(store.sub(run)) for run in ("s-1", "s-2")] == [[1], []]


def test_a_trial_that_is_asked_to_stop_while_it_starts_again_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(store, trials=2)
    trial, run = trial_config(run_config(folder), read_plan(folder).trials[1]), store.sub("s-2")
    run.put(layout.CONFIG, dump_config(trial).encode())
    run.put(layout.manifest(10), b"{}")
    write_run(run, (10, 4.0), end="stopped")
    request_stop(run, by=BY)

    def stopped(*_arguments: object, **_more: object) -> None:
        request_stop(run, by=EARLY, reason="early, as others were better at step 10")
        stop_if_asked(run, "while the run was starting")

    monkeypatch.setattr("launcher.drive.tune.compile_and_train", stopped)
    assert read_sweep(folder).trials[1].state == "stopped"
    with pytest.raises(Stopped):
        train_trial(trial, {})
    status = read_sweep(folder).trials[1]
    assert (status.state, status.step) == ("stopped early", 10)
    assert "stopped early, as others were better at step 10 while the run was starting" in status.reason
    # Ranks that are about to end read the request, too, and a trial that Tune begins again is asked as before.
    assert read_stop(run) == (EARLY, "early, as others were better at step 10")


def test_a_trial_that_fails_or_whose_process_is_ended_says_so_and_no_signal_reaches_its_next_start(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(store, trials=2)
    first, second = (trial_config(run_config(folder), trial) for trial in read_plan(folder).trials)

    def fails(*_arguments: object, **_more: object) -> None:
        raise DataError("line 7")

    def signalled(config: Config, owner: Any, *_arguments: object, **_more: object) -> None:
        request_stop(owner.run, by="SIGTERM")
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr("launcher.drive.tune.compile_and_train", fails)
    with pytest.raises(DataError):
        train_trial(first, {})
    monkeypatch.setattr("launcher.drive.tune.compile_and_train", signalled)
    with pytest.raises(Stopped):
        train_trial(second, {})
    assert [(trial.state, trial.reason) for trial in read_sweep(folder).trials] == [
        ("failed", "line 7"),
        ("stopped", "stopped by SIGTERM"),
    ]
    assert read_stop(store.sub("s-2")) is None


def test_a_trial_that_another_start_has_taken_over_leaves_its_records_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(store, trials=1)
    trial, run = trial_config(run_config(folder), read_plan(folder).trials[0]), store.sub("s-1")

    def superseded(*_arguments: object, **_more: object) -> None:
        write_run(run, (10, 4.0))  # the other start's
        raise Superseded("another start has the run")

    monkeypatch.setattr("launcher.drive.tune.compile_and_train", superseded)
    with pytest.raises(Superseded):
        train_trial(trial, {})
    assert "end" not in {record["kind"] for record in read_records(run, 1)}


def test_a_trial_begins_with_its_first_step_and_tells_its_figures_where_asha_looks(store: Store) -> None:
    folder = write_sweep(store, trials=2, grace_steps=10)
    write_run(store.sub("s-1"), (0, 9.0), (10, 3.0), (20, 2.5), (40, 2.0), end="finished")
    done, waiting = (TuneTrial.__new__(TuneTrial) for _ in range(2))
    waiting.setup({"sweep": folder.uri, "trial": 2})
    assert last_owner(store.sub("s-2")) is None
    done.setup({"sweep": folder.uri, "trial": 1})
    assert [done.step() for _ in range(3)] == [{STEP: 10, VALUE: 3.0}, {STEP: 40, VALUE: 2.0}, {"done": True}]
    take(store.sub("s-2"), "capstan resume", 0)
    refused = waiting.step()
    assert (refused["done"], refused["exit_code"]) == (True, 2)
    assert "is in use by `capstan resume`" in refused["reason"]


@pytest.mark.parametrize(("mode", "worst"), [("min", 1e30), ("max", -1e30)])
def test_a_figure_that_is_no_number_is_the_worst(store: Store, mode: str, worst: float) -> None:
    folder = write_sweep(store, trials=2, grace_steps=10)
    trial = TuneTrial.__new__(TuneTrial)
    plan = read_plan(folder)
    folder.put(layout.SWEEP, json.dumps(replace(plan, metric=plan.metric._replace(mode=mode)).to_json()).encode())
    write_run(store.sub("s-1"), (0, 9.0), (10, float("nan")), (40, 2.0), end="finished")
    trial.setup({"sweep": folder.uri, "trial": 1})
    assert trial.step() == {STEP: 10, VALUE: worst}


def test_scores_follow_a_run_over_its_starts(store: Store) -> None:
    lines = b"".join(record_line("step", {"step": step, "loss": float(step)}) for step in range(1, 16))
    general = record_line("eval", {"step": 15, "set": "general", "loss": 7.0, "accuracy": 0.5})
    store.put(layout.metrics(1), lines + general + record_line("eval", {"step": 15, "loss": 8.0}))
    train = Scores(store, Metric("train", "loss", "min"))
    assert train.read()[15] == pytest.approx(10.5)  # the mean of 6 to 15
    assert Scores(store, LOSS).read() == {15: 8.0}
    assert Scores(store, Metric("general", "accuracy", "max")).read() == {15: 0.5}
    store.put(layout.metrics(2), record_line("step", {"step": 15, "loss": 115.0}))  # taken again after a kill
    assert train.read()[15] == pytest.approx(20.5)
    evaluated = Scores(store, LOSS)
    assert list(evaluated.read()) == [15]
    again = [record_line("eval", {"step": step, "loss": 1.0}) for step in (10, 20)]
    store.put(layout.metrics(3), b"".join(again))  # at other steps, from a checkpoint before
    assert list(evaluated.read()) == [10, 15, 20]


def test_the_best_is_the_lowest_or_the_highest_as_the_mode_says() -> None:
    trials = [TrialStatus(number, "", {}, "running", value=float(number)) for number in (2, 1, 3)]
    lowest, highest = (best_trial(trials, Metric("eval", "loss", mode)) for mode in ("min", "max"))
    assert lowest is not None
    assert highest is not None
    assert (lowest.number, highest.number) == (1, 3)
    assert best_trial([TrialStatus(1, "", {}, "failed", value=1.0)], LOSS) is None
    finished = TrialStatus(4, "", {}, "finished", value=2.5)
    every = [*trials, TrialStatus(5, "", {}, STOPPED_EARLY, value=0.5), finished]
    by_rows, by_set = (best_trial(every, Metric(of, "loss", "min")) for of in ("train", "eval"))
    assert by_rows == finished  # the rows of the others' steps were easier, or not
    assert by_set == every[3]
    running = best_trial(trials, Metric("train", "loss", "min"))
    assert running is not None
    assert running.number == 1, "as long as none has finished"
    assert isinstance(SweepStatus("u", "finished", "eval", "min", trials).counts(), dict)


@pytest.mark.parametrize(
    ("run", "asked_by", "state"),
    [
        ({"state": "starting"}, None, "waiting"),
        ({"state": "starting", "reason": "`capstan sweep` checks what it needs"}, None, "starting"),
        ({"state": "starting", "generation": 1}, None, "starting"),
        ({"state": "stopped", "generation": 1}, EARLY, STOPPED_EARLY),
        ({"state": "stopped", "generation": 1}, BY, "stopped"),
        ({"state": "stopped", "generation": 1}, "alice", "stopped"),
        ({"state": "stopped", "generation": 1}, None, "stopped"),
        ({"state": "running", "generation": 1}, EARLY, "running"),
    ],
)
def test_the_state_of_a_trial_is_that_of_its_run_but_before_its_turn_and_after_an_early_end(
    run: dict[str, Any], asked_by: str | None, state: str, store: Store
) -> None:
    if asked_by:
        request_stop(store, by=asked_by)
    assert trial_state(store, RunStatus(store.uri, **run)) == state


PAIRS = {
    "objective": {"name": "dpo"},
    "data": {"format": "preference"},
    "eval": {"sets": {"general": {"path": "g", "format": "text"}}},
}


@pytest.mark.parametrize(
    ("sweep", "sections", "sentence"),
    [
        (
            {"metric": "eval/accuracy"},
            {},
            "sweep.metric: 'eval/accuracy' is in no record of this run. Allowed for eval: eval.",
        ),
        ({"metric": "eval/accuracy"}, PAIRS, "Allowed for eval: eval, eval/reward_chosen, eval/reward_rejected, "),
        ({"metric": "general/reward_accuracy"}, PAIRS, "Allowed for general: general."),
        ({"metric": "eval/reward_accuracy", "mode": "min"}, PAIRS, "sweep.mode: min would choose the worst trial"),
        (
            {"metric": "eval/length_chosen"},
            PAIRS,
            "sweep.mode: missing. Say whether a low or a high eval/length_chosen",
        ),
    ],
)
def test_a_metric_that_no_record_has_or_the_wrong_way_round_is_refused(
    sweep: dict[str, Any], sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(config({"settings": {"optim.lr": LR}, **sweep}, **sections))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("sweep", "sections", "mode"),
    [
        ({}, {}, "min"),
        ({"mode": "max"}, {}, "max"),
        ({"metric": "eval/reward_accuracy"}, PAIRS, "max"),
        ({"metric": "eval/reward_margin"}, PAIRS, "max"),
        ({"metric": "eval/micro_f1"}, {"objective": {"name": "multilabel_classification"}}, "max"),
        ({"metric": "eval/accuracy"}, {"objective": {"name": "classification"}}, "max"),
        ({"metric": "train/accuracy"}, {"objective": {"name": "classification"}}, "max"),
        ({"metric": "eval/length_chosen", "mode": "min"}, PAIRS, "min"),
    ],
)
def test_a_metric_says_which_way_is_good(sweep: dict[str, Any], sections: dict[str, Any], mode: str) -> None:
    assert planned(config({"settings": {"optim.lr": LR}, **sweep}, **sections)).metric.mode == mode


@pytest.mark.parametrize(
    ("name", "values", "metric", "sections", "comparable"),
    [
        ("data.sequence_length", [512, 1024], "eval", {}, False),
        ("data.train_on.end", [True, False], "general", {}, False),
        ("data.held_out", [0.1, 0.2], "eval", {}, False),
        ("data.held_out", [0.1, 0.2], "general", {}, True),
        ("data.held_out_seed", [1, 2], "eval", {}, False),
        ("data.packing", [True, False], "train", {}, False),
        (
            "data.eval",
            [[{"path": "a"}], [{"path": "b"}]],
            "eval",
            {"data": {"held_out": 0, "eval": [{"path": "c"}]}},
            False,
        ),
        ("data.eval", [[{"path": "a"}], [{"path": "b"}]], "general", {"data": {"held_out": 0}}, True),
        ("data.train", [[{"path": "a"}], [{"path": "b"}]], "eval", {}, False),
        (
            "data.train",
            [[{"path": "a"}], [{"path": "b"}]],
            "eval",
            {"data": {"held_out": 0, "eval": [{"path": "c"}]}},
            True,
        ),
        ("data.train", [[{"path": "a"}], [{"path": "b"}]], "train", {}, False),
        ("data.packing", [True, False], "eval", {}, True),
        ("eval.sets", [{"general": {"path": "a"}}, {"general": {"path": "b"}}], "general", {}, False),
        ("eval.sets", [{"general": {"path": "a"}}, {"general": {"path": "b"}}], "eval", {}, True),
        ("eval.sets", [{"general": {"path": "a"}}, {"general": {"path": "b"}}], "train", {}, True),
        ("objective.label_smoothing", [0.0, 0.1], "eval", {}, True),  # evaluations are without it
        ("objective.label_smoothing", [0.0, 0.1], "train", {}, False),
        ("objective.beta", [0.1, 0.5], "eval", PAIRS, False),
        ("objective.beta", [0.1, 0.5], "eval/reward_margin", PAIRS, False),
        ("objective.beta", [0.1, 0.5], "eval/reward_accuracy", PAIRS, True),
        ("objective.beta", [0.1, 0.5], "general", PAIRS, True),
        ("objective.name", ["dpo", "simpo"], "eval", PAIRS, False),
        ("objective.name", ["dpo", "simpo"], "eval/reward_accuracy", PAIRS, False),
        ("objective.name", ["orpo", "simpo"], "eval/reward_accuracy", PAIRS, True),
        ("quant.type", ["nf4", "none"], "eval", PAIRS, False),
        ("model.layers", [1, 2], "eval/reward_accuracy", PAIRS, False),
        ("quant.type", ["nf4", "none"], "general", PAIRS, True),
        ("quant.type", ["nf4", "none"], "eval", {}, True),
        ("optim.lr", [1e-4, 1e-3], "train", {}, True),
        ("tuning.dropout", [0.0, 0.1], "train", {}, False),
        ("tuning.dropout", [0.0, 0.1], "eval", {}, True),
        ("train.steps", [50, 100], "train", {}, False),
        ("train.epochs", [1, 2], "train", {}, False),
        ("train.global_batch", [8, 16], "train", {}, False),
        ("train.global_batch", [8, 16], "eval", {}, True),
        ("run.seed", [1, 2], "train", {}, False),
    ],
)
def test_settings_that_change_what_is_measured_are_not_tried_by_it(
    name: str, values: list[Any], metric: str, sections: dict[str, Any], comparable: bool
) -> None:
    tried = config({"settings": {name: {"grid": values}}, "metric": metric}, **sections)
    if comparable:
        assert len(planned(tried).trials) == 2
    else:
        with pytest.raises(
            ConfigError, match=f"sweep.settings: '{name}' changes the (tokens|formula|data|reference|rows|model)"
        ):
            planned(tried)


def test_a_trial_counts_with_its_newest_evaluation_behind_the_base_or_not_at_all(store: Store) -> None:
    folder = write_sweep(store)
    write_run(store.sub("s-1"), (10, 1.0), (40, float("nan")), end="finished")  # better, and then lost
    write_run(store.sub("s-2"), (0, 0.5))  # the base, which all have
    write_run(store.sub("s-3"), (0, 0.5), (10, 3.0), end="finished")
    status = read_sweep(folder)
    assert [(trial.value, trial.value_step) for trial in status.trials[:3]] == [(None, 40), (None, None), (3.0, 10)]
    assert status.best == 3
    screen = Console(file=io.StringIO(), width=120)
    with screen.capture() as shown:
        screen.print(render_sweep(status))
    assert "not finite" in shown.get()
    diverged = TuneTrial.__new__(TuneTrial)
    folder.put(layout.CONFIG, dump_config(override(run_config(folder), "sweep.grace_steps=10")).encode())
    diverged.setup({"sweep": folder.uri, "trial": 1})
    assert [diverged.step()[VALUE] for _ in range(2)] == [1.0, 1e30]


def test_a_trial_counts_only_over_the_data_that_the_first_one_has(store: Store) -> None:
    folder = write_sweep(store)
    for number, (trained, data, loss) in enumerate(
        [("t", "a", 3.0), ("t", "b", 1.0), ("t", "a", 2.0), ("u", "a", 0.5)], 1
    ):
        run = store.sub(f"s-{number}")
        begun = record_line("start", {"step": 0, "data": {"train": trained, "eval": data}})
        evaluated = record_line("eval", {"step": 40, "loss": loss})
        run.put(layout.metrics(1), begun + evaluated + record_line("end", {"outcome": "finished", "reason": "so"}))
    status = read_sweep(folder)
    assert (status.best, [trial.value for trial in status.trials[:3]]) == (3, [3.0, None, 2.0])
    assert [one.trials for one in status.sensitivity] == [2], "what is measured on other data tells nothing"
    assert any(line.startswith("s-2, s-4: trained or evaluated on other data") for line in summary(status))
    screen = Console(file=io.StringIO(), width=120)
    with screen.capture() as shown:
        screen.print(render_sweep(status))
    assert shown.get().count("other data") == 2 + 1


def test_trials_that_try_settings_of_the_data_may_be_trained_on_other_data(store: Store) -> None:
    folder = store.sub("s")
    tried = {"settings": {"data.packing": {"grid": [True, False]}, "optim.lr": {"grid": [0.1, 0.01]}}}
    whole = config({**tried, "metric": "general"}, run={"store": str(store.uri.removeprefix("file://"))})
    folder.put(layout.CONFIG, dump_config(whole).encode())
    folder.put(layout.SWEEP, json.dumps(planned(whole).to_json()).encode())
    for number, trained in enumerate("ttup", 1):
        begun = record_line("start", {"step": 0, "data": {"train": trained, "eval.sets.general": "g"}})
        evaluated = record_line("eval", {"step": 40, "set": "general", "loss": float(number)})
        store.sub(f"s-{number}").put(layout.metrics(1), begun + evaluated)
    assert [trial.value for trial in read_sweep(folder).trials] == [1.0, 2.0, 3.0, None]


def test_a_trial_that_ended_early_says_why_though_its_ranks_did_not_read_it(store: Store) -> None:
    folder = write_sweep(store)
    write_run(store.sub("s-1"), (10, 3.0), end="stopped")
    request_stop(store.sub("s-1"), by=EARLY, reason="early, as others were better at step 10")
    assert read_sweep(folder).trials[0].reason == "stopped early, as others were better at step 10"


def test_bases_with_other_tokenizers_are_no_trials_of_one_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.drive.sweep.check", lambda config, resume: SimpleNamespace(base=None))
    monkeypatch.setattr("launcher.drive.sweep.base_facts", lambda base: {})
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"other": name == "other"}))

    def tried(*names: str) -> Config:
        bases = {"model.base": {"grid": [str(tmp_path / name) for name in names]}}
        return config({"settings": bases}, quant={"cache": False}, run={"name": "s", "store": str(tmp_path / "runs")})

    assert len(laid_out(tried("one", "same"), resume=False)[1].trials) == 2
    with pytest.raises(ConfigError, match="'model.base' gives trials 1 and 3 different tokenizers"):
        laid_out(tried("one", "same", "other"), resume=False)
