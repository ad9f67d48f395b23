"""One small seam over obstore: the same few operations on a local folder, S3, GCS, Azure and memory.

Keys are `str` with `/` (a `Path` would mangle URIs). Every failure is raised as a `StorageError` that names the object.
Data is called damaged only after a second read: a proxy may cut an answer short and still report it as whole.
"""

import builtins
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any, ParamSpec, TypeAlias, TypeVar

import obstore
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import LocalStore, MemoryStore, from_url

from trainer.config import Config
from trainer.config.paths import NoFile, absolute_path, check_file
from trainer.config.secrets import without_credentials
from trainer.errors import (
    NOT_JSON,
    AlreadyExists,
    ConfigError,
    Damaged,
    NotFound,
    SlowDown,
    StorageError,
    Unreachable,
    shown,
)
from trainer.store.failures import CREDENTIALS, NO_BUCKET, beyond_the_end, passes, reason, slows
from trainer.store.pace import Pace

Buffer: TypeAlias = bytes | bytearray | memoryview

SCHEMES = ("file", "s3", "gs", "az", "memory")
# Large objects are uploaded in parts of this size. S3 takes 10,000 parts, so an object may have 320 GB. Four parts are
# in flight at a time, which bounds the memory of an upload.
PART_BYTES = 32 * 2**20
_PARTS_IN_FLIGHT = 4
# Connection errors and 5xx are retried for this long: a restarting gateway needs some 20 s. A refusal (4xx) is never
# retried.
RETRY_SECONDS = 30.0
# The time limit of one request with its body: a slow line must be able to send a part within it.
REQUEST_SECONDS = 60.0
# The largest object that is read whole. Somebody else's run must not be able to fill the reader's memory.
_WHOLE_BYTES = 2**31
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# obstore's name for a file of a local folder until all of it is written.
_HALF_WRITTEN = re.compile(r"#\d+$")
_SPANS_IN_FLIGHT = 16
_MERGED_BYTES = 2**20  # ranges with a gap of at most this many bytes become one request
_BACKOFF: Any = {"init_backoff": timedelta(milliseconds=500), "max_backoff": timedelta(seconds=4), "base": 3}
# The variables from which obstore takes the address of a server other than the cloud's own.
_ENDPOINT = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# A server without TLS is the user's own, which usually has no host name for each bucket.
_WITHOUT_TLS = {"s3": {"virtual_hosted_style_request": False}, "gs": {}, "az": {}}


P = ParamSpec("P")


T = TypeVar("T")


def read_twice(read: Callable[P, T]) -> Callable[P, T]:
    """Call `read`, and call it once more if it raises `Damaged`."""

    @wraps(read)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return read(*arguments, **options)
        except Damaged:
            return read(*arguments, **options)

    return again


@dataclass(frozen=True)
class Entry:
    """An object in a listing.

    `size` is in bytes. `version` changes when the content does (ETag, or size and mtime).
    """

    key: str
    size: int
    modified: datetime
    version: str


