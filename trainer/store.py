"""One small seam over obstore: the same few operations on a local folder, S3, GCS, Azure and memory.

Keys are `str` with `/` (a `Path` would mangle URIs). Every failure leaves as a `StorageError` that names the object.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url

from trainer.errors import AlreadyExists, ConfigError, NotFound, StorageError

SCHEMES = ("file", "s3", "gs", "az", "memory")
# obstore's default part of 5 MiB allows 10,000 parts = 50 GB an object; 64 MiB parts allow 640 GB.
_PART_BYTES = 64 * 2**20
# Connection errors and 5xx are retried for some 20 s, which a restarting gateway needs; a refusal (4xx) never is.
_RETRY: Any = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(milliseconds=500), "max_backoff": timedelta(seconds=4), "base": 3},
}


@dataclass(frozen=True)
class Entry:
    """An object in a listing: `size` in bytes; `version` changes when the content does (ETag, or size and mtime)."""

    key: str
    size: int
    modified: datetime
    version: str


class Store:
    """A folder in an object store. `uri` names it; keys are relative to it."""

    def __init__(self, uri: str, backend: Any, prefix: str = "") -> None:
        self.uri = uri.rstrip("/")
        self._backend = backend
        self._prefix = prefix

    def sub(self, name: str) -> "Store":
        """The folder `name` inside this one."""
        name = name.strip("/")
        return Store(f"{self.uri}/{name}", self._backend, f"{self._prefix}{name}/")

    def get(self, key: str) -> bytes:
        with self._errors("read", key):
            return bytes(obstore.get(self._backend, self._prefix + key).bytes())

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        """Bytes [start, end) of an object, in a writable buffer."""
        if start == end:
            return bytearray()
        with self._errors("read", key):
            data = bytearray(obstore.get_range(self._backend, self._prefix + key, start=start, end=end))
        self._check_length(key, start, end, len(data))
        return data

    def get_ranges(self, key: str, starts: list[int], ends: list[int]) -> list[bytes]:
        """Several ranges at once; near ones are merged into one request, and all are in flight together."""
        if not starts:
            return []
        try:
            with self._errors("read", key):
                parts = obstore.get_ranges(self._backend, self._prefix + key, starts=starts, ends=ends)
        except BaseException as error:
            # A range that starts past the end makes obstore panic (a BaseException of a class it does not export).
            if type(error).__name__ != "PanicException":
                raise
            raise StorageError(
                f"{self.uri}/{key}: bytes up to {max(ends)} were asked for, but the object ends before. It is truncated."
            ) from error
        for start, end, part in zip(starts, ends, parts, strict=True):
            self._check_length(key, start, end, len(part))
        return [bytes(part) for part in parts]

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object; it becomes visible whole or not at all."""
        with self._errors("write", key):
            obstore.put(self._backend, self._prefix + key, data, chunk_size=_PART_BYTES)
            self._sync(key)

    def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist yet: of several racing writers exactly one succeeds.

        Raises `AlreadyExists` for the others. `data` must fit one request, as multipart uploads have no such condition.
        """
        with self._errors("write", key):
            obstore.put(self._backend, self._prefix + key, data, mode="create", use_multipart=False)
            self._sync(key)

    def head(self, key: str) -> Entry:
        with self._errors("read", key):
            return self._entry(obstore.head(self._backend, self._prefix + key))

    def exists(self, key: str) -> bool:
        try:
            self.head(key)
        except NotFound:
            return False
        return True

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted: one cheap request, however much lies inside them."""
        with self._errors("list", ""):
            listing = obstore.list_with_delimiter(self._backend, prefix=self._prefix or None)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in listing["common_prefixes"])

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object under the folder `prefix` (ending in `/` or empty), sorted by key."""
        with self._errors("list", prefix):
            pages = obstore.list(self._backend, prefix=self._prefix + prefix)
            return sorted((self._entry(meta) for page in pages for meta in page), key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        try:
            with self._errors("delete", key):
                obstore.delete(self._backend, self._prefix + key)
        except NotFound:
            pass

    def _check_length(self, key: str, start: int, end: int, length: int) -> None:
        if length != end - start:
            raise StorageError(
                f"{self.uri}/{key}: bytes {start} to {end} were asked for, but the object ends at {start + length}. "
                "It is truncated."
            )

    def _entry(self, meta: Any) -> Entry:
        version = meta.get("e_tag") or f"{meta['size']}-{meta['last_modified'].isoformat()}"
        return Entry(meta["path"].removeprefix(self._prefix), meta["size"], meta["last_modified"], version)

    def _sync(self, key: str) -> None:
        """Make a local write survive a power cut: obstore renames into place, but does not fsync."""
        if not isinstance(self._backend, LocalStore):
            return
        path = Path(urlsplit(self.uri).path) / key
        for target in (path, path.parent):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        where = f"{self.uri}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StorageError(f"cannot {verb} {where}: {_reason(error)}.") from error
            raise NotFound(f"{where} does not exist.") from error
        except FileExistsError as error:
            raise AlreadyExists(f"{where} exists already.") from error
        except (BaseError, OSError) as error:
            if type(error).__name__ == "AlreadyExistsError":
                raise AlreadyExists(f"{where} exists already.") from error
            raise StorageError(f"cannot {verb} {where}: {_reason(error)}.") from error


# Where a cloud machine asks for its role, on AWS, GCP and Azure: reached only when nothing else gave credentials.
_METADATA_SERVICE = re.compile(r"/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity")


def _reason(error: BaseException) -> str:
    """What went wrong, in one clause: obstore's text carries the request, the server's XML and a debug rendering."""
    text = str(error).strip()
    if _METADATA_SERVICE.search(text):
        return (
            "no credentials were found, neither in the environment (for s3:// AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY) nor as a role of this machine"
        )
    if "NoSuchBucket" in text:
        return "the bucket does not exist"
    host = _first(r"https?://[^/\s]+", text)
    status = _first(r"status code: (\d{3}[A-Za-z ]*)", text)
    if status:
        details = filter(None, (_first(r"<Code>(.*?)</Code>", text), _first(r"<Message>(.*?)</Message>", text)))
        explanation = ": ".join(details).rstrip(". ")
        return f"{host} answered {status.strip()}" + (f" ({explanation})" if explanation else "")
    if "error sending request" in text:
        cause = _first(r'message: "(.*?)"', text) or _first(r'"((?:failed|dns|invalid)[^"]*)"', text)
        return f"{host} cannot be reached" + (f" ({cause})" if cause else "")
    first_line = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^Generic \w+ error: ", "", first_line).rstrip(".")


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[match.re.groups] if match else None


def open_store(uri: str) -> Store:
    """Open `uri`: a folder's path, or file://, s3://, gs://, az:// or memory://.

    Credentials, region and endpoint come from the usual environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
    GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...) or the machine's role. An http:// endpoint is
    addressed by path. Raises `ConfigError` for an unknown scheme.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise ConfigError(
            f"run.store: {uri!r} has the scheme {scheme!r}. Allowed are a folder's path, or {', '.join(s + '://' for s in SCHEMES)}."
        )
    if scheme == "memory":
        return Store(uri, MemoryStore())
    if scheme == "file":
        path = Path(urlsplit(uri).path if "://" in uri else uri).expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            return Store(f"file://{path}", LocalStore(path, mkdir=True))
        except (OSError, BaseError) as error:
            raise StorageError(f"run.store: the folder {path} cannot be used: {_reason(error)}.") from error
    options: dict[str, Any] = {}
    if scheme == "s3" and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options = {"client_options": {"allow_http": True}, "virtual_hosted_style_request": False}
    try:
        return Store(uri, from_url(uri, retry_config=_RETRY, **options))
    except (BaseError, ValueError, OSError) as error:
        raise ConfigError(f"run.store: {uri!r} cannot be opened: {_reason(error)}.") from error
