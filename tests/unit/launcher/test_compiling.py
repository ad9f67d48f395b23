"""The rest of a run's data, compiled beside its ranks: what is told to whom when it cannot go on."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.drive import driver
from launcher.drive.driver import BY_COMPILATION, Compilation
from launcher.view.status import read_status
from tests.faulty import Fault, FaultyStore
from tests.unit.run.made_records import start, write
from trainer.config import parse_config
from trainer.errors import Damaged, DataError, NothingCommitted, Stopped, Unreachable
from trainer.run import layout
from trainer.run.requests import request_stop, stop_requester
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(driver, "_AGAIN_SECONDS", 0.01)
    return open_store(str(tmp_path / "run"))


def compilation(run: Store, *again: Iterator[int]) -> tuple[Compilation, list[str]]:
    """A compilation that gives the next of `again` each time it begins anew, and the list of its messages."""
    words: list[str] = []
    made, rests = Compilation(None, run, words.append), iter(again)  # pyright: ignore[reportArgumentType]
    made.begin = lambda *, on_cluster: (None, next(rests))  # pyright: ignore[reportAttributeAccessIssue]
    return made, words


def chapters(*numbers: int, then: BaseException | None = None, done: threading.Event | None = None) -> Iterator[int]:
    yield from numbers
    if then:
        raise then
    if done:
        done.set()


def told(run: Store) -> bool:
    return run.exists(layout.NO_MORE_DATA)


def stop_when_told(run: Store) -> None:
    """Do what ranks do: stop once the data has ended and a stop is asked for."""
    while not (told(run) and stop_requester(run)):
        threading.Event().wait(0.01)
    raise Stopped("as asked")


def test_it_goes_on_when_a_store_that_was_out_of_reach_is_back(run: Store) -> None:
    done = threading.Event()
    made, words = compilation(run, chapters(0, 1, then=Unreachable("gone")), chapters(0, 1, 2, done=done))
    with made.beside(chapters(1, then=Unreachable("the store does not answer"))):
        assert done.wait(10)
    assert [word for word in words if word.startswith("chapter")] == [
        f"chapter {number} of the training data is compiled" for number in (2, 3)
    ]
    assert any("the store does not answer" in word for word in words)
    assert not told(run)


def test_a_failure_is_told_to_the_ranks_and_is_how_the_run_ends(run: Store) -> None:
    made, _ = compilation(run)
    with pytest.raises(DataError, match="line 7"), made.beside(chapters(1, then=DataError("line 7"))):
        stop_when_told(run)
    assert stop_requester(run) == BY_COMPILATION


def test_the_ranks_own_failure_is_how_the_run_ends_where_its_data_has_none(run: Store) -> None:
    made, _ = compilation(run)
    with pytest.raises(Damaged, match="a shard"), made.beside(chapters(1)):
        raise Damaged("a shard is damaged")
    write(run, 1, start(1))
    made, _ = compilation(run)
    with pytest.raises(DataError, match="line 7"), made.beside(chapters(1, then=DataError("line 7"))):
        stop_when_told(run)
    status = read_status(run)
    assert (status.state, status.reason) == ("failed", "line 7"), "its ranks know only that they were to stop"


def test_the_first_data_is_compiled_on_the_cluster_and_the_rest_beside_the_ranks_here(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, lines = list[Any](), list[str]()
    monkeypatch.setattr(driver, "resolve_base", lambda model: None)
    monkeypatch.setattr(driver, "map_on_cluster", lambda log, look, rows, start: "the cluster")
    monkeypatch.setattr(driver, "map_on_cores", lambda rows, start: "this machine")
    monkeypatch.setattr(driver, "log_left_out", lambda log, what, now: log(f"left out of {what}"))

    def prepare_start(config: Any, base: Any, store: Any, progress: Any, mapper: Any) -> tuple[Any, Iterator[int]]:
        work[:] = progress, mapper
        return mapper((), None), iter(())

    monkeypatch.setattr(driver, "prepare_start", prepare_start)
    config = parse_config(
        f"run: {{name: one, store: {tmp_path}}}\nmodel: {{base: m}}\ndata: {{train: [{{path: d}}]}}\ntrain: {{steps: 1}}\n"
    )
    made = Compilation(config, run, lines.append)
    for on_cluster, first in ((True, "the cluster"), (False, "this machine")):
        assert made.begin(on_cluster=on_cluster)[0] == first
        assert work[1]((), None) == "this machine"
    progress, _ = work
    assert lines == []
    progress("train", None)
    assert lines == ["left out of train"]
    request_stop(run, by="me")
    made._looked = 0.0
    with pytest.raises(NothingCommitted, match="stopped by me while its data was compiled"):
        progress("train", None)
    with pytest.raises(NothingCommitted, match="stopped by me before it started"):
        made.begin(on_cluster=False)
    made._over.set()
    with pytest.raises(Stopped, match="the run has ended, and needs no more data"):
        progress("train", None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a mistake of ours")])
def test_whatever_ends_it_is_told(run: Store, error: BaseException) -> None:
    made, _ = compilation(run)
    with pytest.raises(type(error)), made.beside(chapters(1, then=error)):
        stop_when_told(run)


def test_a_stop_that_ends_it_is_told_and_asks_for_no_other(run: Store) -> None:
    made, _ = compilation(run)

    def ranks_stop() -> None:
        while not told(run):
            threading.Event().wait(0.01)
        raise Stopped("at step 7")

    with pytest.raises(Stopped, match="at step 7"), made.beside(chapters(1, then=Stopped("while data was compiled"))):
        ranks_stop()
    assert stop_requester(run) is None


def test_it_is_told_also_when_the_store_fails_meanwhile(run: Store) -> None:
    for at in (1, 2):
        made, _ = compilation(FaultyStore(run, Fault(at)))
        with pytest.raises(DataError), made.beside(chapters(then=DataError("line 7"))):
            stop_when_told(run)
        run.delete(layout.NO_MORE_DATA)
        run.delete(layout.STOP)


def test_nothing_is_told_once_the_run_is_over(run: Store) -> None:
    over = threading.Event()
    made, _ = compilation(run)

    def rest() -> Iterator[int]:
        over.wait(10)
        yield from chapters(then=DataError("line 7"))

    with made.beside(rest()):
        made._over.set()
        over.set()
    assert not told(run)