class Store:
    """A folder in an object store. `uri` names the folder, and keys are relative to it.

    One request may take `request_seconds`. `range_bytes` counts the bytes that `get_range` has read, on any thread.
    `paced` says how a bucket is asked for what it holds.
    """

    def __init__(
        self,
        uri: str,
        backend: Any,
        prefix: str = "",
        request_seconds: float = REQUEST_SECONDS,
        paced: "Paced | None" = None,
    ) -> None:
        scheme, separator, place = uri.rpartition("://")
        self.uri = f"{scheme}{separator}{place.rstrip('/')}"
        self._backend, self._paced = backend, paced
        self._prefix = prefix
        self._request_seconds = request_seconds
        self.range_bytes = 0
        self._counting = Lock()

    def sub(self, name: str) -> "Store":
        """Return the folder `name` inside this one."""
        name = name.strip("/")
        prefix = f"{self._prefix}{name}/"
        return Store(f"{self.uri}/{name}", self._backend, prefix, self._request_seconds, self._paced)

    @property
    def local_folder(self) -> Path | None:
        """Where the store is on a disk of this machine. None for a bucket, and for memory."""
        return self._path("") if self.uri.startswith("file://") else None

    @property
    def pace(self) -> Pace | None:
        """The rate at which this process asks the bucket for what it holds. None for a store of this machine."""
        return self._paced and self._paced.pace

    def failing_fast(self) -> "Store":
        """Return the same folder without retries, for a caller that repeats and counts failed requests itself."""
        if isinstance(self._backend, LocalStore | MemoryStore):
            return self
        return open_store(self.uri, retry_seconds=0, request_seconds=self._request_seconds)

    def _in_turn(self, request: Callable[[Any], T]) -> T:
        """Make a request for content, which gets a backend. A bucket is asked at this process's pace."""
        return request(self._backend) if self._paced is None else self._paced.ask(request)

    def get(self, key: str) -> bytes:
        def ask(backend: Any) -> bytes:
            with self._errors("read", key):
                self._check_file(key)
                found = obstore.get(backend, self._prefix + key)
                if found.meta["size"] > _WHOLE_BYTES:
                    raise Damaged(
                        f"{self.uri}/{key} has {found.meta['size']:,} bytes, and nothing that is read whole has more"
                        f" than {_WHOLE_BYTES:,}."
                    )
                return bytes(found.bytes())

        return self._in_turn(ask)

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        """Read bytes [start, end) of an object into a writable buffer."""
        if start == end:
            return bytearray()
        data = self._read_range(key, start, end)
        with self._counting:
            self.range_bytes += len(data)
        return data

    @read_twice
    def _read_range(self, key: str, start: int, end: int) -> bytearray:
        def ask(backend: Any) -> bytearray:
            with self._errors("read", key):
                self._check_file(key)
                return bytearray(obstore.get_range(backend, self._prefix + key, start=start, end=end))

        data = self._in_turn(ask)
        self._check_length(key, start, end, len(data))
        return data

    @read_twice
    def get_ranges(self, key: str, starts: list[int], ends: list[int]) -> list[Buffer]:
        """Read several ranges at once into read-only buffers.

        Near ranges are merged into one request, and all requests are in flight together.
        """
        if not starts:
            return []
        spans, owners = _merged(starts, ends)
        data = self._read_together(key, spans)
        for (start, end), part in zip(spans, data, strict=True):
            self._check_length(key, start, end, len(part))
        parts = ((memoryview(data[owner]), spans[owner][0]) for owner in owners)
        return [
            part[start - first : end - first] for (part, first), start, end in zip(parts, starts, ends, strict=True)
        ]

    def _read_together(self, key: str, spans: builtins.list[tuple[int, int]]) -> builtins.list[Any]:
        """Read spans of an object, all at once; of a bucket each in its turn, and some at a time."""
        path = self._prefix + key

        def ask(backend: Any, asked: builtins.list[tuple[int, int]]) -> builtins.list[Any]:
            with self._errors("read", key):
                self._check_file(key)
                starts, ends = ([span[side] for span in asked] for side in (0, 1))
                return obstore.get_ranges(backend, path, starts=starts, ends=ends, coalesce=0)

        if self._paced is None:
            return ask(self._backend, spans)
        with ThreadPoolExecutor(min(len(spans), _SPANS_IN_FLIGHT)) as pool:
            found = pool.map(lambda span: self._in_turn(lambda backend: ask(backend, [span])[0]), spans)
            return builtins.list(found)

    def chunks(self, key: str, size: int) -> Iterator[bytearray]:
        """Read an object of `size` bytes part by part.

        One part is in memory at a time, and each is retried by itself.
        """
        for start in range(0, size, PART_BYTES):
            yield self.get_range(key, start, min(start + PART_BYTES, size))

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object. Readers see either the whole new object or the old state."""
        self.put_chunks(key, [data], len(data))

    def put_chunks(self, key: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write `size` bytes that come in pieces, as `put` does. Only a few parts are in memory at a time."""
        with self._writing(key):
            obstore.put(
                self._backend,
                self._prefix + key,
                chunks,
                use_multipart=size > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_IN_FLIGHT,
            )
            self._sync(key)

    def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist yet. When writers of different `data` race, exactly one succeeds.

        Raises `AlreadyExists` for the others. If the object is there with the same data, this write counts as
        successful: the answer to a first request may be lost, and then the repeated request finds its own object. A
        writer that claims something therefore writes data that nobody else writes, or an empty object: an empty object
        that is there always counts as another's. `data` must fit into one request, because multipart uploads have no
        such condition.
        """
        try:
            with self._writing(key):
                obstore.put(self._backend, self._prefix + key, data, mode="create", use_multipart=False)
                self._sync(key)
        except AlreadyExists:
            if not data or not self._holds(key, data):
                raise
        except Unreachable as error:
            # A request that ran out of time is not repeated, because the server may have carried it out.
            with suppress(Unreachable):
                there = self.failing_fast()
                if data and there._holds(key, data):
                    return
                if there.exists(key):
                    raise AlreadyExists(f"{self.uri}/{key} exists already.") from error
            raise

    def _holds(self, key: str, data: bytes) -> bool:
        """Return whether the object is `data`. Only two reads that both differ make it another's."""
        with suppress(NotFound):  # it has been removed in the meantime
            return any(self.get(key) == data for _ in range(2))
        return False

    def head(self, key: str) -> Entry:
        with self._errors("read", key):
            self._check_file(key)  # obstore opens it even for this
            return self._entry(obstore.head(self._backend, self._prefix + key))

    def exists(self, key: str) -> bool:
        """Return whether something is there, even if it is no file or cannot be read."""
        try:
            self.head(key)
        except NotFound:
            return False
        except StorageError as error:
            if not isinstance(error.__cause__, NoFile):
                raise
        return True

    def children(self, prefix: str = "") -> tuple[list[str], list[Entry]]:
        """Return (names of folders, objects) directly in the folder `prefix` (ending in `/` or empty), sorted.

        This takes one request for each thousand children, however much lies in the folders below.
        """
        with self._errors("list", prefix):
            try:
                found = obstore.list_with_delimiter(self._backend, prefix=self._prefix + prefix or None)
            except InvalidPathError:
                if not isinstance(self._backend, LocalStore):
                    raise
                return self._children_with_names(prefix)
        names = sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])
        return names, sorted((self._entry(meta) for meta in found["objects"]), key=lambda entry: entry.key)

    def _children_with_names(self, prefix: str) -> tuple[builtins.list[str], builtins.list[Entry]]:
        """Return `children` of a local folder without those whose names no store takes, such as names with line breaks.

        obstore refuses to list a folder that holds such a name, and whoever may write to a store can make one.
        """
        every = sorted(os.scandir(self._path(prefix)), key=lambda child: child.name)
        named = [child for child in every if not _NO_NAME.search(child.name)]
        folders = [child.name for child in named if child.is_dir()]
        return folders, [self.head(f"{prefix}{child.name}") for child in named if child.is_file()]

    def list(self, prefix: str = "") -> list[Entry]:
        """List every object under the folder `prefix` (ending in `/` or empty), sorted by key."""
        with self._errors("list", prefix):
            pages = obstore.list(self._backend, prefix=self._prefix + prefix)
            return sorted((self._entry(meta) for page in pages for meta in page), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove an object. A missing object is no error.

        Raises `StorageError` for one behind a link that somebody else has made in a local store: it is not the run's.
        """
        self._check_links(key)
        try:
            with self._errors("delete", key):
                if isinstance(self._backend, LocalStore) and _HALF_WRITTEN.search(key):
                    self._path(key).unlink()
                    return
                obstore.delete(self._backend, self._prefix + key)
        except NotFound:
            pass

    def half_written(self, prefix: str = "") -> builtins.list[Entry]:
        """List what killed processes have half written under the folder `prefix` of a local store, as `list`.

        Other listings do not show these files, and nothing reads them. A bucket shows none.
        """
        if not isinstance(self._backend, LocalStore):
            return []
        found, top = builtins.list[Entry](), self._path("")
        for path in self._path(prefix).rglob("*"):
            with suppress(FileNotFoundError):  # it was whole in the meantime
                if _HALF_WRITTEN.search(path.name) and stat.S_ISREG((facts := path.lstat()).st_mode):
                    modified = datetime.fromtimestamp(facts.st_mtime, UTC)
                    found.append(Entry(path.relative_to(top).as_posix(), facts.st_size, modified, ""))
        return found

    def delete_alone(self, key: str) -> None:
        """Remove an object, and the folders that held nothing else: a local store keeps empty folders."""
        self.delete(key)
        self._remove_empty_folders(key)

    def _remove_empty_folders(self, key: str) -> None:
        if isinstance(self._backend, LocalStore):
            with suppress(OSError):  # raised by the first folder that holds something else
                for folder in list(self._path(key).parents)[: len(Path(self._prefix + key).parts) - 1]:
                    folder.rmdir()

    def delete_folder(self, prefix: str) -> None:
        """Remove every object under the folder `prefix` (ending in `/`). An empty folder is no error.

        Raises `StorageError` as `delete`.
        """
        for entry in self.list(prefix):
            self.delete(entry.key)
        if isinstance(self._backend, LocalStore):
            # Remove empty folders too, and what a killed process had half written: listings do not show these.
            shutil.rmtree(self._path(prefix), ignore_errors=True)

    def _check_links(self, key: str) -> None:
        """Raise `StorageError` if a folder of `key` in a local store is a link of another user.

        Whoever may write to a store could otherwise have the reader's own files removed as the run's.
        """
        if not isinstance(self._backend, LocalStore):
            return
        top = self._path("")
        for folder in self._path(key).parents:
            if folder == top or top not in folder.parents:
                return
            with suppress(FileNotFoundError, NotADirectoryError):
                found = folder.lstat()
                if stat.S_ISLNK(found.st_mode) and found.st_uid != os.getuid():
                    raise StorageError(
                        f"{folder} is a link of another user (uid {found.st_uid}) to {shown(os.readlink(folder))}, so"
                        f" {key} is not removed. Remove the link, if it should not be there."
                    )

    def _check_file(self, key: str) -> None:
        """Check an object in a local folder with `check_file`."""
        if isinstance(self._backend, LocalStore):
            check_file(self._path(key))

    def _check_length(self, key: str, start: int, end: int, length: int) -> None:
        if length != end - start:
            raise Damaged(
                f"{self.uri}/{key}: bytes {start} to {end} were asked for, but the object ends at {start + length}. "
                "It is truncated."
            )

    def _entry(self, meta: Any) -> Entry:
        version = meta.get("e_tag") or f"{meta['size']}-{meta['last_modified'].isoformat()}"
        return Entry(meta["path"].removeprefix(self._prefix), meta["size"], meta["last_modified"], version)

    def _path(self, key: str) -> Path:
        """Return the path at which a local store keeps `key`."""
        return Path(self.uri.removeprefix("file://") or "/") / key

    def _sync(self, key: str) -> None:
        """Make a local write survive a power cut: obstore renames into place, but does not fsync.

        Every folder above is synced too, because the write may have created it. A folder that another process has
        removed in the meantime is skipped: when two processes compile the same data, the first to finish removes the
        progress of both.
        """
        if not isinstance(self._backend, LocalStore):
            return
        path = self._path(key)
        depth = len(Path(self._prefix + key).parts)
        for target in (path, *list(path.parents)[:depth]):
            with suppress(FileNotFoundError):
                descriptor = os.open(target, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        """As `_errors`. A write that fails, for example because the disk is full, leaves no folder that it has made."""
        try:
            with self._errors("write", key):
                yield
        except StorageError:
            self._remove_empty_folders(key)
            raise

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        where = f"{self.uri}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            if NO_BUCKET.search(str(error)):
                raise StorageError(f"cannot {verb} {where}: {self._reason(error)}.") from error
            raise NotFound(f"{where} does not exist.") from error
        except FileExistsError as error:
            raise AlreadyExists(f"{where} exists already.") from error
        except (BaseError, OSError, ValueError) as error:  # obstore raises ValueError for a name that no store takes
            if type(error).__name__ == "AlreadyExistsError":
                raise AlreadyExists(f"{where} exists already.") from error
            raise _kind(error)(f"cannot {verb} {where}: {self._reason(error)}.") from error

    def _reason(self, error: BaseException) -> str:
        return reason(error, self.uri.partition("://")[0])


def _kind(error: Exception) -> type[StorageError]:
    if beyond_the_end(error):
        return Damaged
    if slows(error):
        return SlowDown
    return Unreachable if passes(error) else StorageError


@dataclass(frozen=True)
class Paced:
    """How a bucket is asked for what it holds: in turns of `pace`, by a `backend` that repeats nothing by itself."""

    backend: Any
    pace: Pace
    patience: float

    def ask(self, request: Callable[[Any], T]) -> T:
        return self.pace.ask(lambda: request(self.backend), self.patience)


def _merged(starts: list[int], ends: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return as few spans as cover the ranges with gaps of at most `_MERGED_BYTES`, and the span of each range.

    obstore would merge them too, but its Rust code panics when a merged object ends before one of its ranges begins.
    """
    spans: list[tuple[int, int]] = []
    owners = [0] * len(starts)
    for index in sorted(range(len(starts)), key=starts.__getitem__):
        start, end = starts[index], ends[index]
        if spans and start - spans[-1][1] <= _MERGED_BYTES:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
        owners[index] = len(spans) - 1
    return spans, owners


def open_run_store(config: Config) -> Store:
    """Open `run.store` of a configuration, with its time limits. See `open_store`."""
    run = config.run
    return open_store(run.store, retry_seconds=run.store_retry, request_seconds=run.store_timeout)


def open_store(
    uri: str,
    *,
    setting: str = "run.store",
    retry_seconds: float = RETRY_SECONDS,
    request_seconds: float = REQUEST_SECONDS,
) -> Store:
    """Open `uri`: a folder's path, or file://, s3://, gs://, az:// or memory://.

    Opening creates nothing: a folder is created with its first object.

    Credentials, region and endpoint come from the usual environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
    GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...) or from the machine's role. An endpoint may be
    http://; then a bucket of S3 is addressed by path. Requests to a failing bucket are repeated for `retry_seconds`,
    and one request may take `request_seconds`. Messages call `uri` by the name in `setting`.

    Raises `ConfigError` if `uri` or an endpoint is not valid, and `StorageError` if the path cannot be a folder.
    """
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{setting}: {without_credentials(uri)!r} has the scheme {scheme!r}. Allowed are a folder's path, or "
            f"{', '.join(s + '://' for s in SCHEMES)}."
        )
    if scheme == "memory":
        return Store(uri, MemoryStore())
    if scheme == "file":
        return _open_folder(uri, setting)
    if re.search(r"[?#]|^[^/]*//[^/]*@", uri):
        raise ConfigError(
            f"{setting}: {without_credentials(uri)!r} is a bucket and a folder in it, but more was given: a user, or"
            f" what follows '?' or '#'. Remove that; credentials come from the environment ({CREDENTIALS[scheme]})."
        )
    options: dict[str, Any] = {"client_options": {"timeout": timedelta(seconds=request_seconds)}}
    if _endpoint(scheme).startswith("http://"):
        options["client_options"]["allow_http"] = True
        options |= _WITHOUT_TLS[scheme]
    try:
        backend = from_url(uri, retry_config=_repeated_for(retry_seconds), **options)
        impatient = from_url(uri, retry_config=_repeated_for(0), **options)
        paced = Paced(impatient, _pace_of(uri), retry_seconds) if retry_seconds else None
        return Store(uri, backend, request_seconds=request_seconds, paced=paced)
    except (BaseError, ValueError, OSError) as error:
        raise ConfigError(
            f"{setting}: {uri!r} cannot be opened: {reason(error, scheme)}. Credentials come from the environment "
            f"({CREDENTIALS[scheme]}) or the machine's role."
        ) from error


