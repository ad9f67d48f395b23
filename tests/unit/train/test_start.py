"""How a start ends early, what it leaves of its reason, and what is committed before."""

import signal
import socket
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.errors import CapstanError, DataError, NonFiniteLoss, SlowMachine, Stopped, StorageError
from trainer.run.folder import SettingChange
from trainer.run.records import claim_generation, newest_records
from trainer.run.requests import Stop
from trainer.store.store import open_store
from trainer.train import loop, start
from trainer.train.heartbeat import Hang
from trainer.train.start import Elapsed, early_end, last_words


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (Stopped("on request"), {"outcome": "stopped", "reason": "on request"}),
        (DataError("a row"), {"outcome": "failed", "reason": "a row"}),
        (
            NonFiniteLoss("nan", {"epoch": 1}),
            {"outcome": "failed", "reason": "nan", "bad_window": {"epoch": 1}},
        ),
        (
            SlowMachine("b is slow", [2], ["b"]),
            {"outcome": "stopped", "reason": "b is slow", "lost_machine": True, "slow_ranks": [2]},
        ),
        (ValueError("a mistake"), {"outcome": "failed", "reason": "ValueError: a mistake"}),
    ],
)
def test_an_early_end_leaves_its_reason(
    error: Exception, facts: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    written, spoken = list[Any](), list[int]()
    metrics = SimpleNamespace(write=lambda kind, **of: written.append((kind, of)))
    given: Any = SimpleNamespace(metrics=metrics, let_last_words=lambda: spoken.append(1))
    with pytest.raises(type(error)) as caught, early_end(given):
        raise error
    assert caught.value is error
    assert written == [("end", {"step": None, **facts})]
    assert spoken == [1], "where some rank hangs, this is only what follows from it"
    shown = capfd.readouterr().err
    assert str(error) in shown
    assert ("Traceback" in shown) is not isinstance(error, CapstanError)


def test_an_interrupt_by_hand_is_no_end_of_the_start() -> None:
    given: Any = SimpleNamespace(metrics=None, let_last_words=None)
    with pytest.raises(KeyboardInterrupt), early_end(given):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("hangs", "mine"), [([0], True), ([2], True), ([0], False)])
def test_the_last_words_of_a_rank_are_of_the_one_that_hangs(tmp_path: Path, hangs: list[int], mine: bool) -> None:
    folder, said = open_store(str(tmp_path)), list[Any]()
    generation = claim_generation(folder)
    metrics: Any = SimpleNamespace(write_through=lambda kind, **of: said.append((kind, of)))
    last_words(folder, generation, metrics, lambda: said.append("log"))(Hang("it hangs", hangs), mine)
    end = {"outcome": "failed", "step": None, "reason": "it hangs", "hung_ranks": hangs}
    assert said == ["log", *([("end", end)] if mine else [])]
    added = [record["reason"] for record in newest_records(folder) if record["kind"] == "end"]
    assert added == (["it hangs"] if mine and 0 in hangs else []), "rank 0 may never write again"


def test_a_start_says_that_it_loads_and_leaves_nothing_behind_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    text = (
        f"run: {{name: a, store: {tmp_path}}}\nmodel: {{base: b}}\ndata: {{train: [{{path: c}}]}}\ntrain: {{steps: 1}}"
    )
    config = parse_config(f"{text}\ntrack: {{tensorboard: false, flush_seconds: 3600}}")
    folder = store.sub("a")
    world: Any = SimpleNamespace(
        rank=0, world_size=1, broadcast=lambda value: value, gather_objects=lambda mine: [mine]
    )
    ranks: Any = SimpleNamespace(rank=0, world_size=1, world=world)
    resolved: Any = SimpleNamespace(config=config)
    monkeypatch.setattr(start, "rank_log", lambda *_: nullcontext(lambda: None))
    threads, asked = set(threading.enumerate()), signal.getsignal(signal.SIGTERM)
    with start.opened(start.ClaimedStart(resolved, ranks, store, folder, claim_generation(folder))) as opened:
        assert signal.getsignal(signal.SIGTERM) is not asked
        signal.raise_signal(signal.SIGTERM)
        assert opened.stop.requested is Stop.END
        opened.metrics.write("end", outcome="finished", reason="")
    assert [(record["kind"], record.get("phase")) for record in newest_records(folder)] == [
        ("phase", "load"),
        ("end", None),
    ]
    assert signal.getsignal(signal.SIGTERM) is asked
    left = set(threading.enumerate()) - threads
    for thread in left:
        thread.join(5)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.mark.parametrize(("flush", "looks"), [(3600, 5.0), (2, 2.0)])
