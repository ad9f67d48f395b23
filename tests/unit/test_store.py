"""The store's promises on a local folder and in memory; tests/store holds it to the same on a real S3 server."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.errors import AlreadyExists, ConfigError, NotFound, StorageError
from trainer.store import Store, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store") if request.param == "local" else "memory://test")


def test_what_was_put_is_read_back_and_replaced_whole(store: Store) -> None:
    store.put("a/b.bin", b"first, and longer")
    store.put("a/b.bin", b"second")
    assert store.get("a/b.bin") == b"second"
    assert store.head("a/b.bin").size == 6


def test_the_version_changes_with_the_content(store: Store) -> None:
    store.put("key", b"one")
    before = store.head("key").version
    store.put("key", b"three")
    assert store.head("key").version != before


def test_create_refuses_a_taken_key_and_leaves_it_alone(store: Store) -> None:
    store.create("key", b"mine")
    with pytest.raises(AlreadyExists, match="key exists already"):
        store.create("key", b"yours")
    assert store.get("key") == b"mine"


def test_of_racing_creators_exactly_one_wins(store: Store) -> None:
    assert_one_winner(store)


def assert_one_winner(store: Store, racers: int = 8) -> None:
    start = threading.Barrier(racers)

    def race(racer: int) -> int | None:
        start.wait(timeout=30)
        try:
            store.create("race", f"racer {racer}".encode())
        except AlreadyExists:
            return None
        return racer

    with ThreadPoolExecutor(racers) as pool:
        winners = [winner for winner in pool.map(race, range(racers)) if winner is not None]
    assert len(winners) == 1
    assert store.get("race") == f"racer {winners[0]}".encode()


def test_ranges(store: Store) -> None:
    store.put("key", bytes(range(100)))
    assert store.get_range("key", 10, 13) == bytes([10, 11, 12])
    assert store.get_range("key", 5, 5) == b""
    assert store.get_ranges("key", [0, 50, 98], [2, 51, 100]) == [b"\x00\x01", b"\x32", b"\x62\x63"]
    assert store.get_ranges("key", [], []) == []


@pytest.mark.parametrize("start", [1, 3, 5], ids=["overlapping", "at the end", "behind the end"])
def test_a_range_beyond_the_end_is_an_error_and_never_short_data(store: Store, start: int) -> None:
    store.put("key", b"123")
    with pytest.raises(StorageError, match="key"):
        store.get_range("key", start, 9)
    with pytest.raises(StorageError, match="key"):
        store.get_ranges("key", [0, start], [1, 9])


def test_listing_is_sorted_and_relative_to_the_folder(store: Store) -> None:
    for key in ("run/b", "run/a", "run/deep/c", "runner/d"):
        store.put(key, b"x")
    run = store.sub("run")
    assert [entry.key for entry in run.list()] == ["a", "b", "deep/c"]
    assert [entry.key for entry in run.list("deep/")] == ["deep/c"]
    assert [entry.key for entry in store.list("run/")] == ["run/a", "run/b", "run/deep/c"]
    assert store.list("nothing/") == []
    assert run.uri == f"{store.uri}/run"
    assert run.get("a") == b"x"


def test_delete_is_idempotent(store: Store) -> None:
    store.put("key", b"x")
    assert store.exists("key")
    store.delete("key")
    store.delete("key")
    assert not store.exists("key")


READS: list[Callable[[Store], object]] = [
    lambda store: store.get("no/such"),
    lambda store: store.head("no/such"),
    lambda store: store.get_range("no/such", 0, 1),
    lambda store: store.get_ranges("no/such", [0], [1]),
]


@pytest.mark.parametrize("read", READS, ids=["get", "head", "get_range", "get_ranges"])
def test_a_missing_key_is_not_found(store: Store, read: Callable[[Store], object]) -> None:
    with pytest.raises(NotFound, match="no/such does not exist"):
        read(store)


def test_a_local_store_survives_reopening(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("a/b", b"x")
    assert open_store(f"file://{tmp_path}").get("a/b") == b"x"
    assert (tmp_path / "a" / "b").read_bytes() == b"x"


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Root may write everywhere: be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written_says_so(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "store"
    store = open_store(str(folder))
    folder.chmod(0o555)
    request.getfixturevalue("unprivileged")
    with pytest.raises(StorageError, match="cannot write file://.*Permission denied") as caught:
        store.put("a/b", b"x")
    assert_one_line(caught.value)
    with pytest.raises(StorageError, match="cannot be used.*Permission denied"):
        open_store(str(folder / "deeper"))


def test_a_store_inside_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file cannot be used"):
        open_store(str(tmp_path / "file"))


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://"])
def test_a_uri_that_is_none_of_ours_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="run.store: ") as caught:
        open_store(uri)
    assert_one_line(caught.value)


def assert_one_line(error: Exception) -> None:
    """An error message is a sentence, not a debug rendering."""
    assert "\n" not in str(error)
    assert "Debug source" not in str(error)
    assert str(error).endswith(".")