def _repeated_for(seconds: float) -> Any:
    """The settings of obstore by which a failing request is repeated for so long."""
    # The time limit decides, and not the number.
    return {"max_retries": 10_000, "retry_timeout": timedelta(seconds=seconds), "backoff": _BACKOFF}


@cache
def _pace_of_bucket(_bucket: str) -> Pace:
    return Pace()


def _pace_of(uri: str) -> Pace:
    """The pace of this process's requests to the bucket of `uri`."""
    return _pace_of_bucket("/".join(uri.split("/", 3)[:3]))


def _endpoint(scheme: str) -> str:
    """Return the server address from the environment, or an empty string. Raises `ConfigError` if it is not valid."""
    given = {name: os.environ[name] for name in _ENDPOINT[scheme] if os.environ.get(name)}
    for name, address in given.items():
        if not re.match(r"https?://[^/\s]", address):  # obstore would panic, or report only a "builder error"
            raise ConfigError(
                f"{name}: {address.rpartition('@')[2]!r} is no address of a server. Example: http://127.0.0.1:9000."
            )
    return next(iter(given.values()), "")


def _open_folder(uri: str, setting: str) -> Store:
    """Open a local folder. obstore wants a root that exists, so the nearest existing folder is the root.

    The folders that are missing below it become part of the keys.
    """
    name = uri.removeprefix("file://")
    if name != uri and not name.startswith("/"):
        raise ConfigError(
            f"{setting}: {uri!r} names no folder of this machine. Give its path, or file:///PATH with three slashes."
        )
    path = absolute_path(name, setting)
    try:
        root = next(folder for folder in (path, *path.parents) if folder.exists())
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file")
        missing = path.relative_to(root).as_posix()
        return Store(f"file://{path}", LocalStore(root), "" if missing == "." else f"{missing}/")
    except (OSError, BaseError) as error:
        raise StorageError(f"{setting}: the folder {path} cannot be used: {reason(error, 'file')}.") from error


@read_twice
def read_json(store: Store, key: str) -> Any:
    """Read the JSON under `key`. Raises `NotFound`, and `Damaged` if it is not JSON."""
    try:
        return json.loads(store.get(key))
    except NOT_JSON as error:
        raise Damaged(f"{store.uri}/{key} is damaged: it is no JSON ({error}).") from error
