"""The process beside rank 0 brings every step to a service once and in order, whatever becomes of the service and the
starts.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import parse_config
from trainer.run import layout
from trainer.run.metrics import JsonLines, Metrics
from trainer.run.records import claim_generation, record_line
from trainer.run.trackers import StepPoints, Unshown, companion
from trainer.run.trackers.companion import Companion, ServiceState, TrackerProcess, follow
from trainer.store.store import Store, open_store


class Remembering:
    """A service in memory, which fails while it is `away`."""

    def __init__(self, shown: int = -1) -> None:
        self.shown, self.sent, self.away, self.ends = shown, list[int](), False, list[str | None]()

    def show(self, rows: Sequence[StepPoints]) -> None:
        if self.away and self.sent:
            raise ConnectionError("it is away")
        self.sent += [row.step for row in rows]

    def close(self, outcome: str | None) -> None:
        self.ends.append(outcome)


def written(run: Store, begin: int, end: int, **outcome: str) -> None:
    """The records of a whole start that takes the steps after `begin` up to `end`."""
    metrics = Metrics([JsonLines(run, claim_generation(run), seconds=3600)])
    metrics.write("start", step=begin)
    for step in range(begin + 1, end + 1):
        metrics.write("step", step=step, loss=1.0)
    if outcome:
        metrics.write("end", reason="", **outcome)
    metrics.close()


def test_nothing_is_lost_or_shown_twice_when_a_service_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companion, "ROWS", 2)
    run, service = open_store(str(tmp_path)).sub("demo"), Remembering()
    beside_first = Companion(run, 1, "memory", lambda kept: service)
    written(run, 0, 9)
    service.away = True
    with pytest.raises(ConnectionError):
        beside_first.look()
    assert service.sent == [1, 2]
    assert ServiceState.read(run, "memory").shown == 2
    service.away = False
    beside_first.look()
    assert service.sent == [1, 2, 3, 4, 5, 6, 7, 8]

    again = Remembering(ServiceState.read(run, "memory").shown)
    beside_second = Companion(run, 2, "memory", lambda kept: again)
    written(run, 5, 12, outcome="finished")
    beside_first.look()
    assert beside_first.superseded  # and says nothing any more, as the newer one does
    assert service.sent == [1, 2, 3, 4, 5, 6, 7, 8]
    monkeypatch.setattr(companion, "ROWS", 100)
    beside_second.look()
    beside_second.look()
    assert again.sent == [9, 10, 11, 12]
    for beside in (beside_first, beside_second):
        beside.close()
    assert (service.ends, again.ends) == ([], ["finished"]), "the newer one tells how the run ended"
    assert ServiceState.read(run, "memory").shown == 12, "however few there were"


def test_a_step_that_a_start_repeats_is_one_row_and_the_last_one_is_whole_when_the_run_has_ended() -> None:
    unshown = Unshown(2)

    def add(kind: str, **values: Any) -> None:
        unshown.add({"kind": kind, "time": 100.0, "clock": 1.0, **values})

    def rows(most: int = 10) -> list[list[tuple[int, dict[str, float]]]]:
        return [[(row.step, row.points) for row in rows] for rows in unshown.batches(most)]

    for step in (2, 3, 4):
        add("step", step=step, loss=float(step))
    add("end", step=4, outcome="failed")
    assert unshown.outcome == "failed"
    add("start", step=2)
    assert unshown.outcome is None, "another start goes on"
    for step in (3, 4):
        add("step", step=step, loss=step + 0.25)
    assert (rows(), unshown.shown) == ([[(3, {"train/loss": 3.0})]], 3)
    add("eval", step=4, loss=0.5)
    assert (rows(), unshown.shown) == ([], 3), "its values may come again"
    add("step", step=5, loss=5.25)
    add("step", step=6, loss=6.25)
    add("end", step=6, outcome="finished")
    four, five, six = (4, {"train/loss": 4.25, "eval/loss": 0.5}), (5, {"train/loss": 5.25}), (6, {"train/loss": 6.25})
    assert (rows(2), unshown.shown, unshown.outcome) == ([[four, five], [six]], 6, "finished")


def test_a_service_is_opened_once_its_own_start_has_begun_with_an_id_that_is_kept(tmp_path: Path) -> None:
    run, opened = open_store(str(tmp_path)).sub("demo"), list[ServiceState]()

    def opens(kept: ServiceState) -> Remembering:
        assert ServiceState.read(run, "memory") == kept  # before the service knows it
        opened.append(kept)
        return Remembering()

    written(run, 0, 3)
    beside_second = Companion(run, 2, "memory", opens)
    claim_generation(run)
    beside_second.look()
    loading = record_line("phase", {"phase": "load"})
    run.put(layout.metrics(2), loading)
    beside_second.look()
    assert opened == []
    run.put(layout.metrics(2), loading + record_line("start", {"step": 3}))
    beside_second.look()
    assert len(opened) == 1
    copy = open_store(str(tmp_path)).sub("copy")
    copy.put(layout.tracker("memory"), run.get(layout.tracker("memory")))
    assert ServiceState.read(copy, "memory").id != opened[0].id


def test_a_service_is_told_of_the_end_after_the_last_look(tmp_path: Path) -> None:
    run, over, service = open_store(str(tmp_path)).sub("demo"), threading.Event(), Remembering()
    written(run, 0, 3, outcome="stopped")
    over.set()
    follow(Companion(run, 1, "memory", lambda kept: service), over, "memory")
    assert (service.sent, service.ends) == ([1, 2, 3], ["stopped"])


def test_a_failing_service_is_said_once_and_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, over, pauses = open_store(str(tmp_path)).sub("demo"), threading.Event(), list[float]()
    written(run, 0, 3, outcome="finished")
    tries = 0

    def opens(kept: ServiceState) -> Remembering:
        nonlocal tries
        tries += 1
        raise ConnectionError("https://ann:pw-of-ann@host/api is away\nand this is the second line")

    monkeypatch.setattr(over, "wait", lambda seconds: pauses.append(seconds) or len(pauses) == 8)
    follow(Companion(run, 1, "memory", opens), over, "memory")
    said = capfd.readouterr().err
    first, last = said.splitlines()
    assert first.startswith("sending the run to memory failed, which does not end the run; it will be tried again: ")
    assert first.endswith("ConnectionError: https://host/api is away")  # and the log is kept in the run's folder
    assert "; only the next start of the run tries it again: ConnectionError: " in last
    assert "pw-of-ann" not in said
    assert tries == 8
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600]


def test_a_service_that_answers_again_is_asked_as_often_as_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    over, pauses, looks = threading.Event(), list[float](), iter([False, False, True, False, True, True])

    def look() -> None:
        if not next(looks):
            raise ConnectionError("it is away")

    monkeypatch.setattr(over, "wait", lambda seconds: pauses.append(seconds) or len(pauses) == 6)
    beside: Any = SimpleNamespace(superseded=False, look=look, close=lambda: None)
    follow(beside, over, "memory")
    assert pauses == [10, 20, 40, 10, 20, 10]


def test_the_process_hears_no_signal_to_the_ranks_and_has_services_send_their_own_figures_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"
    program = f"""
