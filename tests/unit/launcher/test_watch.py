"""What a run and a sweep are doing, in lines and in a table that is drawn again."""

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.view import listing, sweep, watch
from launcher.view.listing import RunLine
from launcher.view.status import ENDED, Restart, RunState, RunStatus, Summary
from launcher.view.sweep import SweepStatus, TrialStatus, watch_sweep, while_it_runs
from launcher.view.watch import render_status
from tests.unit.run.made_records import NOW
from trainer.errors import StorageError
from trainer.store.store import Store

RUNNING = RunStatus(
    "memory://run",
    "running",
    generation=3,
    restarts=[
        Restart(2, 100, "a machine left", "memory", lost_seconds=61.0, again=2, read_bytes=1234),
        Restart(3, None, "it broke", "neighbour"),
    ],
    lost_seconds=61.0,
    again=2,
    wrong_bytes=[f"step {number}: rank 1 holds a wrong byte" for number in range(1, 8)],
    world_size=4,
    machines={"node1": 2, "node2": 2},
    device="cpu",
    start_seconds={"launch": 1.0, "first_step": 3.25},
    start_slowest={"load": {"rank": 1, "machine": "node2", "seconds": 9.0, "median": 2.0}},
    step=120,
    total_steps=400,
    passes=1.999,
    epochs=3.0,
    lr=2e-4,
    loss_first=3.0,
    loss=1.5,
    reward=0.25,
    accuracy=0.75,
    eval_loss=1.75,
    eval_accuracy=0.5,
    eval_losses={"general": 2.0},
    tokens_per_second=1234.5,
    eta_seconds=120.0,
    last_commit_step=100,
    last_commit_age_seconds=30.0,
    quiet_seconds=3600.0,
    failed_saves=1,
    stop_requested=True,
    gpu_hours=2.5,
    cost=7.5,
)


def shown(status: RunStatus) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(render_status(status))
    return " ".join(console.export_text().split())


@pytest.mark.parametrize(
    "words",
    [
        "state running, nothing written for 1 h 0 min, asked to stop",
        "epoch 1.99 of 3",
        "loss 1.5000 nats (first 3.0000), held out 1.7500",
        "accuracy 75.0%, held out 50.0%",
        "reward 0.2500",
        "held out general 2.0000",
        "speed 1,234 tokens/s, 2 min 0 s left",
        "ranks 4 (node1: 2, node2: 2) on cpu",
        "on cpu " + " ".join(f"wrong step {number}: rank 1 holds a wrong byte" for number in (3, 4, 5, 6, 7)),
        "started 3.2 s to the first step (launch 1.0 s)",
        "late rank 1 on node2 was last: its load took 9.0 s, the median 2.0 s",
        "checkpoint step 100, 30 s ago",
        "saves 1 failed",
        "start 2 went on at step 100, which was in memory, after: a machine left; a new update 1 min 1 s later, 2 updates"
        " made again, 1,234 bytes of the base read",
        "start 3 went on, which was in another machine's memory, after: it broke",
        "lost 1 min 1 s by restarts, 2 updates made again",
        "GPU hours 2.50, 7.50 in money",
    ],
)
def test_all_that_is_known_of_a_run_is_a_line(words: str) -> None:
    assert words in shown(RUNNING)


def test_nothing_is_said_that_is_not_known() -> None:
    assert (
        shown(RunStatus("memory://run", "starting"))
        == "run memory://run state starting step 0 checkpoint none committed"
    )
    ended = RunStatus("memory://run", "finished", quiet_seconds=3600.0, stop_requested=True)
    assert "state finished step 0 checkpoint" in shown(ended)


class _Follower:
    """Tells one status after the other, or fails."""

    told: Any

    def __init__(self, folder: Store, *_: Any) -> None: ...

    def read(self) -> Any:
        found = self.told.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def following(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *told: Any) -> None:
    monkeypatch.setattr(module, name, type("Told", (_Follower,), {"told": list(told)}))


def test_the_bar_of_a_run_has_the_time_that_is_left_first_and_outlives_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = "2 min 0 s left · epoch 1.99 of 3 · loss 1.5000 · accuracy 75.0% · 1,234 tokens/s · committed 100 · start 3"
    assert watch._facts(RUNNING) == facts
    assert watch._facts(RunStatus("memory://run", "starting")) == ""
    following(monkeypatch, watch, "Follower", StorageError("away"), RUNNING)
    console, looks = Console(file=io.StringIO(), width=300, record=True, force_terminal=True), iter([False, True])
    found = watch.watch(Store("memory://run", None), lambda: next(looks), console=console, wait=lambda seconds: None)
    assert found == RUNNING
    shown = console.export_text()
    assert f"120/400 {facts}" in shown
    following(monkeypatch, watch, "Follower", RunStatus("memory://run", "starting", step=1200))
    watch.watch(Store("memory://run", None), lambda: True, console=console, wait=lambda seconds: None)
    assert "1,200/?" in console.export_text()


