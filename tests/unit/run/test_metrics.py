"""Starts of a run get numbers of their own; metrics reach the run's folder, and never decide how a run ends."""

import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.run import made_records as made
from trainer.errors import StorageError
from trainer.run import layout, segments
from trainer.run.metrics import Curves, JsonLines, Metrics, peak_memory
from trainer.run.records import (
    Record,
    add_record,
    bad_windows,
    claim_generation,
    edge_records,
    generations,
    last_written,
    measures,
    newest_records,
    read_records,
    record_end,
    record_restart,
    spread_records,
)
from trainer.run.segments import Segment, streams
from trainer.store.store import Entry, Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_generations_count_from_one(run: Store) -> None:
    assert [claim_generation(run) for _ in range(3)] == [1, 2, 3]


def test_starts_that_race_never_share_a_generation(run: Store) -> None:
    racers = 12
    start = threading.Barrier(racers)

    def race(_: int) -> int:
        start.wait(timeout=30)
        return claim_generation(run)

    with ThreadPoolExecutor(racers) as pool:
        assert sorted(pool.map(race, range(racers))) == list(range(1, racers + 1))


def metrics(run: Store, *, tensorboard: bool = False, generation: int = 1) -> Metrics:
    records = JsonLines(run, generation, seconds=3600)
    return Metrics([records, Curves(run, generation, seconds=3600)] if tensorboard else [records])


def events(run: Store) -> EventAccumulator:
    folder = run.uri.removeprefix("file://") + "/" + layout.TENSORBOARD
    return EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()


def curve(run: Store, name: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run).Scalars(name)]


def records(run: Store) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]


class _Counted:
    """A tracker that counts what it was asked for."""

    name, seconds = "counted", 3600.0

    def __init__(self) -> None:
        self.added, self.flushed, self.closed = list[str](), threading.Semaphore(0), 0

    def add(self, record: Record) -> None:
        self.added.append(record["kind"])

    def flush(self) -> None:
        self.flushed.release()

    def close(self) -> None:
        self.closed += 1


def test_a_record_that_matters_is_in_the_store_at_once_and_the_others_are_not_asked() -> None:
    store, other = _Counted(), _Counted()
    ours = Metrics([store, other])
    ours.write("step", step=1)
    assert not store.flushed.acquire(blocking=False)
    ours.write_through("end", step=1)
    assert store.flushed.acquire(blocking=False)
    ours.write_now("phase", step=1)
    assert store.flushed.acquire(timeout=30)
    assert not other.flushed.acquire(blocking=False)
    ours.flush()
    assert store.flushed.acquire(blocking=False)
    assert other.flushed.acquire(blocking=False)
    ours.close()
    assert store.added == other.added == ["step", "end", "phase"]
    assert (store.closed, other.closed) == (1, 1)


def test_the_windows_of_losses_that_were_not_finite_are_those_of_all_starts(run: Store) -> None:
    first, second = {"epoch": 0, "bin": 8}, {"epoch": 1, "bin": 0}
    for generation, window in enumerate((first, None, second, first), 1):
        made.write(
            run,
            generation,
            made.step(1, 2.0) | {"bad_window": {"epoch": 9}},
            made.end("failed") | {"bad_window": window},
        )
    assert bad_windows(run) == [first, second]


def test_each_record_is_one_json_object_a_line(run: Store) -> None:
    ours = metrics(run)
    ours.write("step", step=1, loss=2.5)
    ours.flush()
    assert [record["loss"] for record in records(run)] == [2.5]
    ours.write("step", step=2, loss=2.25)
    ours.close()
    assert [(record["kind"], record["step"], record["loss"]) for record in records(run)] == [
        ("step", 1, 2.5),
        ("step", 2, 2.25),
    ]
    assert all(isinstance(record[name], float) for record in records(run) for name in ("time", "clock"))


