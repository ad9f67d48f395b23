"""Batches that other processes handle come back in their order, a few at a time, and a killed process is said."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.data.compile import pool
from trainer.data.compile.pool import BYTES_FOR_PROCESSES, map_batches, map_on_cores, mapper_for
from trainer.data.order.pictures import Coming, _Document
from trainer.errors import DoesNotFit


class _Here:
    """A pool that handles each batch at once, or was killed at the batch `killed_at`."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at, self.submitted, self.cancelled = killed_at, 0, False

    def submit(self, work: Callable[[Any], Any], batch: Any) -> Future[Any]:
        self.submitted += 1
        found = Future[Any]()
        if batch == self.killed_at:
            found.set_exception(BrokenProcessPool("killed"))
        else:
            found.set_result(10 * batch)
        return found

    def shutdown(self, *, cancel_futures: bool) -> None:
        self.cancelled = cancel_futures

    @contextmanager
    def started(self, start: Any, processes: int) -> Iterator["_Here"]:
        assert processes == 3
        yield self


def mapped(here: _Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, str]]:
    monkeypatch.setattr(pool, "_worker_pool", here.started)
    monkeypatch.setattr(pool, "_BATCHES_AHEAD", 2)
    work: Any = ((number, f"beside {number}") for number in range(20))
    start: Any = list
    return map_batches(work, start, 3)


def test_results_come_in_order_and_few_batches_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _Here()
    found = mapped(here, monkeypatch)
    for number in range(20):
        assert next(found) == (10 * number, f"beside {number}")
        assert here.submitted == min(20, number + 2 * 3 + 1)
    assert list(found) == []
    assert here.cancelled


def test_who_reads_no_further_cancels_what_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _Here()
    found: Any = mapped(here, monkeypatch)
    next(found)
    found.close()
    assert here.cancelled


def test_a_process_that_is_killed_is_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mapped(_Here(killed_at=2), monkeypatch)
    assert [next(found)[0] for _ in range(2)] == [0, 10]
    with pytest.raises(DoesNotFit, match="a process that reads the data was killed, as happens when the machine's"):
        next(found)


@pytest.mark.parametrize("with_torch", [False, True])
def test_a_process_that_reads_leaves_the_cores_to_ranks_and_imports_torch_only_where_it_is_here_too(
    with_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[Any]()
    for name in ("makes_tokens_alone", "transformers_without_torch", "end_with_parent"):
        monkeypatch.setattr(pool, name, lambda name=name: done.append(name))
    monkeypatch.setattr(pool.os, "nice", done.append)
    monkeypatch.setattr(pool.signal, "signal", lambda *given: done.append(given))
    monkeypatch.setattr(pool.gc, "freeze", lambda: None)
    monkeypatch.setattr(pool, "_worker", None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    (tmp_path / "start").write_bytes(pickle.dumps(list))
    pool._start_worker(str(tmp_path / "start"), with_torch)
    light = [] if with_torch else ["makes_tokens_alone", "transformers_without_torch"]
    assert done == [*light, 10, (signal.SIGINT, signal.SIG_IGN), "end_with_parent"]
    assert (os.environ["TOKENIZERS_PARALLELISM"], pool._worker) == ("false", [])


def test_small_data_is_read_by_this_process_and_large_data_by_others() -> None:
    small: Any = mapper_for(BYTES_FOR_PROCESSES - 1, map_on_cores)
    assert (small.func, small.keywords) == (map_batches, {"processes": 1})
    many: Any = object()
    assert mapper_for(BYTES_FOR_PROCESSES, many) is many
    assert mapper_for(BYTES_FOR_PROCESSES) is map_on_cores


def test_a_killed_process_that_read_pictures_is_said_and_its_pictures_are_held_no_longer() -> None:
    taken, documents = list[int](), list[_Document]()
    reader: Any = SimpleNamespace(taken=taken.append)
    for segment in (0, 1):
        documents.append(_Document(segment, Future(), 100 + segment, "key"))
        documents[-1].inputs.set_result({})
    assert [(seen.segment, seen.key) for seen in Coming(reader, documents).arrived()] == [(0, "key"), (1, "key")]
    killed = _Document(2, Future(), 1000, "key")
    killed.inputs.set_exception(BrokenProcessPool("killed"))
    with pytest.raises(DoesNotFit, match=r"a process that reads pictures was killed.* lower data\.images\.read_ahead"):
        Coming(reader, [*documents, killed]).arrived()
    assert taken == [201, 1201]
