"""`capstan status`, `logs` and `stop` read a run from its folder alone."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.report.figures import FiguresReader
from launcher.view.listing import list_runs
from launcher.view.runs import find_run, poll_seconds, runs
from launcher.view.status import Follower, RunStatus, read_generation, read_status
from launcher.view.watch import follow_log, read_log, render_status, watch
from tests.checkpoints import commit
from tests.unit.run.made_records import CONFIG, NOW, end, stamp, start, step, write
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.owner import take
from trainer.run.records import add_record
from trainer.run.requests import request_stop
from trainer.store.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


@pytest.fixture
def run(store: Store) -> Store:
    store.put("demo/config.yaml", b"run: {name: demo}\n")
    return store.sub("demo")


def status_at(run: Store, now: float = NOW) -> RunStatus:
    return read_status(run, clock=lambda: now)


def test_a_run_without_metrics_is_starting(run: Store) -> None:
    status = status_at(run)
    assert (status.state, status.step, status.generation) == ("starting", 0, 0)


def test_a_claimed_generation_that_loads_for_minutes_is_still_starting(run: Store) -> None:
    write(run, 1)
    modified = run.head(layout.metrics(1)).modified.timestamp()
    status = status_at(run, modified + 300)
    assert status.state == "starting"
    assert status.quiet_seconds == pytest.approx(300)


def test_a_run_that_is_removed_while_it_is_followed_is_read_anew_if_there_is_another_of_its_name(run: Store) -> None:
    follower, reader = Follower(run, lambda: NOW), FiguresReader(run, lambda: NOW)

    def seen() -> list[tuple[str, int, float | None]]:
        status, figures = follower.read(), reader.read()
        assert (figures.state, figures.progress["step"]) == (status.state, status.step)
        return [(status.state, status.step, status.loss)]

    write(run, 1, start(1), step(1, 3.0), end("failed"))
    write(run, 2, start(2, 1), step(2, 2.0))
    assert seen() == [("running", 2, 2.0)]
    run.delete(layout.metrics(2))
    assert seen() == [("failed", 1, 3.0)]
    run.delete(layout.metrics(1))
    assert seen() == [("starting", 0, None)]
    write(run, 1, start(1), *(step(number, 5.0) for number in range(1, 9)))
    assert seen() == [("running", 8, 5.0)]


def test_a_run_that_has_ended_and_whose_records_are_lost_is_not_starting(store: Store, run: Store) -> None:
    commit(run, 12)
    take(run, "capstan train", 0).end()
    status, (line,) = status_at(run), list_runs(store).runs
    assert (status.state, status.last_commit_step, line.state) == ("silent", 12, "silent")
    assert (status.reason, line.reason) == ("its records are lost, and its checkpoints are not",) * 2
    assert status.next.startswith("`capstan resume demo")
    write(run, 1)  # its file is there, and empty
    assert status_at(run, run.head(layout.metrics(1)).modified.timestamp() + 300).state == "silent"


@pytest.mark.parametrize(
    "odd",
    [
        {"kind": "step"},
        {"kind": "step", "step": "3", "loss": 1.0, "tokens": 1, "seconds": 1.0},
        {"kind": "start", "machines": 5, "step": 0},
        {"kind": "end"},
        {"kind": ["end"]},
        {"kind": "step", "step": 1, "loss": 3.0, "tokens": 1, "seconds": math.inf},
        {"kind": "step", "step": 1, "loss": 3.0, "tokens": 1, "seconds": math.nan},
        {"kind": "step", "step": 1, "loss": 3.0, "tokens": 1, "seconds": 10**400},
        {"kind": "first_step", "seconds": -math.inf},
    ],
    ids=lambda odd: str(odd)[:80],
)
def test_a_record_that_lacks_what_everybody_needs_is_left_out(run: Store, odd: dict) -> None:
    write(run, 1, start(1), step(1, 3.0))
    plain = status_at(run, NOW + 5)
    write(run, 1, start(1), odd, step(1, 3.0), odd)
    assert status_at(run, NOW + 5) == plain
    Console(file=io.StringIO()).print(render_status(status_at(run, NOW + 5)))


def test_a_running_run(run: Store) -> None:
    write(run, 1, start(1), step(1, 3.0), step(2, 2.5), {"kind": "eval", "step": 2, "loss": 2.7, "targets": 9})
    status = status_at(run, NOW + 5)
    assert status.state == "running"
    assert (status.step, status.total_steps, status.world_size) == (2, 20, 2)
    assert (status.loss_first, status.loss, status.eval_loss) == (3.0, 2.5, 2.7)
    assert status.tokens_per_second == 500.0
    assert status.eta_seconds == 18 * 2.0
    assert status.quiet_seconds == 5
    assert status.last_commit_step is None


def test_a_status_has_all_that_the_records_of_a_run_say(run: Store) -> None:
    run.put(layout.CONFIG, CONFIG.encode())
    machines = {"machines": ["n1", "n1", "n2", "n2"], "sequence_parallel": 2, "dashboard": "http://head:8265"}
    wrong = {"kind": "wrong_bytes", "step": 1, "rank": 1, "machine": "n1", "tensor": "w", "where": "x", "since": 0}
    facts = {"passes": 1.25, "epoch": 1, "reward": 0.5, "accuracy": 0.75}
    own = {"kind": "eval", "step": 3, "loss": 2.25, "accuracy": 0.5}
    sets = [{"kind": "eval", "set": "general", "step": at, "loss": loss} for at, loss in ((1, 9.0), (3, 2.5))]
    figures = [{"kind": "measured", "by": "tasks", "step": at, "score": 0.1 * at} for at in (1, 3)]
    before = [{"kind": "eval", "set": name, "step": 1, "loss": 8.0} for name in ("general", "old")]
    lost = [{**wrong, "time": NOW}, *before, end("failed", "lost")]
    write(run, 1, {**start(1, world_size=4), **machines}, step(1, 3.0), *lost)
    write(run, 2, {**start(2, 1, 4), **machines}, step(2, 2.5), {**step(3, 2.0), **facts}, own, *sets, *figures)
    request_stop(run, by="alice")
    told = asdict(status_at(run, NOW + 5))
    assert told.pop("restarts")[0]["reason"] == "lost"
    assert told.pop("wrong_bytes")[0].startswith("step 1: rank 1 on n1 ")
    assert {name: value for name, value in told.items() if value not in (None, 0, "", [], {})} == {
        "run": run.uri,
        "state": "running",
        "generation": 2,
        "world_size": 4,
        "sequence_parallel": 2,
        "machines": {"n1": 2, "n2": 2},
        "device": "cpu",
        "dashboard": "http://head:8265",
        "step": 3,
        "total_steps": 20,
        "epoch": 1,
        "passes": 1.25,
        "lr": 1e-3,
        "loss_first": 3.0,
        "loss": 2.0,
        "loss_curve": [(1, 3.0), (2, 2.5), (3, 2.0)],
        "reward": 0.5,
        "accuracy": 0.75,
        "eval_loss": 2.25,
        "eval_accuracy": 0.5,
        "eval_losses": {"general": 2.5, "old": 8.0},
        "measured": {"tasks": {"score": pytest.approx(0.3)}},
        "tokens_per_second": 500.0,
        "eta_seconds": 17 * 2.0,
        "quiet_seconds": 5.0,
        "stop_requested": True,
    }


def test_a_run_over_classes_shows_its_accuracy(run: Store) -> None:
    told = {"kind": "eval", "step": 2, "loss": 0.4, "accuracy": 0.75, "texts": 9}
    write(run, 1, start(1), step(1, 0.7) | {"accuracy": 0.5}, step(2, 0.5) | {"accuracy": 0.875}, told)
    status = status_at(run, NOW + 5)
    assert (status.accuracy, status.eval_accuracy) == (0.875, 0.75)
    shown = Console(file=io.StringIO(), width=100)
    shown.print(render_status(status))
    assert "87.5%, held out 75.0%" in shown.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    write(run, 2, start(2), step(1, 3.0), step(2, 2.5))
    assert status_at(run, NOW + 5).accuracy is None


def test_steps_that_took_no_time_have_no_speed(run: Store) -> None:
    write(run, 1, start(1), {**step(1, 3.0), "seconds": 0}, {**step(2, 3.0), "seconds": 0})
    status = status_at(run)
    assert (status.step, status.tokens_per_second, status.eta_seconds) == (2, None, None)


def test_a_figure_that_an_evaluation_lacks_is_not_known(run: Store) -> None:
    lacks = {"kind": "eval", "set": "general", "step": 2}
    write(run, 1, start(1), step(2, 3.0), lacks)
    assert status_at(run).eval_losses == {}
    write(run, 1, start(1), step(2, 3.0), {**lacks, "loss": 2.5}, lacks)
    assert status_at(run).eval_losses == {"general": 2.5}, "the last that is known"


def test_a_run_with_checkpoints_whose_next_start_has_no_records_yet_needs_no_command(run: Store) -> None:
    commit(run, 12)
    owner = take(run, "capstan resume", 0)
    status = status_at(run, owner.owner.time)
    assert (status.state, status.last_commit_step, status.sequence_parallel, status.next) == ("starting", 12, 1, "")


@pytest.mark.parametrize(("quiet", "state"), [(119.0, "running"), (120.0, "silent")])
def test_a_run_that_writes_nothing_for_two_minutes_is_silent(run: Store, quiet: float, state: str) -> None:
    write(run, 1, start(1), step(1, 3.0))
    assert status_at(run, NOW + quiet).state == state


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_the_end_is_final_however_long_ago(run: Store, outcome: str) -> None:
    write(run, 1, start(1), step(1, 3.0), end(outcome, "because"))
    stamp(run, layout.metrics(1), NOW + 9e5)  # as of a copy
    status = status_at(run, NOW + 1e6)
    assert (status.state, status.reason, status.eta_seconds) == (outcome, "because", None)
    assert status.quiet_seconds == 1e6


def test_a_later_generation_replaces_the_steps_it_takes_again(run: Store) -> None:
    write(run, 1, start(1), step(1, 3.0), step(2, 2.9), step(3, 2.8))
    write(run, 2, start(2, step=1, world_size=1), step(2, 2.0))
    status = status_at(run)
    assert (status.generation, status.step, status.loss, status.loss_first) == (2, 2, 2.0, 3.0)
    assert status.world_size == 1
    assert status.loss_curve == [(1, 3.0), (2, 2.0)], "step 3 was lost, and step 2 is the newest start's"

    write(run, 3, start(3, step=0), step(1, 3.5))
    assert status_at(run).loss_first == 3.5


def test_just_after_a_restart_the_step_is_the_restored_one_and_the_loss_the_last_known(run: Store) -> None:
    write(run, 1, start(1), step(1, 3.0), step(2, 2.9))
    write(run, 2, start(2, step=1))
    status = status_at(run)
    assert (status.state, status.step, status.loss) == ("starting", 1, 2.9)


def test_restarts_name_their_reasons(run: Store) -> None:
    write(run, 1, start(1), end("failed", "RuntimeError: boom [gpu 3]"))
    write(run, 2, start(2, step=5), step(6, 2.0))
    write(run, 3, start(3, step=6))
    restarts = status_at(run).restarts
    assert [(restart.generation, restart.step) for restart in restarts] == [(2, 5), (3, 6)]
    assert status_at(run).sequence_parallel == 1
    assert restarts[0].reason == "RuntimeError: boom [gpu 3]"
    assert "without a word" in restarts[1].reason


def test_the_last_commit_is_what_the_store_holds(run: Store) -> None:
    write(run, 1, start(1), step(12, 2.0))
    run.put(layout.shard(12, "attempt", 0), b"not committed")
    for number in (5, 10):
        run.put(layout.manifest(number), b"{}")
    committed = run.head(layout.manifest(10)).modified.timestamp()
    status = status_at(run, committed + 42)
    assert status.last_commit_step == 10
    assert status.last_commit_age_seconds == pytest.approx(42)


def test_saves_that_failed_or_were_skipped_are_counted_over_all_generations(run: Store) -> None:
    failed = {"kind": "save_failed", "step": 2, "reason": "503", "time": NOW}
    write(run, 1, start(1), failed, end("failed"))
    write(run, 2, start(2), failed, {"kind": "save_skipped", "step": 4, "skipped": 1, "time": NOW})
    status = read_status(run, lambda: NOW)
    assert (status.failed_saves, status.skipped_saves) == (2, 1)
    screen = Console(file=io.StringIO(), width=200)
    screen.print(render_status(status))
    assert "2 failed, 1 skipped" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_torn_last_line_is_waited_for(run: Store) -> None:
    follower = Follower(run, clock=lambda: NOW)
    line = json.dumps(step(2, 2.5)).encode()
    write(run, 1, start(1), step(1, 3.0), torn=line[:20])
    assert follower.read().step == 1
    write(run, 1, start(1), step(1, 3.0), torn=line + b"\n")
    assert follower.read().step == 2


def test_a_follower_reads_only_what_was_appended(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    get_range = Store.get_range
    monkeypatch.setattr(
        Store,
        "get_range",
        lambda self, key, start, end: (read.append(end - start), get_range(self, key, start, end))[1],
    )
    follower = Follower(run, clock=lambda: NOW)
    write(run, 1, start(1), *(step(number, 3.0) for number in range(1, 100)))
    follower.read()
    follower.read()
    write(run, 1, start(1), *(step(number, 3.0) for number in range(1, 101)))
    assert follower.read().step == 100
    assert sum(read) == run.head(layout.metrics(1)).size


def test_read_generation_groups_by_kind_in_order(run: Store) -> None:
    write(run, 1, start(1), step(1, 3.0), step(2, 2.0), end("finished"))
    records = read_generation(run, 1)
    assert [record["step"] for record in records["step"]] == [1, 2]
    assert records["end"][0]["outcome"] == "finished"
    assert read_generation(run, 2) == {}


def test_to_json_is_plain_json(run: Store) -> None:
    write(run, 1, start(1), end("failed", "x"))
    write(run, 2, start(2), step(1, 3.0))
    tree = json.loads(json.dumps(asdict(status_at(run))))
    assert tree["state"] == "running"
    (restart,) = tree["restarts"]
    assert (restart["generation"], restart["step"], restart["reason"], restart["restored"]) == (2, 0, "x", None)


def at(time: float, record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "time": time}


def test_a_restart_says_what_it_cost(run: Store) -> None:
    """A rank died at 100.5, which was noticed at 101. The start after it went on from step 3 of 5."""
    write(run, 1, at(10.0, start(1)), *(at(95.0 + number, step(number, 3.0)) for number in range(1, 6)))
    add_record(run, 1, "end", outcome="failed", reason="rank 1 died", died=1, died_at=100.5)
    second = {**start(2, step=3), "restored": "memory", "read_bytes": 0}
    write(run, 2, at(104.0, second), *(at(101.0 + number, step(number, 3.0)) for number in range(4, 8)))
    status = status_at(run)
    (restart,) = status.restarts
    assert (restart.died, restart.back, restart.restored, restart.read_bytes) == (100.5, 107.0, "memory", 0)
    assert restart.noticed is not None
    assert (restart.lost_seconds, restart.again) == (status.lost_seconds, status.again) == (6.5, 2)
    console = Console(file=io.StringIO(), width=250)
    console.print(render_status(status))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "went on at step 3, which was in memory, after: rank 1 died; a new update 6" in text
    assert "2 updates made again, 0 bytes of the base read" in text


@pytest.mark.parametrize(("shared", "ranks"), [(1, "4"), (2, "4 = 2 x 2 that share rows")])
def test_the_table_says_how_many_ranks_share_rows(run: Store, shared: int, ranks: str) -> None:
    write(
        run,
        1,
        {**start(1), "world_size": 4, "sequence_parallel": shared, "machines": [], "device": "cpu"},
        step(1, 3.0),
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(render_status(status_at(run)))
    assert f" {ranks} on cpu" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_brackets_as_they_are(run: Store) -> None:
    write(run, 1, start(1), step(1, 3.0), end("failed", "KeyError: [red]"))
    console = Console(file=io.StringIO(), width=120)
    console.print(render_status(status_at(run)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "KeyError: [red]" in text
    assert "1 of 20" in text
    assert "none committed" in text


def test_watch_shows_progress_until_told_to_stop(run: Store) -> None:
    waits: list[float] = []

    def train_a_step(seconds: float) -> None:
        waits.append(seconds)
        write(run, 1, start(1), *(step(number, 3.0 - number / 10) for number in range(1, len(waits) + 1)))

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    status = watch(run, lambda: len(waits) == 3, console=console, wait=train_a_step)
    assert status.step == 3
    assert waits == [0.5, 0.5, 0.5]
    assert "loss 2.7000" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("uri", "seconds"), [("file:///runs", 0.5), ("memory://runs", 0.5), ("s3://bucket/runs", 5.0)])
def test_a_bucket_is_looked_at_less_often_as_it_bills_each_look(uri: str, seconds: float) -> None:
    assert poll_seconds(Store(uri, None)) == seconds


def test_runs_are_folders_with_a_configuration(store: Store, run: Store) -> None:
    store.put("data/abc/manifest.json", b"{}")
    store.put("other/config.yaml", b"")
    store.put("no name of a run/config.yaml", b"")
    store.put(".hidden/config.yaml", b"")
    assert runs(store) == ["demo", "other"]
    assert {line.run for line in list_runs(store).runs} == {"demo", "other"}


def test_a_run_is_found_by_name_and_by_uri(store: Store, run: Store) -> None:
    assert find_run("demo", store.uri).uri == run.uri
    assert find_run(run.uri, "elsewhere").uri == run.uri
    path = run.uri.removeprefix("file://")
    assert find_run(path, "elsewhere").uri == find_run(f"{path}/", "elsewhere").uri == run.uri


def test_a_missing_run_names_the_runs_there_are(store: Store, run: Store) -> None:
    store.put("another/config.yaml", b"")
    with pytest.raises(ConfigError, match=r"no run 'dmeo'.*Did you mean 'demo'.*Runs there: another, demo\.$"):
        find_run("dmeo", store.uri)
    with pytest.raises(ConfigError, match="there is no run .demo."):
        find_run("/demo", store.uri)  # a path, and no name in the store


def test_a_stop_request_says_when_and_by_whom(run: Store) -> None:
    request_stop(run, by="alice")
    assert json.loads(run.get(layout.STOP)).keys() == {"time", "by"}
    assert json.loads(run.get(layout.STOP))["by"] == "alice"
    assert status_at(run).stop_requested


def test_read_log_takes_the_newest_generation_of_that_rank(run: Store) -> None:
    run.put(layout.rank_log(1, 0), b"old")
    run.put(layout.rank_log(2, 0), "neu: é\n".encode())
    run.put(layout.rank_log(1, 1), b"rank 1")
    assert read_log(run, 0) == "neu: é\n"
    assert read_log(run, 0, generation=1) == "old"
    assert read_log(run, 1) == "rank 1"
    with pytest.raises(ConfigError, match=r"rank 7 of .* has no log\. Ranks with one: 0, 1\."):
        read_log(run, 7)
    with pytest.raises(ConfigError, match=r"rank 1 of .* has no log in generation 2\. Ranks with one: 0\."):
        read_log(run, 1, generation=2)


def test_following_a_log_yields_what_is_appended_and_goes_on_into_the_next_generation(run: Store) -> None:
    writes = iter(
        [
            (layout.rank_log(2, 0), "one\ncaf\u00e9"[:-1].encode() + b"\xc3"),  # ends inside a character
            (layout.rank_log(2, 0), "one\ncaf\u00e9\n".encode()),
            (layout.rank_log(3, 0), b"resumed\n"),
        ]
    )
    left = [3]

    def write_more(_: float) -> None:
        key, data = next(writes)
        run.put(key, data)
        left[0] -= 1

    run.put(layout.rank_log(1, 0), b"before\n")
    run.put(layout.rank_log(2, 0), b"one\n")
    followed: Iterator[str] = follow_log(run, 0, stop=lambda: left[0] == 0, wait=write_more)
    assert list(followed) == ["one\n", "caf", "\u00e9\n", "resumed\n"]
    assert list(follow_log(run, 0, 2, stop=lambda: True)) == ["one\ncaf\u00e9\n"], "the one that was asked for"


def test_what_the_newest_start_took_is_told_in_its_parts(run: Store) -> None:
    parts: dict[str, Any] = {"launch_seconds": 12.0, "load_seconds": 3.0, "restore_seconds": 0.5}
    late = {"rank": 5, "machine": "n2", "seconds": 40.0, "median": 12.0}
    parts["slowest"] = {"launch": late, "load": {**late, "seconds": 16.5}, "restore": "damaged"}
    write(run, 1, {**start(1), **parts}, {"kind": "first_step", "step": 1, "seconds": 17.25, "time": NOW})
    status = read_status(run, lambda: NOW)
    assert status.start_seconds == {"launch": 12.0, "load": 3.0, "restore": 0.5, "first_step": 17.25}
    console = Console(file=io.StringIO(), width=120)
    console.print(render_status(status))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "17.2 s to the first step (launch 12.0 s, load 3.0 s, restore 0.5 s)" in shown
    assert "rank 5 on n2 was last: its launch took 40.0 s, the median 12.0 s" in shown
    assert list(status.start_slowest) == ["launch"], (
        "a few seconds more are no reason to name a rank, though they are a third"
    )


def test_a_start_that_was_refused_does_not_fill_the_status(run: Store) -> None:
    write(run, 1, start(1), step(1, 5.0), end("stopped", "stopped by alice"))
    for generation in (2, 3):
        write(run, generation, end("failed", f"refused {generation}"))
    assert status_at(run).reason == "refused 3"
    assert [restart.generation for restart in status_at(run).restarts] == [3], "the newest is told of"
    write(run, 4, start(4, step=1), step(2, 4.0))
    (restart,) = status_at(run).restarts
    assert (restart.generation, restart.reason) == (4, "stopped by alice")
    write(run, 3, end("failed", "a machine left"), {"kind": "restart", "reason": "again", "time": NOW})
    said = [(restart.generation, restart.reason) for restart in status_at(run).restarts]
    assert said == [(3, "stopped by alice"), (4, "a machine left")], "it began, and was started again"


@pytest.mark.parametrize("kind", ["start", "step", "end", "eval", "first_step", "restart", "commit", 5, None])
def test_a_record_that_is_not_one_of_ours_is_left_out(run: Store, kind: object) -> None:
    names = (
        "step loss seconds tokens reason outcome machines world_size total_steps time launch_seconds dashboard device"
    )
    values = (None, "x", -1, [], {}, [[]], float("inf"), True)
    whole = {**start(1), **step(1, 3.0), **end("finished")}
    odd = [{"kind": kind}, *({**whole, "kind": kind, name: value} for name in names.split() for value in values)]
    for record in odd:
        write(run, 1, start(1), step(1, 3.0), record, torn=b'[1]\n"text"\n5\n\xff\n' + b"[" * 100_000 + b"\n")
        console = Console(file=io.StringIO(), width=120)
        status = status_at(run)
        console.print(render_status(status))
        json.dumps(asdict(status))


def test_slow_ranks_are_named_until_they_are_as_fast_as_the_others(run: Store) -> None:
    slow = {"kind": "slow_rank", "step": 17, "machine": "n2", "ratio": 1.31, "why": "heat", "time": NOW}
    over = {"kind": "slow_rank", "step": 40, "rank": 3, "machine": "n2", "over": True, "time": NOW}
    write(run, 1, start(1), step(17, 2.0), {**slow, "rank": 3}, {**slow, "rank": 5, "why": ""})
    console = Console(file=io.StringIO(), width=200)
    console.print(render_status(status_at(run)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 17: rank 3 on n2 takes 1.31 times as long as the others: heat" in text
    assert "rank 5 on n2 takes 1.31 times as long as the others; nothing on its machine tells why" in text
    write(run, 1, start(1), step(17, 2.0), {**slow, "rank": 3}, {**slow, "rank": 5}, over)
    assert [one["rank"] for one in asdict(status_at(run))["slow_ranks"]] == [5]
