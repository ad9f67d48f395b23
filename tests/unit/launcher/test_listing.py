"""`capstan status` in a terminal has the course of a run and the next command; `capstan ls` has all runs in a few
requests.
"""

import io
import json
import math
import os
import re
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launcher.report.history import HistoryReader
from launcher.view.listing import Line, Listing, RunLine, list_runs
from launcher.view.status import RunStatus, read_status, sparkline
from launcher.view.watch import render_status
from tests.unit.run.made_records import CONFIG, NOW, end, start, step, write
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.folder import store_of
from trainer.run.owner import take
from trainer.run.records import edge_records, read_records
from trainer.run.segments import streams
from trainer.store.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


@pytest.fixture
def run(store: Store) -> Store:
    return new(store, "demo")


def new(store: Store, name: str) -> Store:
    store.put(f"{name}/config.yaml", CONFIG.replace("demo", name).encode())
    return store.sub(name)


def status_at(run: Store, now: float = NOW) -> RunStatus:
    return read_status(run, clock=lambda: now)


def shown(status: RunStatus) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render_status(status))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_loss_is_a_curve_of_the_steps_that_count(run: Store) -> None:
    write(run, 1, start(1), *(step(number, 8.0 - number) for number in range(1, 7)))
    write(run, 2, start(2, step=3), *(step(number, 1.0) for number in range(4, 9)))
    status = status_at(run)
    assert status.loss_curve == [(1, 7.0), (2, 6.0), (3, 5.0), *((number, 1.0) for number in range(4, 9))]
    assert "█▇▆▁▁▁▁▁" in shown(status)


def test_a_long_curve_stays_short_and_keeps_its_shape(run: Store) -> None:
    write(run, 1, start(1), *(step(number, math.exp(-number / 1000)) for number in range(1, 5001)))
    curve = status_at(run).loss_curve
    assert 60 <= len(curve) <= 120
    assert {later[0] - earlier[0] for earlier, later in pairwise(curve)} == {curve[0][0]}
    assert curve[-1][0] > 4900
    line = sparkline(curve)
    assert len(line) == 40
    assert (line[0], line[-1]) == ("█", "▁")
    assert sorted(line, reverse=True) == list(line)


@pytest.mark.parametrize(("points", "line"), [([], ""), ([(1, 2.0)], ""), ([(1, 2.0), (2, 2.0)], "▁▁")])
def test_a_curve_without_a_course_is_none(points: list[tuple[int, float]], line: str) -> None:
    assert sparkline(points) == line


def test_the_table_has_learning_rate_epoch_and_each_set_that_is_held_out(run: Store) -> None:
    evaluated = [
        {"kind": "eval", "step": 2, "loss": loss, "set": name} for name, loss in (("general", 3.5), ("task", 2.5))
    ]
    write(run, 1, start(1), {**step(2, 2.0), "passes": 1.5}, {"kind": "eval", "step": 2, "loss": 2.25}, *evaluated)
    status = status_at(run)
    assert (status.eval_loss, status.eval_losses) == (2.25, {"general": 3.5, "task": 2.5})
    text = shown(status)
    for words in ("held out 2.2500", "general 3.5000, task 2.5000", "0.001", "epoch", "1.50"):
        assert words in text


def test_an_epoch_is_a_part_of_those_that_were_asked_for(run: Store) -> None:
    run.put("config.yaml", CONFIG.replace("steps: 20", "epochs: 4").encode())
    write(run, 1, start(1), {**step(13, 2.0), "passes": 2.6})
    assert status_at(run).epochs == 4
    assert "2.60 of 4" in shown(status_at(run))
    write(run, 1, start(1), {**step(13, 2.0), "passes": 3.9999})
    assert "3.99 of 4" in shown(status_at(run))