def test_a_stop_request_is_looked_for_as_often_as_records_are_sent_and_every_five_seconds_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: float, looks: float
) -> None:
    class Looks(Exception):
        pass

    def found(folder: Any, **given: Any) -> Any:
        raise Looks(given)

    monkeypatch.setattr(start, "StopSignal", found)
    for name in ("rank_log", "adapters_beside"):
        monkeypatch.setattr(start, name, lambda *_, **__: nullcontext(lambda: None))
    config: Any = SimpleNamespace(track=SimpleNamespace(flush_seconds=flush))
    for rank in (0, 1):
        monkeypatch.setattr(start, "open_trackers", lambda *_: ())
        claimed: Any = SimpleNamespace(
            resolved=None,
            ranks=SimpleNamespace(rank=rank, world_size=2),
            folder=open_store(str(tmp_path)),
            generation=1,
            config=config,
            starter=SimpleNamespace(kept=None, preempted="asked"),
        )
        with pytest.raises(Looks) as caught, start.opened(claimed):
            pass
        assert caught.value.args == ({"watches": rank == 0, "seconds": looks, "preempted": "asked"},)


def test_the_last_records_of_a_rank_0_that_was_lost_are_stored_by_the_one_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened(Exception):
        pass

    def stops(*_: Any, **__: Any) -> Any:
        raise Opened

    done = list[Any]()
    monkeypatch.setattr(start, "StopSignal", stops)
    monkeypatch.setattr(start, "store_tail", lambda folder, tail: done.append(("stored", tail)))
    monkeypatch.setattr(start, "open_trackers", lambda *of: done.append(("goes on with", of[-1])) or ())
    for name in ("rank_log", "adapters_beside"):
        monkeypatch.setattr(start, name, lambda *_, **__: nullcontext(lambda: None))
    for rank in (1, 0):
        claimed: Any = SimpleNamespace(
            resolved=None,
            ranks=SimpleNamespace(rank=rank, world_size=2),
            folder=open_store(str(tmp_path)),
            generation=2,
            config=SimpleNamespace(track=SimpleNamespace(flush_seconds=1)),
            starter=SimpleNamespace(kept=SimpleNamespace(records="its last"), preempted=None),
        )
        with pytest.raises(Opened), start.opened(claimed):
            pass
    assert done == [("stored", "its last"), ("goes on with", "its last")]


def test_a_line_of_the_log_is_said_once_by_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    said, anything = list[str](), SimpleNamespace()
    monkeypatch.setattr(start, "tell", said.append)
    for rank in (0, 1):
        parts: Any = {name: anything for name in ("resolved", "store", "folder")}
        start.ClaimedStart(**parts, ranks=SimpleNamespace(rank=rank), generation=1).log(f"of rank {rank}")  # type: ignore[arg-type]
    assert said == ["of rank 0"]


def test_settings_that_cannot_be_kept_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = list[str]()

    def fails(*_: Any) -> Any:
        raise StorageError("the bucket is gone")

    monkeypatch.setattr(start, "record_settings", fails)
    start.record_changes(SimpleNamespace(folder=None, generation=1, config=None, log=logged.append))  # type: ignore[arg-type]
    assert logged == ["the settings of this start could not be kept, which does not end the run: the bucket is gone"]


