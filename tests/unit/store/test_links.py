"""Whoever may write to a store may put links into it. What they lead to is not the run's, and is not removed as such."""

import os
from pathlib import Path

import pytest

from launcher.view.checkpoints import prune_checkpoints
from tests.material import Workshop, commit
from trainer.errors import StorageError
from trainer.run import layout
from trainer.store import store as stores
from trainer.store.store import open_store


def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is another user than the one who has made the links."""
    monkeypatch.setattr(stores.os, "getuid", lambda: os.stat("/").st_uid + 12345)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of the reader's own, which a run has as one of its checkpoints."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000000001").symlink_to(mine)
    return mine


def test_nothing_behind_a_link_of_another_user_is_removed(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(linked.parent / "run"))
    theirs(monkeypatch)
    for remove in (store.delete_folder, lambda prefix: store.delete(f"{prefix}precious.txt")):
        with pytest.raises(StorageError, match=r"is a link of another user \(uid \d+\) to .*/mine', so checkpoints"):
            remove("checkpoints/step-000000001/")
    (linked.parent / "run" / "data").symlink_to(linked)
    with pytest.raises(StorageError, match="run/data is a link of another user"):
        store.delete("data/precious.txt")
    assert (linked / "precious.txt").read_text() == "mine"


def test_whoever_has_put_checkpoints_on_another_disk_by_a_link_removes_them(linked: Path) -> None:
    open_store(str(linked.parent / "run")).delete_folder("checkpoints/step-000000001/")
    assert not (linked / "precious.txt").exists()


def test_a_link_to_the_store_itself_is_the_readers_own_way_there(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (linked.parent / "way").symlink_to(linked.parent)
    store = open_store(str(linked.parent / "way" / "run"))
    store.put("checkpoints/a", b"")
    theirs(monkeypatch)
    store.delete("checkpoints/a")
    assert not store.exists("checkpoints/a")


def test_prune_of_somebody_elses_run_leaves_what_its_links_lead_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    run, config = workshop.store.sub("theirs"), workshop.config("theirs")
    for step in (1, 2):
        commit(run, config, step)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    (tmp_path / "store" / "theirs" / layout.checkpoint(1) / "more").symlink_to(mine)
    theirs(monkeypatch)
    rules = {"keep_last": 1, "keep_every": None, "keep_best": None, "orphan_hours": 0.0}
    with pytest.raises(StorageError, match="is a link of another user"):
        prune_checkpoints(run, **rules, dry_run=False, log=lambda line: None)  # type: ignore[arg-type]
    assert (mine / "precious.txt").read_text() == "mine"
