"""A stream of bytes in a store that cannot append: few segments, each byte written a few times, and one to its
reader.
"""

import os
import random

import pytest

from trainer.errors import NotFound, StorageError
from trainer.run import segments
from trainer.run.segments import Appended, Appender, Tail, read_stream, store_tail, streams
from trainer.store.store import Store, open_store

LOG = "logs/rank-00000.log"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(segments, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(segments, "LIMIT_BYTES", 8000)
    return open_store("memory://")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(key, bytes) of each write."""
    writes: list[tuple[str, int]] = []
    put = Store.put

    def counted(self: Store, key: str, data: bytes) -> None:
        put(self, key, data)
        writes.append((key, len(data)))

    monkeypatch.setattr(Store, "put", counted)
    return writes


def keys(folder: Store) -> list[str]:
    return [entry.key for entry in folder.list()]


def line(number: int) -> bytes:
    return f"line {number:094d}\n".encode()  # 100 bytes


def test_a_reader_that_looks_now_and_then_gets_every_byte_once_and_in_order(folder: Store) -> None:
    log, reader, seen, chance = Appender(folder, LOG), Appended(folder), bytearray(), random.Random(3)
    for number in range(400):
        log.append(line(number))
        if chance.random() < 0.5:
            log.flush()
        if chance.random() < 0.2:
            seen += reader.read(streams(folder.list("logs/")).get(LOG, []))
    log.close()
    seen += reader.read(streams(folder.list("logs/"))[LOG])
    everything = b"".join(map(line, range(400)))
    assert bytes(seen) == everything
    assert read_stream(folder, "logs/", LOG) == everything
    by_name = b"".join(folder.get(key) for key in keys(folder))
    assert by_name == everything


@pytest.mark.parametrize("lines_a_flush", [1, 7, 50])
def test_bytes_written_and_segments_listed_are_bounded_by_those_of_the_stream(
    folder: Store, written: list[tuple[str, int]], lines_a_flush: int
) -> None:
    log, longest = Appender(folder, LOG), 0
    for number in range(1000):
        log.append(line(number))
        if number % lines_a_flush == 0:
            log.flush()
            longest = max(longest, len(log._block))
    log.close()
    assert sum(size for _, size in written) <= (segments.SHORT_WRITES / 2 + 1.5) * 100_000
    assert len(keys(folder)) <= 100_000 / segments.BLOCK_BYTES
    assert longest <= segments.BLOCK_BYTES + 100 * lines_a_flush


def test_a_block_is_never_written_again(folder: Store, written: list[tuple[str, int]]) -> None:
    log = Appender(folder, LOG)
    for number in range(200):
        log.append(line(number))
        log.flush()
    blocks = [key for key, size in written if size >= segments.BLOCK_BYTES]
    for key in blocks:
        last = max(index for index, (name, _) in enumerate(written) if name == key)
        assert written[last][1] >= segments.BLOCK_BYTES
    assert len(blocks) == len(set(blocks)) == 10


def test_what_is_unchanged_is_not_written(folder: Store, written: list[tuple[str, int]]) -> None:
    log = Appender(folder, LOG)
    log.flush()
    log.append(b"once\n")
    for _ in range(5):
        log.flush()
    log.close()
    assert written == [(LOG, 5)]


@pytest.mark.parametrize("verb", ["put", "delete"])
def test_a_store_that_fails_now_and_then_loses_nothing(
    folder: Store, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    chance, plain = random.Random(1), getattr(Store, verb)

    def flaky(*given: object) -> None:
        if chance.random() < 0.3:
            raise StorageError("away")
        plain(*given)

    monkeypatch.setattr(Store, verb, flaky)
    log = Appender(folder, LOG)
    for number in range(300):
        log.append(line(number))
        try:
            log.flush()
        except StorageError:
            continue
    monkeypatch.undo()
    monkeypatch.setattr(segments, "BLOCK_BYTES", 2000)
    log.close()
    assert read_stream(folder, "logs/", LOG) == b"".join(map(line, range(300)))


def test_a_store_that_is_away_for_long_costs_bounded_memory_and_is_told_of(
    folder: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Appender(folder, LOG)
    for number in range(1000):
        log.append(line(number))
    assert log.unsent == segments.LIMIT_BYTES
    log.flush()
    assert f"{100_000 - segments.LIMIT_BYTES} bytes of {LOG} are lost" in capfd.readouterr().err
    log.append(b"back\n")
    log.close()
    assert read_stream(folder, "logs/", LOG) == b"".join(map(line, range(80))) + b"back\n"


def test_what_comes_while_a_block_is_being_stored_outlives_the_process(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail, plain = Tail(os.memfd_create("test")), Store.put
    log, whole = Appender(folder, LOG, tail), line(0) * 20

    def slow(store: Store, key: str, data: bytes) -> None:
        plain(store, key, data)
        log.append(b"meanwhile\n")

    log.append(whole)
    assert tail.found() == (LOG, 0, whole)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", slow)
        log.flush()
    log.append(b"later\n")
    assert tail.found() == (LOG, 2000, b"meanwhile\nlater\n")
    assert read_stream(folder, "logs/", LOG) == whole
    store_tail(folder, tail)  # the process was killed
    assert read_stream(folder, "logs/", LOG) == whole + b"meanwhile\nlater\n"


def test_segments_that_a_block_replaces_between_a_listing_and_its_reading_are_waited_for(folder: Store) -> None:
    log, reader = Appender(folder, LOG), Appended(folder)
    for number in range(19):
        log.append(line(number))
        log.flush()
    listed = streams(folder.list("logs/"))[LOG]
    log.append(line(19))
    log.flush()  # makes a block of the short segments
    seen = reader.read(listed)
    seen += reader.read(streams(folder.list("logs/"))[LOG])
    assert seen == b"".join(map(line, range(20)))


def test_a_stream_written_as_one_object_by_an_earlier_version_is_read(folder: Store) -> None:
    folder.put(LOG, b"all of it")
    assert read_stream(folder, "logs/", LOG) == b"all of it"
    with pytest.raises(NotFound):
        read_stream(folder, "logs/", "logs/rank-00001.log")