def test_a_changed_setting_is_recorded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said, written = list[str](), list[Any]()
    monkeypatch.setattr(start, "record_settings", lambda *_: [SettingChange("optim.lr", 1e-3, 1e-4)])
    metrics = SimpleNamespace(write=lambda kind, **values: written.append((kind, values)))
    start.record_changes(SimpleNamespace(folder=None, generation=2, config=None, log=said.append, metrics=metrics))  # type: ignore[arg-type]
    assert written == [("change", {"setting": "optim.lr", "old": 1e-3, "new": 1e-4})]
    assert said == ["optim.lr is 0.0001 from now on; it was 0.001"]


def test_a_start_that_began_elsewhere_counts_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: 1000.0, monotonic=lambda: 50.0)
    monkeypatch.setattr(start, "time", clock)
    elapsed, ahead = Elapsed(990.5), Elapsed(1003.0)
    clock.monotonic = lambda: 52.25
    elapsed.met()
    clock.monotonic = lambda: 53.0
    assert (elapsed.launch_seconds, elapsed.meet_seconds, elapsed.seconds) == (9.5, 2.25, 12.5)
    assert ahead.seconds == 3.0, "a clock that was set meanwhile"


class Checkpoints:
    """Those of a run whose newest one is of step 4."""

    newest, run = 4, SimpleNamespace(uri="/runs/a")

    def __init__(self) -> None:
        self.done = list[Any]()

    def save(self, engine: Any, step: int, position: Any, *, eval_loss: Any, may_skip: bool) -> None:
        self.done.append((step, position, eval_loss, may_skip))

    def finish(self) -> None:
        self.done.append("finished")


def training(requested: int = 0, others: int = 0) -> Any:
    """A rank of two; the other has been asked for `others`."""
    ranks = SimpleNamespace(broadcast=lambda value: value, gather=lambda mine: [(mine,), (others,)])
    begun, written = list[Any](), list[Any]()
    return SimpleNamespace(
        engine=None,
        checkpoints=Checkpoints(),
        begun=begun,
        written=written,
        begin=lambda *of: begun.append(of),
        start=SimpleNamespace(
            ranks=ranks,
            stop=SimpleNamespace(requested=requested, reason="on request"),
            pulse=lambda *of: begun.append(of),
            metrics=SimpleNamespace(write=lambda kind, **of: written.append((kind, of))),
        ),
    )


@pytest.mark.parametrize(("step", "saved"), [(4, False), (5, True)])
def test_what_is_committed_already_is_not_committed_again_before_the_end(step: int, saved: bool) -> None:
    run, position = training(others=int(Stop.END)), Position(epoch=1, bin=3)
    with pytest.raises(
        Stopped, match=f"stopped at step {step} on request, with a checkpoint committed. `capstan resume a "
    ):
        loop.stop_before_training(run, step, position, committed=False)
    save = [(step, position.to_json(), None, False)] if saved else []
    assert run.checkpoints.done == [*save, "finished"]
    assert run.begun == [("save", step)]
    done = training(others=int(Stop.END))
    with pytest.raises(Stopped):
        loop.stop_before_training(done, step, position, committed=True)
    assert done.checkpoints.done == []
    nobody = training()
    loop.stop_before_training(nobody, step, position, committed=False)
    assert nobody.checkpoints.done == []


def test_a_rank_that_waits_for_data_says_for_which_step() -> None:
    run = training()
    loop._wait(run, 6, True)
    loop._wait(run, 6, False)
    assert run.begun == [("compile", 7), ("data", 7)]
    assert run.written == [("compiling", {"step": 6})]