def test_a_sweep_is_told_by_lines_until_its_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(*states: str) -> SweepStatus:
        trials = [TrialStatus(number, f"s-{number}", {"lr": 0.1}, state) for number, state in enumerate(states, 1)]
        return SweepStatus("memory://s", "running", "eval", "min", trials)

    following(
        monkeypatch, sweep, "SweepFollower", at("waiting", "waiting"), StorageError("away"), at("running", "waiting"),
        at("running", "waiting"), at("finished", "running"),
    )  # fmt: skip
    waits, looks, lines = list[float](), iter([False, False, False, False, True]), list[str]()

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return next(looks)

    watch_sweep(Store("memory://s", None), wait, False, lines.append)
    assert lines == ["s-1 (lr=0.1): running", "s-1 (lr=0.1): finished", "s-2 (lr=0.1): running"]
    assert waits == [waits[0]] * 5
    following(monkeypatch, sweep, "SweepFollower", at("finished"))
    watch_sweep(Store("memory://s", None), lambda seconds: True, True, lines.append)
    assert len(lines) == 3


@pytest.mark.parametrize(("alive", "last"), [(None, True), (True, False), (False, True)])
def test_a_sweep_is_watched_as_long_as_its_process_lives(
    alive: bool | None, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = None if alive is None else type("Owner", (), {"is_alive": lambda self, clock: alive})()
    monkeypatch.setattr(sweep, "last_owner", lambda folder: owner)
    assert while_it_runs(Store("memory://s", None))(0.0) is last


def test_a_store_that_is_away_ends_no_view_and_what_was_shown_is_not_taken_for_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(*given: Any) -> Any:
        raise StorageError("cannot list it.")

    folder, text = Store("memory://run", None), io.StringIO()
    monkeypatch.setattr(sweep, "last_owner", away)
    assert while_it_runs(folder)(0.0) is False
    monkeypatch.setattr(watch, "rank_logs", away)
    assert list(watch.follow_log(folder, 0, stop=lambda: True)) == []
    following(monkeypatch, watch, "Follower", RunStatus("memory://run", "running"), StorageError("cannot list it."))
    monkeypatch.setattr(watch, "is_there", lambda folder: True)
    monkeypatch.setattr(watch, "Terminal", lambda **given: Console(file=text, width=200, force_terminal=True))
    sleeps = iter([None])
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(sleeps))
    with pytest.raises(StopIteration):
        watch.watch_table(folder, None)
    *_, last = text.getvalue().partition("running")
    assert "running" in last, "it stays"
    assert "the store does not answer, so this is not as it is now: cannot list it." in last


@pytest.mark.parametrize(
    ("states", "over", "there"),
    [
        (["running", "finished", "running", "failed", "failed"], None, 5),  # an end may be before a restart
        (["running", "finished", "finished", "running"], [False, False, False, True], 4),
        (["starting", "starting"], None, 2),  # a start that was refused leaves nothing behind
    ],
)
def test_a_run_is_shown_until_it_has_ended(
    states: list[RunState], over: list[bool] | None, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, looks = [RunStatus("memory://run", state) for state in states], list[int]()
    following(monkeypatch, watch, "Follower", StorageError("away"), *told)
    monkeypatch.setattr(watch, "is_there", lambda folder: looks.append(1) or len(looks) < there or states[-1] in ENDED)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    ends = iter(over or ())
    found = watch.watch_table(Store("memory://run", None), (lambda: next(ends)) if over else None)
    assert found is told[-1]


def test_a_list_has_the_share_of_a_run_and_the_trials_of_a_sweep() -> None:
    assert listing._progress(RunLine("s", "over", trials=8)) == "a sweep of 8 trials"
    assert listing._progress(RunLine("r", "running", 5, 20)) == "5 of 20 (25 %)"


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"kind": "phase", "phase": "load"}], True),
        ([{"kind": "phase", "phase": "load"}, {"kind": "step", "step": 1}], False),
        ([{"kind": "step", "step": 1}, {"kind": "waiting", "step": 2, "for": "data", "what": "data"}], True),
        ([{"kind": "waiting", "step": 2, "for": "data", "what": "data"}, {"kind": "step", "step": 2}], False),
    ],
)
def test_what_a_run_does_beside_its_steps_is_said_as_long_as_it_does_it(
    records: list[dict[str, Any]], said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing.PlainLines, "of", lambda self, record: f"does {record['kind']}")
    summary = Summary()
    summary.add({"time": NOW, **record} for record in records)
    assert bool(listing._doing(summary)) is said
