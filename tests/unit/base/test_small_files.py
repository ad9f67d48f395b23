"""The small files of a base in folders of this machine: for code that reads only folders, and for tools that read no
bucket."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.base.find.small_files import cached_folder, copy_weights, fetched_small_files, processor_files, with_config
from trainer.store.store import open_store

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "notes.txt": b"by hand",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "model-00001.safetensors": bytes(range(256)) * 8,
    "model-00002.safetensors": b"second",
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
OTHERS = {"original/consolidated.safetensors": b"the same once more", "model.bin": b"the same again"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_on_this_machine_are_linked_and_small_files_copied(tmp_path: Path) -> None:
    folder, target = write(tmp_path / "base", {**FILES, **OTHERS}), tmp_path / "for a tool"
    target.mkdir()
    base: Any = SimpleNamespace(directory=folder, store=open_store(str(folder)))
    copy_weights(base, target)
    assert content_of(target) == {**FILES, "model.bin": OTHERS["model.bin"]}
    links = {path.name for path in target.rglob("*") if path.is_symlink()}
    assert links == {"model-00001.safetensors", "model-00002.safetensors"}


def test_weights_in_a_bucket_are_copied_beside_the_small_files_that_are_here(tmp_path: Path) -> None:
    small = {name: content for name, content in FILES.items() if "model" not in name}
    folder, store, target = write(tmp_path / "small", small), open_store("memory://"), tmp_path / "for a tool"
    target.mkdir()
    for name, content in {**FILES, **OTHERS}.items():
        store.put(name, content)
    base: Any = SimpleNamespace(directory=folder, store=store)
    copy_weights(base, target)
    assert content_of(target) == FILES
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_ranks_of_a_machine_may_fill_a_folder_of_its_cache_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    another_was_faster = False

    def rename(self: Path, target: Path) -> None:
        if another_was_faster:
            write(target, {"config.json": b"{}"})
        raise OSError("it is not empty")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="it is not empty"):
            cached_folder({"config.json": b"{}"})
        another_was_faster = True
        folder = cached_folder({"config.json": b"{}"})
    assert content_of(folder) == {"config.json": b"{}"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half written
    assert cached_folder({"config.json": b"[]"}) != folder


def test_a_base_that_has_changed_in_its_bucket_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_store("memory://")
    store.put("config.json", b"{}")
    before = fetched_small_files(store)
    assert fetched_small_files(store) == before
    store.put("config.json", b"[]")
    assert content_of(fetched_small_files(store)) == {"config.json": b"[]"}
    assert content_of(before) == {"config.json": b"{}"}


def test_another_configuration_has_the_small_files_of_the_base_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = with_config(write(tmp_path / "base", {**FILES, **OTHERS}), {"layers": 3})
    assert content_of(folder) == {
        "config.json": b'{\n  "layers": 3\n}',
        "tokenizer.json": b"[]",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
    }


def test_the_files_of_a_processor_are_those_that_decide_what_it_does(tmp_path: Path) -> None:
    own = {
        "preprocessor_config.json": b"1",
        "processor_config.json": b"2",
        "video_preprocessor_config.json": b"3",
    }
    assert processor_files(write(tmp_path, {**FILES, **own})) == own
    (tmp_path / "processor_config.json").unlink()
    assert len(processor_files(tmp_path)) == 2