read task
cut -d ' ' -f 6 /proc/self/stat > {said}
echo $MLFLOW_DISABLE_TELEMETRY $HF_HUB_DISABLE_TELEMETRY $WANDB_ERROR_REPORTING >> {said}
read last
echo $last >> {said}"""
    monkeypatch.setattr(companion.children, "apart", lambda _command: ["sh", "-c", program])
    for name in ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "as the user likes")
    config = parse_config("run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}")
    TrackerProcess("memory", 1, config).close()
    session, given, last = said.read_text().splitlines()
    assert int(session) != os.getsid(0)
    assert given == "true 1 as the user likes"
    assert last == "over"


def test_a_copy_of_a_runs_folder_is_another_run_of_the_service(tmp_path: Path) -> None:
    run, copy = (open_store(str(tmp_path)).sub(name) for name in ("demo", "copied"))
    kept = ServiceState("id", "demo", 3)
    kept.write(run, "memory")
    assert ServiceState.read(run, "memory") == kept
    copy.put(layout.tracker("memory"), run.get(layout.tracker("memory")))
    run.put(layout.tracker("later"), b'{"id": "id", "run": "demo", "shown": 3, "more": 1}')
    assert ServiceState.read(run, "later").shown == -1, "of a version that keeps something else"
    own = ServiceState.read(copy, "memory")
    assert (own.run, own.shown) == ("copied", -1)
    assert own.id != "id"


def test_a_service_calls_the_run_as_the_settings_say_or_by_its_own_name(tmp_path: Path) -> None:
    text = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 1}\n"
    for settings, name in (((), "demo"), (("track.name=shown", "track.trackers=[wandb]"), "shown")):
        found = companion.page(parse_config(text, settings), open_store(str(tmp_path)), ServiceState("id", "demo", 3))
        assert (found.name, found.folder, found.shown) == (name, str(tmp_path), 3)
    bucket = open_store("memory://runs").sub("demo")
    assert companion.page(parse_config(text), bucket, ServiceState("id", "demo", 3)).folder is None
