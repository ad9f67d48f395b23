"""Finds the files of a run's sources: local files, objects in a bucket, or data sets of the Hub."""

import fnmatch
import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainer.config import Data, Source
from trainer.data.format.formats import RowForm
from trainer.data.source import hub
from trainer.errors import DataError, NotFound, StorageError
from trainer.store.store import Store, open_store

# For each kind of file: an ending of its name -> the compression of the whole file.
_TEXTS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
_COMPRESSIONS = {
    **{kind: {"": None, ".gz": "gzip", ".zst": "zstd"} for kind in _TEXTS},
    ".parquet": {"": None},
    ".arrow": {"": None},
    ".mds": {"": None, ".zstd": "zstd", ".gz": "gzip", ".br": "brotli", ".bz2": "bz2"},
    ".tar": {"": None, ".gz": "gzip", ".zst": "zstd"},
}
_SUFFIXES = {
    kind + suffix: (kind, compression) for kind, known in _COMPRESSIONS.items() for suffix, compression in known.items()
}
_SCHEMES = ("file", "s3", "gs", "az", hub.SCHEME)
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: `uri` is its name in messages, `size` is in bytes, `source` the index of its source.

    `version` changes when the content does. `form` says how its rows are read, once that is known. `take` says which
    rows are taken if not all are. An `immutable` file never changes, and its version does not come from its store.
    """

    uri: str
    store: Store
    key: str
    size: int
    version: str
    source: int
    form: RowForm | None = None
    immutable: bool = False
    take: "Take | None" = None

    def changed(self) -> bool:
        """Whether the file has changed since it was found."""
        return not self.immutable and self.store.head(self.key).version != self.version


@dataclass(frozen=True)
class Take:
    """Which rows of a source are taken. `files` are all files of the source.

    `amount` from 1 on is a number of rows, below 1 a share of them. Without a `seed` the first rows are taken. `skip`
    rows are left out before them.
    """

    amount: int | float
    seed: int | None
    files: tuple["SourceFile", ...]
    skip: int = 0


def split_suffix(key: str) -> tuple[str, str | None]:
    """The kind of a file by its name, such as .jsonl, and its compression."""
    return next(found for suffix, found in _SUFFIXES.items() if key.endswith(suffix))


def is_of_hub(source: Source) -> bool:
    """Whether the source is a data set of the Hub. Its files must be downloaded before they can be read."""
    return source.path.startswith(f"{hub.SCHEME}://")


def is_compressed(key: str) -> bool:
    """Whether a file of this name holds its rows compressed, as Parquet does too."""
    kind, compression = split_suffix(key)
    return kind == ".parquet" or compression is not None


def expand(sources: Sequence[Source], setting: str) -> list[SourceFile]:
    """The files of all sources, source by source. In a source they keep a data set's own order, else that of names.

    `setting` is the name of the list in messages, such as `data.train`.

    Raises:
        DataError: a path does not exist, matches nothing, or is of a kind that cannot be read.
    """
    return [file for index, source in enumerate(sources) for file in _find(source, index, f"{setting}[{index}].path")]


def unusable(data: Data) -> list[str]:
    """One sentence for each source of a run that has no file to read. Data sets of the Hub are not checked."""
    sentences = []
    for setting, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for index, source in enumerate(sources):
            try:
                if not is_of_hub(source):
                    _find(source, index, f"{setting}[{index}].path")
            except DataError as error:
                sentences.append(str(error))
    return sentences


def _find(given: Source, source: int, name: str) -> list[SourceFile]:
    path = given.path
    scheme = urlsplit(path).scheme if "://" in path else "file"
    if scheme not in _SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise DataError(f"{name}: {path!r} has the scheme {scheme!r}. Allowed are a local path, or {allowed}.")
    try:
        if scheme == hub.SCHEME:
            found = _find_in_hub(given, source, name)
        else:
            found = _find_local(path, source, name) if scheme == "file" else _find_remote(path, source, name)
    # A name may be too long, name an unknown user's home, or not be valid text.
    except (OSError, RuntimeError, ValueError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if isinstance(error, StorageError) and not isinstance(cause, ValueError):
            raise  # the store itself failed; a ValueError comes from a name that no store accepts
        reason = " ".join(str(cause).split())
        raise DataError(f"{name}: {path!r} cannot be used: {reason}. Rename the file, or correct the path.") from error
    if not found:
        raise DataError(f"{name}: {path!r} matches no file. Name a file or a glob that exists.")
    for file in found:
        if not file.key.endswith(tuple(_SUFFIXES)):
            raise DataError(
                f"{name}: {file.uri} cannot be read. Allowed are {', '.join(_SUFFIXES)}, and the folder of a saved HF "
                "data set or of MDS shards."
            )
    return found


def _find_local(path: str, source: int, name: str) -> list[SourceFile]:
    # The path is part of the fingerprint. Make it absolute, because the processes that compile and that train may have
    # different working directories.
    local = Path(unquote(urlsplit(path).path) if "://" in path else path).expanduser().absolute()
    # A name with brackets may be that of a file, and not a pattern.
    if local.exists():
        matches = [local]
    elif _WILDCARDS & set(str(local)):
        matches = [match for match in map(Path, sorted(glob.glob(str(local), recursive=True))) if match.is_file()]
    else:
        raise DataError(f"{name}: {path!r} does not exist. Name a file or a glob that exists.")
    if local.is_dir():
        return _find_in_folder(open_store(str(local), setting=name), str(local), source, name)
    files = []
    for match in matches:
        store = open_store(str(match.parent), setting=name)
        entry = store.head(match.name)
        files.append(SourceFile(str(match), store, match.name, entry.size, entry.version, source))
    return files


def _find_remote(path: str, source: int, name: str) -> list[SourceFile]:
    folder, _, pattern = path.rstrip("/").rpartition("/")
    if _WILDCARDS & set(folder):
        raise DataError(f"{name}: {path!r} has a wildcard in a folder. In a bucket only the last part may have one.")
    if not _WILDCARDS & set(pattern) and not pattern.endswith(tuple(_SUFFIXES)):
        return _find_in_folder(open_store(path, setting=name), path.rstrip("/"), source, name)
    store = open_store(folder, setting=name)
    try:
        if _WILDCARDS & set(pattern):
            entries = [entry for entry in store.list() if "/" not in entry.key]
            entries = [entry for entry in entries if fnmatch.fnmatchcase(entry.key, pattern)]
        else:
            entries = [store.head(pattern)]
    except StorageError as error:
        raise DataError(f"{name}: {path!r} cannot be read: {error}") from error
    return [SourceFile(f"{folder}/{e.key}", store, e.key, e.size, e.version, source) for e in entries]


def _find_in_hub(given: Source, source: int, name: str) -> list[SourceFile]:
    # A data set's licence is a .txt file too, so text files are data only if the path names them.
    endings = (end for end, (kind, _) in _SUFFIXES.items() if kind != ".txt" or ".txt" in given.path)
    files = hub.find_hub_files(given.path, given.subset, given.split, name, tuple(endings))
    found = []
    for uri, path in files.items():
        store, size = open_store(str(path.parent), setting=name), path.stat().st_size
        content = path.resolve().name  # the cache names each content by its hash
        found.append(SourceFile(uri, store, path.name, size, content, source, immutable=True))
    return found


def _find_in_folder(store: Store, uri: str, source: int, name: str) -> list[SourceFile]:
    """The files of a data set that is a folder: written by `Dataset.save_to_disk`, or MDS shards with their index."""
    try:
        keys = _saved_dataset(store, uri, name)
        if keys is None:
            keys = _mds_shards(store)
        if keys is None:
            raise DataError(
                f"{name}: {uri!r} is a folder, but neither a saved HF data set (state.json) nor MDS shards"
                f" (index.json). Name its files, for example {uri.rstrip('/')}/*.jsonl."
            )
        entries = [store.head(key) for key in keys]
    except (StorageError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: the data set {uri!r} cannot be read: {error}") from error
    return [SourceFile(f"{uri.rstrip('/')}/{e.key}", store, e.key, e.size, e.version, source) for e in entries]


def _saved_dataset(store: Store, uri: str, name: str) -> list[str] | None:
    splits = _read_json(store, "dataset_dict.json")
    if splits is not None:
        names = list(map(str, splits["splits"]))
        raise DataError(
            f"{name}: {uri!r} holds the splits {', '.join(names) or 'none'}. Name one, for example "
            f"{'/'.join([uri.rstrip('/'), *names[:1]])}."
        )
    state = _read_json(store, "state.json")
    return None if state is None else [file["filename"] for file in state["_data_files"]]


def _mds_shards(store: Store) -> list[str] | None:
    index = _read_json(store, "index.json")
    if index is None:
        return None
    if index["version"] != 2 or any(shard["format"] != "mds" for shard in index["shards"]):
        raise ValueError("its index.json is not that of MDS, version 2")
    return [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in index["shards"]]


def _read_json(store: Store, key: str) -> Any | None:
    try:
        return json.loads(store.get(key))
    except NotFound:
        return None
