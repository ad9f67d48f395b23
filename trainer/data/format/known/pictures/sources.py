"""Finds the pictures that rows name or hold, and checks each one before anything is trained with it.

Files of other modalities are found in the same way: a `Picture` may be a video.
"""

import base64
import binascii
import ipaddress
import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainer.base.find.media import Modality, NotOfModality, Shown, recognized
from trainer.base.find.media.still import STILL
from trainer.base.find.processor import Processor
from trainer.config.data import Data
from trainer.config.paths import check_file
from trainer.data.dataset.pictures import Stays
from trainer.data.format.pictures import BadPicture
from trainer.data.render.document import file_of_rows
from trainer.errors import DataError, NotFound, StorageError, first_line, shortened, shown
from trainer.servers import Pictured
from trainer.store.store import open_store

_MOST_BYTES = 2**28
_LONGEST_PATH = 4096
OFFSET = "offset"
"""The key under which a struct with bytes says where they begin in the file of the row."""
_PLACES = ("path", "url", "base64", "bytes")
_BASE64 = ("base64", "data")
_WEB = ("http://", "https://")
_WEB_SECONDS = 20.0
_TRIES = 3


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture as they are stored, and the shape in which the base's processor gets it.

    `stays` is the file from which the bytes may be read again while a run trains. None if they must be copied."""

    content: bytes
    shape: Any
    stays: Stays | None = None


class PictureSource:
    """Reads pictures as `data.images` says: they lie in its root, a folder or a bucket; without one in the folder of
    the rows' file. transformers' `processor` is that of the base."""

    def __init__(self, data: Data, processor: Any) -> None:
        self._data, self._settings, self._processor = data, data.images, processor

    def read(self, modality: Modality, given: Any) -> Picture:
        """The picture that a row names or holds. Raises `BadPicture` if it cannot be trained with."""
        try:
            return self._checked(modality, given)
        except DataError as error:
            raise BadPicture(str(error)) from error

    def _checked(self, modality: Modality, given: Any) -> Picture:
        content, name, stays = self._content(modality, given)
        if not content:
            raise DataError(f"its {modality.noun} {name} is empty")
        if len(content) > _MOST_BYTES:
            raise DataError(f"its {modality.noun} {name} has more than the {_MOST_BYTES:,} bytes allowed")
        try:
            shape = modality.shape_of(content, self._data, self._processor)
        except NotOfModality as error:
            raise DataError(f"its {modality.noun} {name} {_belonging(content) or error}") from error
        except DataError as error:
            raise DataError(f"its {modality.noun} {name} {error}") from error
        return Picture(content, shape, None if self._settings.copy else stays)

    def _content(self, modality: Modality, given: Any) -> tuple[bytes, str, Stays | None]:
        """The bytes of a picture, its name in messages, and where it stays."""
        noun = modality.noun
        if isinstance(given, dict):
            if (made := modality.made(given)) is not None:
                return made, "in the row", None
            for key in modality.held:
                if given.get(key):
                    inner = _decoded(given[key], noun) if key in _BASE64 else given[key]
                    content, name, stays = self._content(modality, inner)
                    return content, name, _in_rows(given) if key == "bytes" else stays
            named = [key for key in _PLACES if key in modality.held] + [modality.kind]
            raise DataError(f"a {noun} has none of {', '.join(named[:-1])} and {named[-1]}")
        if isinstance(given, (list, tuple)) and given:
            made = modality.joined(_within_limit((self._content(STILL, one)[0] for one in given), noun))
            if made is not None:
                return made, "in the row", None
        if isinstance(given, (bytes, bytearray)):
            return bytes(given), "in the row", None
        if not isinstance(given, str) or not given:
            raise DataError(f"a {noun} is {shown(given)}, and no path, bytes or data URI")
        if given[:5].lower() == "data:":
            return _decoded(given, noun), "in the row", None
        if given.lower().startswith(_WEB):
            if not self._settings.allow_urls:
                raise DataError(
                    f"its {noun} {shown(given)} is an address on the web, from which nothing is fetched. Save the"
                    f" {noun}s beside the rows, or set data.images.allow_urls: true"
                )
            return fetched(given, noun), shown(given), None
        if len(given) > _LONGEST_PATH:
            raise DataError(
                f"a {noun} is {shown(given)}, which is longer than a path. If it is base64, give it as a data URI"
            )
        return self._stored(noun, given)

    def _stored(self, noun: str, given: str) -> tuple[bytes, str, Stays]:
        """The content of a file in the root. No path leads out of it."""
        root, name = self._settings.root or file_of_rows().rpartition("/")[0] or ".", shown(given)
        if urlsplit(root).scheme in ("", "file"):
            folder = Path(unquote(root.removeprefix("file://"))).expanduser().resolve()
            try:
                local = given.removeprefix("file://")
                path = (folder / local).resolve()
                inside = "://" not in local and path.is_relative_to(folder)
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a null byte
                raise DataError(f"its {noun} {name} cannot be read ({first_line(error)})") from error
            if not inside:
                raise DataError(
                    f"its {noun} {name} lies outside of {folder}. Set data.images.root to the folder of the {noun}s"
                )
            try:
                check_file(path)
                content = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else None
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else first_line(error)
                raise DataError(f"its {noun} {name} cannot be read ({reason}: {shortened(str(path))})") from error
            if content is None:
                raise DataError(f"its {noun} {name} has more than the {_MOST_BYTES:,} bytes allowed")
            return content, name, Stays(str(folder), path.relative_to(folder).as_posix())
        key = given.removeprefix(f"{root.rstrip('/')}/")
        if "://" in key or key.startswith("/") or ".." in key.split("/"):
            raise DataError(
                f"its {noun} {name} lies outside of {root}. Set data.images.root to the bucket of the {noun}s"
            )
        try:
            return bytes(_opened(root).get(key)), name, Stays(root, key)
        except NotFound as error:
            raise DataError(f"its {noun} {name} is not in {root}") from error
        except StorageError as error:
            raise DataError(f"its {noun} {name} cannot be read ({first_line(error)})") from error


def _within_limit(contents: Iterator[bytes], noun: str) -> Iterator[bytes]:
    """Yield the contents. Raises `DataError` before more of them are read than a file may have."""
    size = 0
    for content in contents:
        if (size := size + len(content)) > _MOST_BYTES:
            raise DataError(f"its {noun} in the row has more than the {_MOST_BYTES:,} bytes allowed")
        yield content


def _belonging(content: bytes) -> str:
    """Say what a file is, and where it belongs. Empty if it is of no modality."""
    if (own := recognized(content)) is None:
        return ""
    return f"is a {own.noun}, which belongs in {own.fields[0]!r} or a part of type {own.kind!r}"


_opened = lru_cache(maxsize=8)(open_store)


def _in_rows(given: dict[str, Any]) -> Stays | None:
    """Where the bytes of a struct lie in the rows' own file, if its reader has said so."""
    root, _, key = file_of_rows().rpartition("/")
    offset = given.get(OFFSET)
    return Stays(root, key, offset) if isinstance(offset, int) and key.endswith(".tar") else None


