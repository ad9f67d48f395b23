"""The store's promises, the same in memory, on a local folder, on two real S3 servers and on one of Azure's kind."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.store.conftest import assert_one_line
from trainer.errors import AlreadyExists, ConfigError, NotFound, StorageError
from trainer.store.store import PART_BYTES, Store, open_store


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
    store.create("key", b"mine")  # as a request that is sent twice does
    store.create("empty", b"")
    with pytest.raises(AlreadyExists, match="empty exists already"):
        store.create("empty", b"")


def test_of_racing_creators_exactly_one_wins(store: Store) -> None:
    racers = 8
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
    assert [bytes(part) for part in store.get_ranges("key", [0, 50, 98], [2, 51, 100])] == [
        b"\x00\x01",
        b"\x32",
        b"\x62\x63",
    ]
    assert store.get_ranges("key", [], []) == []


@pytest.mark.parametrize("start", [1, 3, 5], ids=["overlapping", "at the end", "behind the end"])
def test_a_range_beyond_the_end_is_an_error_and_never_short_data(store: Store, start: int) -> None:
    store.put("key", b"123")
    with pytest.raises(StorageError, match="key"):
        store.get_range("key", start, 9)
    with pytest.raises(StorageError, match="key"):
        store.get_ranges("key", [0, start], [1, 9])


def test_ranges_come_in_the_order_they_were_asked_for_near_or_far_or_overlapping(store: Store) -> None:
    data = os.urandom(4 * 2**20)
    store.put("key", data)
    starts, ends = [3_500_000, 0, 5, 100, 1_200_000, 4], [3_500_009, 10, 8, 2_000_000, 1_200_001, 3_000_000]
    assert [bytes(part) for part in store.get_ranges("key", starts, ends)] == [
        data[start:end] for start, end in zip(starts, ends, strict=True)
    ]


def test_a_truncated_object_is_one_sentence_without_a_word_of_rust(store: Store, capfd) -> None:
    store.put("key", b"123")
    with pytest.raises(
        StorageError, match="key: bytes 0 to 150 were asked for, but the object ends at 3. It is truncat"
    ):
        store.get_ranges("key", [0, 50, 120], [2, 60, 150])
    assert capfd.readouterr().err == ""


def test_an_object_that_comes_in_pieces_is_read_back_whole_and_in_parts(store: Store) -> None:
    piece = os.urandom(2**20)
    pieces = 2 * PART_BYTES // 2**20 + 3
    store.put_chunks("large", (piece for _ in range(pieces)), pieces * 2**20)
    assert store.head("large").size == pieces * 2**20
    assert store.get_range("large", PART_BYTES - 5, PART_BYTES + 5) == piece[-5:] + piece[:5]
    parts = list(store.chunks("large", pieces * 2**20))
    assert [len(part) for part in parts] == [PART_BYTES, PART_BYTES, 3 * 2**20]
    assert hashlib.sha256(b"".join(parts)).digest() == hashlib.sha256(piece * pieces).digest()


def test_pieces_that_end_early_leave_no_object(store: Store) -> None:
    def torn() -> Iterator[bytes]:
        yield bytes(2**20)
        raise StorageError("the source is gone")

    for size in (2**21, 4 * PART_BYTES):
        with pytest.raises(StorageError, match="the source is gone"):
            store.put_chunks("torn", torn(), size)
    assert store.list() == []


def test_listing_is_sorted_and_relative_to_the_folder(store: Store) -> None:
    for key in ("run/b", "run/a", "run/deep/c", "runner/d"):
        store.put(key, b"x")
    run = store.sub("run")
    assert [entry.key for entry in run.list()] == ["a", "b", "deep/c"]
    assert [entry.key for entry in run.list("deep/")] == ["deep/c"]
    assert [entry.key for entry in store.list("run/")] == ["run/a", "run/b", "run/deep/c"]
    assert store.list("nothing/") == []
    for number in (4, 1, 3, 0, 2):
        run.put(f"n{number}", b"")
        run.put(f"f{number}/x", b"")
    folders, objects = run.children()
    assert folders == ["deep", *(f"f{number}" for number in range(5))]
    assert [entry.key for entry in objects] == ["a", "b", *(f"n{number}" for number in range(5))]
    assert run.uri == f"{store.uri}/run"
    assert run.get("a") == b"x"


def test_delete_is_idempotent(store: Store) -> None:
    store.put("key", b"x")
    assert store.exists("key")
    store.delete("key")
    store.delete("key")
    assert not store.exists("key")


def test_a_folder_is_deleted_with_all_it_holds_and_nothing_beside_it(store: Store) -> None:
    for key in ("a/1", "a/deep/2", "ab/3"):
        store.put(key, b"x")
    store.delete_folder("a/")
    store.delete_folder("a/")
    assert [entry.key for entry in store.list()] == ["ab/3"]


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


@pytest.mark.parametrize("read", ["get", "head", "get_range", "get_ranges"])
def test_a_pipe_in_place_of_an_object_is_refused_and_not_waited_for(tmp_path: Path, read: str) -> None:
    os.mkfifo(tmp_path / "a.json")
    store = open_store(str(tmp_path))
    arguments = {"get_range": (0, 4), "get_ranges": ([0], [4])}.get(read, ())
    with pytest.raises(StorageError, match=r"cannot read file:///.*a\.json: it is no file, but a pipe"):
        getattr(store, read)("a.json", *arguments)
    assert store.exists("a.json")


def test_a_local_store_survives_reopening(tmp_path: Path) -> None:
    open_store(str(tmp_path / "new")).put("a/b", b"x")
    assert open_store(f"file://{tmp_path}/new").get("a/b") == b"x"
    assert (tmp_path / "new" / "a" / "b").read_bytes() == b"x"


@pytest.mark.parametrize("form", ["{}", "file://{}"])
@pytest.mark.parametrize("name", ["plain", "50% of #1? ü~"])
def test_reading_makes_no_folder_and_writing_makes_the_one_that_was_named(tmp_path: Path, name: str, form: str) -> None:
    store = open_store(form.format(tmp_path / name / "runs"))
    assert (store.list(), store.children(), store.exists("a")) == ([], ([], []), False)
    assert list(tmp_path.iterdir()) == []
    store.put("a", b"x")
    assert (tmp_path / name / "runs" / "a").read_bytes() == b"x"
    assert [entry.key for entry in open_store(str(tmp_path / name / "runs")).list()] == ["a"]
    assert [entry.key for entry in store.list()] == ["a"]


@pytest.mark.parametrize("write", [Store.put, Store.create], ids=["put", "create"])
def test_a_local_write_is_synced_with_every_folder_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Store, str, bytes], None]
) -> None:
    synced: list[Path] = []
    plain = os.fsync

    def observed(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", observed)
    write(open_store(str(tmp_path / "store")), "a/b/key", b"x")
    made = [tmp_path / "store" / "a" / "b", tmp_path / "store" / "a", tmp_path / "store"]
    assert synced == [made[0] / "key", *made, tmp_path]


def test_what_another_process_removes_at_once_was_written_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = obstore.put

    def put_and_removed(*given: Any, **named: Any) -> None:
        plain(*given, **named)
        (tmp_path / "data/progress.json").unlink()

    monkeypatch.setattr(obstore, "put", put_and_removed)
    open_store(str(tmp_path)).put("data/progress.json", b"{}")


def test_what_a_killed_process_had_half_written_goes_with_its_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("step/attempt/shard", b"x")
    (tmp_path / "step/attempt/shard-1#1").write_bytes(b"half")  # as obstore names it
    assert [entry.key for entry in store.list()] == ["step/attempt/shard"]
    store.delete_folder("step/")
    assert list(tmp_path.iterdir()) == []


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
    folder, closed = tmp_path / "store", tmp_path / "closed"
    folder.mkdir()
    closed.mkdir(mode=0)
    store = open_store(str(folder))
    folder.chmod(0o555)
    request.getfixturevalue("unprivileged")
    with pytest.raises(StorageError, match="cannot write file://.*Permission denied") as caught:
        store.put("a/b", b"x")
    assert_one_line(caught.value)
    with pytest.raises(StorageError, match="cannot be used.*Permission denied"):
        open_store(str(closed / "deeper"))


def test_a_store_inside_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="the folder .*/file cannot be used: .*/file is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="the folder .*/file/deeper cannot be used: .*/file is a file"):
        open_store(str(tmp_path / "file" / "deeper"))


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/x",
        "s3://",
        "gs://",
        "az:///runs",
        "S3://bucket",
        "file://runs",
        "s3://bucket/runs?part=1",
        "gs://bucket/run#1",
    ],
)
def test_a_uri_that_is_none_of_ours_is_refused_by_the_setting_that_has_it(uri: str) -> None:
    for setting in ("run.store", "DEST"):
        with pytest.raises(ConfigError, match=f"^{setting}: ") as caught:
            open_store(uri, setting=setting)
        assert_one_line(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIA:hidden@bucket/runs", "gs://hidden@bucket/runs", "az://box/a?sv=1&sig=hidden", "ftp://me:hidden@host/x"],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    assert "hidden" not in str(caught.value)
    assert_one_line(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_endpoint_may_have_no_tls_under_each_of_its_names_and_its_password_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv(variable, "http://me:hidden@127.0.0.1:1")
    with pytest.raises(StorageError, match=r"http://127.0.0.1:1 cannot be reached \(Connection refused\)"):
        open_store("s3://bucket/runs", retry_seconds=0.1).get("key")
    monkeypatch.setenv(variable, "me:hidden@127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"^{variable}: .* is no address of a server") as caught:
        open_store("s3://bucket/runs")
    assert "hidden" not in str(caught.value)
