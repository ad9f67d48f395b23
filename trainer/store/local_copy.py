"""Keeps the ranges of a bucket's objects that this machine has read on its own disk, for later starts.

    <folder>/<object and version>/<begin>-<end>    the first 16 bytes of the SHA-256, and the bytes

A start with as many ranks on the same machines reads the same ranges. One that reads others asks the bucket for them. A
copy that was damaged is read anew.
"""

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from trainer.errors import ConfigError
from trainer.store.store import Store

_HASH_BYTES = 16


class CopiedStore(Store):
    """A folder of a bucket. Ranges of the objects in `versions` (key -> version) are kept in `folder`."""

    def __init__(self, store: Store, folder: Path, versions: Mapping[str, str]) -> None:
        super().__init__(store.uri, store._backend, store._prefix, store._request_seconds, store._paced)
        self._kept = {
            key: folder / hashlib.sha256(f"{store.uri}/{key} {version}".encode()).hexdigest()[:16]
            for key, version in versions.items()
        }

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        if start == end or key not in self._kept:
            return super().get_range(key, start, end)
        place = self._kept[key] / f"{start}-{end}"
        data = _read(place)
        if data is None:
            data = super().get_range(key, start, end)
            with suppress(OSError):  # the disk is full: the copy is for later starts alone
                _write(place, data)
        return data

    def kept_bytes(self) -> int:
        """The bytes of all kept ranges."""
        every = (path for folder in self._kept.values() for path in folder.glob("*"))
        return sum(path.stat().st_size for path in every)


def _read(place: Path) -> bytearray | None:
    """The bytes of a kept range. None if it is not there, or damaged."""
    try:
        found = bytearray(place.read_bytes())
    except OSError:
        return None
    data = found[_HASH_BYTES:]
    return data if found[:_HASH_BYTES] == _hash(data) else None


def _write(place: Path, data: bytearray) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{uuid4().hex}")
    try:
        part.write_bytes(_hash(data) + data)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _hash(data: bytearray) -> bytes:
    return hashlib.sha256(data).digest()[:_HASH_BYTES]


def check_room(store: CopiedStore, folder: Path, needed: int, setting: str) -> None:
    """Raise `ConfigError` unless `folder` can be written and has room for so many bytes, with those that are kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid4().hex}"
        probe.touch()
        probe.unlink()
        room = shutil.disk_usage(folder).free + store.kept_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: the folder {folder} cannot be used ({error}). Give another one.") from error
    if room < needed:
        raise ConfigError(
            f"{setting}: {folder} has room for {room / 1e9:,.1f} GB, and this machine's part of the base has"
            f" {needed / 1e9:,.1f} GB. Remove copies of other bases there, or give another folder."
        )