def fetched(address: str, noun: str) -> bytes:
    """The bytes at an address on the web. Raises `DataError` if they cannot be had, or are too many."""
    request = urllib.request.Request(address, headers={"User-Agent": "capstan"})
    opener = urllib.request.build_opener(_Redirects(noun))
    for left in reversed(range(_TRIES)):
        try:
            with opener.open(request, timeout=_WEB_SECONDS) as answer:
                return answer.read(_MOST_BYTES + 1)
        except (OSError, ValueError, HTTPException) as error:
            refused = 400 <= getattr(error, "code", 0) < 500
            if refused or not left or isinstance(error, ValueError):
                raise DataError(f"its {noun} {shown(address)} cannot be fetched ({first_line(error)})") from error
    raise AssertionError("the last try returns or raises")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, unless it leads from a public address into the network of this machine."""

    def __init__(self, noun: str) -> None:
        self._noun = noun

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith(_WEB):
            raise DataError(
                f"its {self._noun} {shown(req.full_url)} is redirected to {shown(newurl)}, which is not fetched"
            )
        if not is_public(urlsplit(newurl).hostname or "") and is_public(req.origin_req_host):
            raise DataError(
                f"its {self._noun} {shown(req.full_url)} is redirected to {shown(newurl)}, an address of a private"
                " network"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_public(host: str) -> bool:
    """Whether all addresses of a host are reachable from everywhere. Raises `OSError` if it has none."""
    found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(str(one).partition("%")[0]).is_global for one in found)


def _decoded(text: Any, noun: str) -> bytes:
    if isinstance(text, str) and text[:5].lower() == "data:":
        header, _, text = text.partition(",")
        if not header.lower().endswith(";base64"):
            raise DataError(f"a {noun} is a data URI that is not base64")
    try:
        # Encoders of mail and of some data sets break the text into lines.
        return base64.b64decode(re.sub(r"\s+", "", text), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"a {noun} is no base64 ({first_line(error)})") from error


def pictured(
    ids: list[int], spans: list[range], texts: Sequence[str], files: Sequence[Shown], processor: Processor
) -> Pictured:
    """A prompt for a server: the `texts`, and between them the `files`, of which there is one fewer. Its tokens are
    `ids`, of which those in `spans` stand for the files.

    Raises `DataError` if a server cannot get the files."""
    parts = list[dict[str, Any]]()
    for number, text in enumerate(texts):
        if number:
            file = files[number - 1]
            parts.append(file.shape.modality.part(file))
        parts += [{"type": "text", "text": text}] if text else []
    places, beside = dict[str, str](), dict[str, Any]()
    for modality in dict.fromkeys(file.shape.modality for file in files):
        places |= dict.fromkeys(modality.parts, processor.stand(modality).place)
        beside |= modality.beside_parts([file for file in files if file.shape.modality is modality])
    return Pictured(ids, spans, parts, places, beside)
