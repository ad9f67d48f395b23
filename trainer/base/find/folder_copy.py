"""Copies a base or an export into a folder, for tools that read neither a bucket nor ranges of bytes."""

from pathlib import Path

from trainer.base.base import Base
from trainer.base.find.small_files import tokenizer_content, write_files
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import Entry, Store


def copy_weights(base: Base, folder: Path) -> None:
    """Copy the base's files into `folder`. Weights that are on this machine are linked instead."""
    local = base.store.uri.removeprefix("file://") if base.store.uri.startswith("file://") else None
    write_files(folder, tokenizer_content(base.directory))
    for path in base.directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for entry in base.store.list():
        if "/" in entry.key or not entry.key.endswith((".safetensors", INDEX_FILE)):
            continue
        if local is None:
            copy_object(base.store, entry, folder)
        elif not (folder / entry.key).exists():
            (folder / entry.key).symlink_to(Path(local) / entry.key)


def copy_object(store: Store, entry: Entry, folder: Path) -> None:
    """Copy one object into `folder`, part by part."""
    (folder / entry.key).parent.mkdir(exist_ok=True)
    with (folder / entry.key).open("wb") as file:
        for chunk in store.chunks(entry.key, entry.size):
            file.write(chunk)