def test_a_loss_that_is_no_number_names_its_data_unless_that_was_sampled() -> None:
    sampled, read = (loop._not_finite("loss", 3, float("nan"), window) for window in (None, Position(bin=2)))
    assert (sampled.window, read.window) == (None, Position(bin=2).to_json())
    assert str(read).startswith("the loss of step 3 is nan.")


def test_each_part_of_a_run_drops_other_values() -> None:
    seeds = {loop._dropout_seed(*of) for of in ((1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5))}
    assert len(seeds) == 5
    torch.manual_seed(max(seeds))


def test_a_start_records_what_all_of_its_ranks_did() -> None:
    written = list[Any]()
    others = ("host-b", 7, "b", {"launch": 9.0, "load": 1.0, "restore": 0.25})
    ranks = SimpleNamespace(
        world_size=2,
        device_name="cpu",
        gather=lambda mine: [(mine,), (2e9,)],
        gather_objects=lambda mine: [mine, others],
    )
    given: Any = SimpleNamespace(
        ranks=ranks,
        generation=3,
        config=SimpleNamespace(sharding=SimpleNamespace(sequence_parallel=1)),
        starter=SimpleNamespace(machine="a", facts={"image": "x"}),
        elapsed=SimpleNamespace(launch_seconds=2.0004, meet_seconds=1.5, seconds=20.0),
        metrics=SimpleNamespace(write=lambda kind, **of: written.append((kind, of))),
    )
    report = start.LoadReport(read_bytes=10**9, kept_bytes=5, seconds=4.0, kernels="liger")
    start.record_start(given, report, step=4, restore_seconds=0.5)
    ((kind, record),) = written
    assert (kind, record["step"], record["image"], record["generation"]) == ("start", 4, "x", 3)
    assert (record["load_gigabytes_per_second"], record["read_bytes"]) == (0.75, 3 * 10**9)
    assert (record["machines"], record["hosts"][1], record["pids"][1]) == (["a", "b"], "host-b", 7)
    assert record["host"] == record["hosts"][0] == socket.gethostname()
    assert record["slowest"]["launch"] == {"rank": 1, "machine": "b", "seconds": 9.0, "median": 5.5}
    assert record["slowest"]["load"]["machine"] == record["slowest"]["restore"]["machine"] == "a"
    seconds = ("launch_seconds", "meet_seconds", "load_seconds", "start_seconds")
    assert [record[name] for name in seconds] == [2.0, 1.5, 4.0, 20.0]
    assert (record["kept_bytes"], record["kernels"], record["device"], record["world_size"]) == (5, "liger", "cpu", 2)


def test_an_adapter_that_a_run_begins_from_is_read_into_the_parts_that_each_rank_has() -> None:
    done, logged = list[Any](), list[str]()
    values = torch.arange(12.0)
    parts = [
        SimpleNamespace(name="a", begin=2, end=6, states={"master": torch.full((4,), -1.0)}),
        SimpleNamespace(name="b", begin=0, end=3, states={"master": torch.full((3,), -1.0)}),
    ]

    def read(ranges: dict[str, tuple[int, int]]) -> Any:
        done.append(ranges)
        yield "a", 3, 6, "F32", values[3:6].numpy().tobytes()
        yield "b", 0, 3, "BF16", values[:3].bfloat16().view(torch.uint8).numpy().tobytes()

    beginning: Any = SimpleNamespace(check=lambda: done.append("checked"), read=read, facts={"start": "first at 3"})
    engine: Any = SimpleNamespace(partitions=lambda: parts, refresh=lambda updates: done.append(updates))
    ranks = SimpleNamespace(on_first=lambda of: of(), together=lambda of: of())
    given: Any = SimpleNamespace(ranks=ranks, log=logged.append)
    start.begin_from(beginning, given, engine)
    assert done == ["checked", {"a": (2, 6), "b": (0, 3)}, 0]
    assert [part.states["master"].tolist() for part in parts] == [[-1.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]
    assert logged == ["begins from the adapter of first at 3"]