def test_a_record_has_a_clock_that_nobody_sets(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.metrics.time.monotonic", lambda: 12.34567)
    ours = metrics(run)
    ours.write("step", step=1, loss=2.5)
    ours.close()
    assert [record["clock"] for record in records(run)] == [12.346]


def test_the_peak_of_a_process_is_in_bytes() -> None:
    told = Path("/proc/self/status").read_text()
    (kibibytes,) = (line.split()[1] for line in told.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory(torch.device("cpu")) == {"host_peak_bytes": pytest.approx(1024 * int(kibibytes), rel=0.02)}


def test_other_ranks_write_nothing(run: Store) -> None:
    theirs = Metrics()
    theirs.write("step", step=1, loss=2.5)
    theirs.flush()
    theirs.close()
    assert run.list() == []


def test_tensorboard_events_lie_in_the_runs_folder(run: Store) -> None:
    ours = metrics(run, tensorboard=True)
    for step in (1, 2):
        ours.write("step", step=step, loss=1.0 / step, samples="88ed09c9")  # a text is no curve
    ours.write("eval", step=2, loss=3.0)
    ours.write("eval", step=2, loss=4.0, set="general")
    ours.write("commit", step=2, bytes=5)  # no curve of its own
    ours.close()
    assert curve(run) == [(1, 1.0), (2, 0.5)]
    assert (curve(run, "eval/loss"), curve(run, "eval/general/loss")) == ([(2, 3.0)], [(2, 4.0)])
    assert events(run).Tags()["scalars"] == ["train/loss", "eval/loss", "eval/general/loss"]


def test_a_start_that_repeats_steps_has_one_curve_with_the_start_before_it(run: Store) -> None:
    for generation, steps in ((1, range(1, 9)), (2, range(6, 13))):
        ours = metrics(run, tensorboard=True, generation=generation)
        ours.write("start", step=steps[0] - 1)
        for step in steps:
            ours.write("step", step=step, loss=float(10 * generation + step))
        ours.close()
    assert curve(run) == [(step, 10 + step) for step in range(1, 6)] + [(step, 20 + step) for step in range(6, 13)]


def test_curves_are_those_of_every_segment(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "BLOCK_BYTES", 1000)
    ours = metrics(run, tensorboard=True)
    for step in range(200):
        ours.write("step", step=step, loss=float(step))
        ours.flush()
    ours.close()
    assert len(run.list(layout.TENSORBOARD)) > 5
    assert curve(run) == [(step, float(step)) for step in range(200)]


def test_what_others_add_comes_after_what_rank_0_wrote_and_is_never_overwritten(run: Store) -> None:
    ours = metrics(run)
    claim_generation(run)
    ours.write("step", step=1)
    ours.flush()
    add_record(run, 1, "end", outcome="failed", reason="rank 0 is gone")
    add_record(run, 1, "restart", reason="again")
    ours.write("step", step=2)  # it was not gone after all
    ours.close()
    assert [record["kind"] for record in read_records(run, 1)] == ["step", "step", "end", "restart"]
    assert claim_generation(run) == 2


@pytest.mark.parametrize("failure", [StorageError("away"), OSError(28, "No space left on device"), ValueError("a bug")])
def test_no_failure_of_metrics_reaches_the_training(
    run: Store, failure: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise failure

    with monkeypatch.context() as broken:
        for owner, method in ((Store, "put"), (Curves, "add")):
            broken.setattr(owner, method, fails)
        ours = metrics(run, tensorboard=True)
        for step in range(3):
            ours.write("step", step=step)
            ours.flush()
        ours.write("step", step=3, loss=object())  # no JSON
    said = capfd.readouterr().err
    assert said.count("sending the metrics failed, which does not end the run") == 1
    assert said.count("making TensorBoard's events failed") == 1
    assert said.count("making the metrics failed") == 1
    assert str(failure) in said
    ours.close()
    assert [record["step"] for record in read_records(run, 1)] == [0, 1, 2]


def test_metrics_need_no_room_on_the_ranks_machine(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    ours = metrics(run, tensorboard=True)
    ours.write("step", step=1, loss=1.0)
    ours.close()
    assert {entry.key.partition("/")[0] for entry in run.list()} == {"metrics", "tensorboard"}


def test_a_stream_ends_where_the_last_of_its_bytes_is_though_segments_overlap() -> None:
    def segment(begin: int, size: int) -> Segment:
        return Segment(begin, Entry("key", size, datetime.fromtimestamp(0, UTC), "v"))

    assert segments.stored_bytes([segment(0, 10)]) == 10
    assert segments.stored_bytes([segment(0, 10), segment(4, 3), segment(7, 8)]) == 15


def test_a_few_records_from_everywhere_give_the_shape_of_a_long_curve(run: Store) -> None:
    made.write(run, 1, made.start(1), *(made.step(number, 3.0) for number in range(1, 1001)))
    found = segments.streams(run.list(layout.METRICS))
    steps = [record["step"] for record in spread_records(run, 1, found, 4)]
    assert steps == sorted(steps)
    assert {step // 250 for step in steps} == {0, 1, 2, 3}
    assert 4 <= len(steps) < 40
    assert spread_records(run, 2, found, 4) == []


def test_why_a_start_ended_is_what_its_ranks_said_unless_it_crashed_for_another_reason(run: Store) -> None:
    def reasons(generation: int) -> list[str]:
        return [record["reason"] for record in read_records(run, generation) if record["kind"] == "end"]

    made.write(run, 1, made.start(1), made.end("finished", "all steps"))
    record_end(run, "the driver ended")
    record_end(run, "all steps", crash=True)
    assert reasons(1) == ["all steps"]
    record_end(run, "rank 0 was killed", crash=True, died=0)
    assert reasons(1) == ["all steps", "rank 0 was killed"]
    (*_, last) = read_records(run, 1)
    assert (last["outcome"], last["died"]) == ("failed", 0)
    record_end(run, "no machine", after=1, stopped=True)
    assert generations(run) == [1, 2]
    assert [(record["outcome"], record["reason"]) for record in newest_records(run)] == [("stopped", "no machine")]
    assert newest_records(run, after=2) == []


def test_an_end_without_a_reason_is_no_record_that_readers_rely_on(run: Store) -> None:
    made.write(
        run, 1, made.start(1), {"kind": "end", "outcome": "failed", "time": made.NOW}, made.end("finished", "all")
    )
    assert [record.get("reason") for record in read_records(run, 1) if record["kind"] == "end"] == ["all"]


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        *((kind, ("step",)) for kind in ("start", "step", "eval", "commit", "skip", "waiting")),
        ("measured", ("step", "by")),
        ("first_step", ("seconds",)),
        ("end", ("outcome", "reason")),
        ("restart", ("reason",)),
        ("slow_rank", ("step", "rank", "machine")),
        ("wrong_bytes", ("step", "rank", "machine", "where", "tensor", "since")),
    ],
)
def test_a_record_without_what_every_reader_relies_on_is_none(run: Store, kind: str, needed: tuple[str, ...]) -> None:
    whole: dict[str, Any] = {name: 1 if name in ("step", "rank", "since", "seconds") else "a" for name in needed}
    torn = [{other: value for other, value in whole.items() if other != name} for name in needed]
    made.write(run, 1, *({"kind": kind, **values} for values in (*torn, whole)))
    assert list(read_records(run, 1)) == [{"kind": kind, **whole}]


def test_the_first_and_the_last_records_of_a_long_start_are_whole(run: Store) -> None:
    """Of both ends so many bytes are read, and the lines that are cut there are left out."""
    made.write(run, 1, *({"kind": "commit", "step": step} for step in range(100, 200)))
    (line, *_) = run.get(layout.metrics(1)).splitlines(keepends=True)
    for most, steps in (
        (4 * len(line) + 9, [100, 101, 102, 103, 196, 197, 198, 199]),
        *((lines * len(line), list(range(100, 200))) for lines in (50, 75, 200)),
    ):
        found = edge_records(run, 1, streams(run.list(layout.METRICS)), most)
        assert [record["step"] for record in found] == steps


def test_a_start_was_last_written_when_the_newest_part_of_its_records_was() -> None:
    def part(seconds: float) -> Any:
        return Segment(0, Entry("key", 1, datetime.fromtimestamp(seconds, UTC), "v"))

    own, added, other = layout.metrics(1), layout.added_record(1, "a"), layout.metrics(2)
    found = {own: [part(10.5), part(30.5), part(20)], added: [part(15)], other: [part(99)]}
    assert last_written(found, 1) == 30.5
    assert last_written({**found, added: [part(40)]}, 1) == 40


def test_segments_are_in_the_order_of_their_bytes_however_they_are_listed(run: Store) -> None:
    for key in ("logs/a.000000000012", "logs/a", "logs/a.000000000004"):
        run.put(key, b"12345678")
    for entries in (run.list("logs/"), run.list("logs/")[::-1]):
        assert [begin for begin, _ in streams(entries)["logs/a"]] == [0, 4, 12]


def test_records_whose_segments_are_replaced_after_they_were_listed_are_read(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "BLOCK_BYTES", 2000)
    written, listed = segments.Appender(run, layout.metrics(1)), Store.list

    def write(numbers: range) -> None:
        for number in numbers:
            written.append((json.dumps(made.step(number, 3.0)) + "\n").encode().rjust(200))
            written.flush()

    def list_before_a_block_is_made(self: Store, *prefix: str) -> list[Entry]:
        monkeypatch.setattr(Store, "list", listed)
        found = list(listed(self, *prefix))
        write(range(10, 12))
        return found

    write(range(1, 10))
    monkeypatch.setattr(Store, "list", list_before_a_block_is_made)
    assert [record["step"] for record in read_records(run, 1)] == list(range(1, 12))


def test_figures_are_the_numbers_of_a_record_and_a_restart_is_told_by_the_newest_start(run: Store) -> None:
    record = {"kind": "measured", "step": 3, "time": 1.0, "clock": 2.0, "loss": 1.5, "over": True, "by": "a"}
    assert measures(record | {"far": float("inf"), "count": 2}) == {"loss": 1.5, "count": 2}
    for generation in (1, 2):
        made.write(run, generation, made.start(1))
    record_restart(run, "a machine left")
    assert [len([one for one in read_records(run, number) if one["kind"] == "restart"]) for number in (1, 2)] == [0, 1]