def test_gpu_hours_are_those_of_every_start_and_cost_what_a_gpu_costs(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = {"device": "cuda:0 (a GPU)", "start_seconds": 600.0}
    write(run, 1, {**start(1, world_size=8), **on_gpu}, step(1, 3.0, NOW + 3000))
    write(run, 2, {**start(2, 1, world_size=4), **on_gpu}, step(2, 3.0, NOW + 1200))
    assert status_at(run).gpu_hours == pytest.approx(8 * 1 + 4 * 0.5)
    assert status_at(run).cost is None
    run.put("config.yaml", (CONFIG + "track: {price_per_gpu_hour: 2.5}").encode())
    assert status_at(run).cost == pytest.approx(25.0)
    assert "10.00, 25.00 in money" in shown(status_at(run))
    (line,) = list_runs(store_of(run), clock=lambda: NOW + 1205).runs
    assert line.gpu_hours == pytest.approx(10)
    monkeypatch.setattr("launcher.view.listing._MOST_STARTS", 1)
    assert list_runs(store_of(run)).runs[0].gpu_hours is None, "so many starts are not read for it"
    listed = Line(0, "demo", line, price=2.5)
    assert (listed.cost, listed.whole_cost) == (pytest.approx(25.0), pytest.approx(250.0)), "2 of its 20 steps are done"
    write(run, 1, start(1), step(1, 3.0, NOW + 3000))
    write(run, 2, start(2), step(2, 3.0, NOW + 3000))
    assert status_at(run).gpu_hours is None  # on CPUs


@pytest.mark.parametrize(("given", "price"), [("2.5", 2.5), ("0", 0), ("true", None), ("dear", None), ("[3]", None)])
def test_a_price_that_is_no_number_makes_no_cost(run: Store, given: str, price: float | None) -> None:
    run.put("config.yaml", (CONFIG + f"track: {{price_per_gpu_hour: {given}}}").encode())
    write(run, 1, {**start(1), "device": "cuda:0 (a GPU)", "start_seconds": 3600.0}, step(1, 3.0))
    listing = Listing([store_of(run)], lambda: NOW)
    (line,) = listing.read(math.inf)[0]
    listing.close()
    assert line.price == price
    assert line.line is not None
    assert line.cost == (None if price is None else pytest.approx(price * (line.line.gpu_hours or 0)))


def test_a_curve_is_read_again_at_each_fortieth_of_the_steps() -> None:
    def key(step: int, total: int | None, began: float = 1.0) -> Any:
        return Line(0, "demo", RunLine("demo", "running", step=step, total_steps=total, began=began)).key

    assert key(100, 4000) == key(199, 4000) != key(200, 4000)
    assert key(3, 20) != key(4, 20)
    assert key(100, 4000) != key(100, 4000, began=2.0)
    assert key(100, None) == key(101, None) != key(102, None)


@pytest.mark.parametrize(
    ("outcome", "committed", "commands"),
    [
        ("finished", True, ["export demo adapter/"]),
        ("stopped", True, ["resume demo"]),
        ("stopped", False, []),
        ("silent", True, ["logs demo", "resume demo"]),
        ("failed", True, ["logs demo", "resume demo"]),
        ("failed", False, ["logs demo"]),
        (None, True, []),
    ],
)
def test_an_ended_run_names_the_next_command(
    run: Store, outcome: str | None, committed: bool, commands: list[str]
) -> None:
    silent = outcome == "silent"
    write(run, 1, start(1), step(5, 2.0), *([end(outcome)] if outcome and not silent else []))
    if committed:
        run.put(layout.manifest(5), b"{}")
    now = NOW + 1000 if silent else NOW
    store = run.uri.removeprefix("file://").removesuffix("/demo")
    named = re.findall(r"`capstan (.*?) --store (.*?)`", status_at(run, now).next)
    assert named == [(command, store) for command in commands]


def many_steps(last: int) -> list[dict[str, Any]]:
    return [step(number, 9.0 - number / last) for number in range(1, last + 1)]


def test_a_list_says_of_each_run_what_its_status_says(store: Store) -> None:
    restart = {"kind": "restart", "reason": "again", "time": NOW}
    runs: dict[str, list[list[dict[str, Any]]]] = {
        "claimed": [],
        "loading": [[]],
        "running": [[start(1), *many_steps(9000), {"kind": "eval", "step": 7, "loss": 2.5}]],
        "finished": [[start(1), *many_steps(20), end("finished")]],
        "failed": [[start(1), *many_steps(3), end("failed", "it broke")]],
        "restarting": [[start(1), *many_steps(3), end("failed", "it broke"), restart]],
        "resumed": [[start(1), *many_steps(9)], [start(2, step=5)]],
        "refused": [[start(1), *many_steps(9)], [end("failed", "refused")]],
        "loading-still": [[{"kind": "phase", "phase": "load", "time": NOW}]],
        "refused-early": [[{"kind": "phase", "phase": "load", "time": NOW}, end("failed", "refused")]],
        "retaken": [[start(1), *many_steps(9), {**end("stopped", "on request"), "time": 1.0}]],
    }
    for name, generations in runs.items():
        folder = new(store, name)
        for number, records in enumerate(generations, 1):
            write(folder, number, *records)
    take(store.sub("retaken"), "capstan resume", 0)
    store.put("data/abc/manifest.json", b"{}")
    listed = {line.run: line for line in list_runs(store, clock=lambda: NOW + 5).runs}
    assert listed.keys() == runs.keys()
    for name, line in listed.items():
        status = status_at(store.sub(name), NOW + 5)
        expected = (status.state, status.step, status.total_steps, status.loss, status.eval_loss, status.reason)
        assert (line.state, line.step, line.total_steps, line.loss, line.eval_loss, line.reason) == expected, name
        assert (line.tokens_per_second, line.eta_seconds) == (status.tokens_per_second, status.eta_seconds), name
        if status.generation:
            assert line.age_seconds == status.quiet_seconds
    assert {"starting", "running", "finished", "failed", "restarting"} == {line.state for line in listed.values()}
    assert {name: line.doing for name, line in listed.items() if line.doing} == {
        "loading-still": "load: reads the base and the newest checkpoint"
    }
    assert (status_at(store.sub("running")).eta_seconds, listed["running"].eta_seconds) == (0.0, 0.0), "it took more"
    console = Console(file=io.StringIO(), width=160)
    console.print(list_runs(store, clock=lambda: NOW + 5).table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"finished +│ finished +│ 20 of 20 \(100 %\) +│ 8.0000", text)
    assert json.loads(json.dumps(asdict(list_runs(store))))["store"] == store.uri


def test_a_run_that_is_to_take_fewer_steps_than_it_took_has_no_share_of_them(run: Store) -> None:
    write(run, 1, {**start(1, step=12), "total_steps": 9}, end("finished"))
    console = Console(file=io.StringIO(), width=160)
    console.print(list_runs(store_of(run), clock=lambda: NOW).table())
    assert "12 (9 asked for)" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "%" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "12 (9 asked for)" in shown(status_at(run))


@pytest.mark.parametrize(
    ("state", "seconds", "is_read"),
    [
        *[("running", 0.9, False), ("running", 1.1, True), ("silent", 1.1, True)],
        *[(state, seconds, seconds > 60) for state in ("finished", "failed", "over") for seconds in (59.0, 61.0)],
        *[(None, 59.0, False), (None, 61.0, True)],  # no run, which may become one
    ],
)
def test_what_has_ended_is_read_again_after_a_minute_and_other_runs_at_every_look(
    store: Store, monkeypatch: pytest.MonkeyPatch, state: str | None, seconds: float, is_read: bool
) -> None:
    listing, key = Listing([store], lambda: NOW), (0, "demo")
    monkeypatch.setattr("launcher.view.listing.time", SimpleNamespace(monotonic=lambda: 1000.0))
    assert listing._is_old(key), "it was never read"
    listing._known[key] = None if state is None else Line(*key, RunLine("demo", state))
    listing._looked[key] = 1000.0 - seconds
    assert listing._is_old(key) is is_read
    listing.forget(store.sub("demo"))
    assert listing._is_old(key), "something was done with it"
    listing.close()


def test_those_heard_of_last_come_first(store: Store) -> None:
    for name, age in (("old", 500.0), ("new", 1.0), ("middle", 50.0)):
        write(new(store, name), 1, start(1), step(1, 2.0, NOW - age))
    assert [line.run for line in list_runs(store, clock=lambda: NOW).runs] == ["new", "middle", "old"]


def test_a_store_without_runs_says_so(store: Store) -> None:
    assert list_runs(store).table() == f"{store.uri} has no runs"


@pytest.mark.parametrize(("generations", "last"), [(1, 3), (30, 4000)])
def test_a_run_takes_a_few_requests_and_bytes_however_long_it_is(
    store: Store, generations: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new(store, "demo")
    for number in range(1, generations + 1):
        write(folder, number, start(number), *many_steps(last))
    requests: Counter[str] = Counter()
    for verb in ("get", "get_range", "head", "list", "children"):
        plain = getattr(Store, verb)

        def counted(self: Store, *arguments: Any, plain: Any = plain, verb: str = verb) -> Any:
            requests[verb] += 1
            requests["bytes"] += arguments[2] - arguments[1] if verb == "get_range" else 0
            return plain(self, *arguments)

        monkeypatch.setattr(Store, verb, counted)
    (line,) = list_runs(store, clock=lambda: NOW).runs
    assert (line.step, line.total_steps) == (last, 20)
    read = requests.pop("bytes")
    assert requests.total() <= 7
    assert read <= 2 * 2**17


def test_a_run_that_cannot_be_read_hides_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "bad"):
        write(new(store, name), 1, start(1), step(1, 2.0))
    plain = Store.get_range

    def fails(self: Store, key: str, begin: int, end: int) -> bytearray:
        if "bad" in self.uri:
            raise StorageError("403")
        return plain(self, key, begin, end)

    monkeypatch.setattr(Store, "get_range", fails)
    found = {line.run: (line.state, line.reason) for line in list_runs(store, clock=lambda: NOW).runs}
    assert found == {"good": ("running", ""), "bad": ("unreadable", "403")}


def test_runs_of_a_store_that_no_longer_answers_stay_in_the_list(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(new(store, "known"), 1, start(1), step(1, 2.0))
    plain, down = Store.children, {store.uri}

    def children(self: Store) -> Any:
        if self.uri in down:
            raise StorageError(f"{self.uri}: 503")
        return plain(self)

    monkeypatch.setattr(Store, "children", children)
    empty = open_store(str(tmp_path / "empty"))
    listing = Listing([store, empty], lambda: NOW)

    def read() -> tuple[list[str], dict[int, str]]:
        return [line.name for line in listing.read(math.inf)[0]], listing.silent

    both = {0: f"{store.uri}: 503", 1: f"{empty.uri}: 503"}
    assert read() == ([], {0: both[0]}), "another store answers"
    down.clear()
    assert read() == (["known"], {})
    down.update((store.uri, empty.uri))
    assert read() == (["known"], both)
    listing.close()
    never = Listing([store, empty], lambda: NOW)
    with pytest.raises(StorageError, match="503"):
        never.read(math.inf)
    never.close()


def test_nor_does_one_whose_settings_are_a_pipe(store: Store, tmp_path: Path) -> None:
    write(new(store, "good"), 1, start(1), step(1, 2.0))
    (tmp_path / "runs/piped").mkdir()
    os.mkfifo(tmp_path / "runs/piped/config.yaml")
    found = {line.run: line.state for line in list_runs(store, clock=lambda: NOW).runs}
    assert found == {"good": "running", "piped": "unreadable"}


@pytest.mark.parametrize("most", [150, 1000, 10**6])
def test_the_edges_of_a_stream_are_whole_records(run: Store, most: int) -> None:
    write(run, 1, start(1), *many_steps(50), torn=b'{"kind": "st')
    run.put(layout.added_record(1, "later"), json.dumps(end("failed", "rank 0 is gone")).encode() + b"\n")
    every = list(read_records(run, 1))
    edges = edge_records(run, 1, streams(run.list(layout.METRICS)), most)
    assert edges[-1] == every[-1]
    assert [record for record in every if record in edges] == edges
    assert (edges == every) == (most == 10**6)
    if most == 1000:
        assert edges[0] == every[0]
        assert len(edges) > 5


def test_a_clock_that_is_set_a_day_forward_costs_nothing(run: Store) -> None:
    """Records have the time of day and, where rank 0 made them, the clock of its process."""
    begun = {**start(1), "device": "cuda:0 (a GPU)", "start_seconds": 60.0, "clock": 5000.0}
    later = {**step(1, 2.0), "clock": 5060.0, "time": NOW + 86_400}
    by_driver = {**end("finished"), "time": NOW + 2 * 86_400}
    write(run, 1, begun, later, by_driver)
    assert status_at(run).gpu_hours == pytest.approx(2 * 120 / 3600)
    (read,) = HistoryReader(run).read().starts
    assert read.lasted == 120


def test_a_start_that_died_before_it_was_one_lasted_by_its_records_clocks(run: Store) -> None:
    write(
        run,
        1,
        {"kind": "phase", "phase": "load", "clock": 10.0, "time": NOW},
        {"kind": "phase", "phase": "first_step", "clock": 40.0, "time": NOW - 9},
    )
    (read,) = HistoryReader(run).read().starts
    assert read.lasted == 30
