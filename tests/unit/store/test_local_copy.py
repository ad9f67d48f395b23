"""What a machine has read of a bucket's objects is read from its own disk the next time, if nothing has changed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config.model import Model
from trainer.errors import ConfigError
from trainer.store import local_copy
from trainer.store.local_copy import CopiedStore, check_room
from trainer.store.store import Store, open_store


@pytest.fixture
def bucket() -> Store:
    store = open_store("memory://")
    store.put("weights", bytes(range(200)))
    return store


def copied(bucket: Store, folder: Path, version: str = "1") -> CopiedStore:
    return CopiedStore(bucket, folder, {"weights": version})


def test_a_range_is_asked_for_once_for_each_version(bucket: Store, tmp_path: Path) -> None:
    for version in ("1", "2"):
        for asked in (90, 0):
            store = copied(bucket, tmp_path, version)
            assert store.get_range("weights", 10, 100) == bytes(range(10, 100))
            assert store.range_bytes == asked
    assert copied(bucket, tmp_path).kept_bytes() == 90 + 16


def test_another_range_is_asked_for(bucket: Store, tmp_path: Path) -> None:
    copied(bucket, tmp_path).get_range("weights", 10, 100)
    store = copied(bucket, tmp_path)
    assert store.get_range("weights", 10, 101) == bytes(range(10, 101))
    assert store.range_bytes == 91


@pytest.mark.parametrize("content", [b"", b"x" * 106])
def test_a_damaged_copy_is_read_anew(bucket: Store, tmp_path: Path, content: bytes) -> None:
    copied(bucket, tmp_path).get_range("weights", 10, 100)
    (kept,) = tmp_path.glob("*/*")
    kept.write_bytes(content)
    for asked in (90, 0):
        store = copied(bucket, tmp_path)
        assert store.get_range("weights", 10, 100) == bytes(range(10, 100))
        assert store.range_bytes == asked


def test_the_same_object_of_another_bucket_is_another_one(tmp_path: Path) -> None:
    for name, content in (("one", b"1" * 200), ("other", b"2" * 200)):
        bucket = open_store(f"memory://{name}")
        bucket.put("weights", content)
        assert copied(bucket, tmp_path).get_range("weights", 10, 100) == content[10:100]


def test_a_disk_that_takes_no_copy_ends_no_load(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert copied(bucket, tmp_path).get_range("weights", 10, 100) == bytes(range(10, 100))
    assert copied(bucket, tmp_path).kept_bytes() == 0, "what was half written is gone"
    monkeypatch.setattr(local_copy, "_write", full)
    assert copied(bucket, tmp_path).get_range("weights", 10, 100) == bytes(range(10, 100))


def test_other_objects_and_empty_ranges_are_not_kept(bucket: Store, tmp_path: Path) -> None:
    bucket.put("other", b"abc")
    assert copied(bucket, tmp_path).get_range("other", 0, 3) == b"abc"
    assert copied(bucket, tmp_path).get_range("weights", 5, 5) == b""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_room_is_refused(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copied(bucket, tmp_path)
    check_room(store, tmp_path / "new" / "folder", 1000, "model.local_copy")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(
        ConfigError, match=r"model.local_copy: .* has room for .* GB, and this machine's part .* Remove"
    ):
        check_room(store, tmp_path, 2**60, "model.local_copy")
    room = SimpleNamespace(free=100)
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda folder: room)
    store.get_range("weights", 0, 150)
    check_room(store, tmp_path, 100 + store.kept_bytes(), "model.local_copy")
    with pytest.raises(ConfigError, match="has room for"):
        check_room(store, tmp_path, 101 + store.kept_bytes(), "model.local_copy")
    assert store.kept_bytes() >= 150
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        check_room(store, tmp_path / "file" / "below", 1, "model.local_copy")

    def refuses(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuses)
    with pytest.raises(ConfigError, match=r"model.local_copy: the folder .* cannot be used \(.*Permission denied"):
        check_room(store, tmp_path, 1, "model.local_copy")


def test_a_base_that_is_in_no_bucket_needs_no_copy() -> None:
    assert Model(base="s3://bucket/base", local_copy="/local").local_copy == "/local"
    with pytest.raises(ValueError, match="model.local_copy: /local copies a base from a bucket"):
        Model(base="/models/base", local_copy="/local")
