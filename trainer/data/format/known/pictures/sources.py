"""Finds the pictures that rows name or hold, and checks each one before anything is trained with it."""

import base64
import binascii
import io
import ipaddress
import os
import re
import socket
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.config.data import Images
from trainer.config.paths import check_file
from trainer.data.dataset.pictures import Stays
from trainer.data.format.pictures import BadPicture
from trainer.data.render.document import file_of_rows
from trainer.errors import DataError, NotFound, StorageError, first_line, shortened, shown
from trainer.store.store import open_store

_MOST_PIXELS = 2**27
_MOST_BYTES = 2**28
HELD = ("bytes", "base64", "image", "path", "url", "image_url")
"""The keys under which a struct, or a part of a content, has a picture or says where it is."""
OFFSET = "offset"
"""The key under which a struct with bytes says where they begin in the file of the row."""
_WEB = ("http://", "https://")
_WEB_SECONDS = 20.0
_TRIES = 3
# Pillow reads more formats, some of which it gives to other programs, such as EPS to Ghostscript.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF"),
    *("WEBP",),
)
_DEEP_COLOURS = ("I", "F")


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture as they are stored, and the height and width in which the base's processor gets it.

    `stays` is the file from which the bytes may be read again while a run trains. None if they must be copied."""

    content: bytes
    height: int
    width: int
    stays: Stays | None = None


class PictureSource:
    """Reads pictures that lie in `root`, a folder or a bucket; without one in the folder of the rows' file."""

    def __init__(self, settings: Images) -> None:
        self._settings = settings

    def read(self, given: Any) -> Picture:
        """The picture that a row names or holds. Raises `BadPicture` if it cannot be trained with."""
        try:
            return self._checked(given)
        except DataError as error:
            raise BadPicture(str(error)) from error

    def _checked(self, given: Any) -> Picture:
        content, name, stays = self._content(given)
        if not content:
            raise DataError(f"its picture {name} is empty")
        if len(content) > _MOST_BYTES:
            raise DataError(f"its picture {name} has more than the {_MOST_BYTES:,} bytes allowed")
        height, width = self._settings.limited(size_of(content, name))
        return Picture(content, height, width, None if self._settings.copy else stays)

    def _content(self, given: Any) -> tuple[bytes, str, Stays | None]:
        """The bytes of a picture, its name in messages, and where it stays."""
        if isinstance(given, dict):
            for key in HELD:
                if given.get(key):
                    content, name, stays = self._content(_decoded(given[key]) if key == "base64" else given[key])
                    return content, name, _in_rows(given) if key == "bytes" else stays
            raise DataError("a picture has none of path, url, base64, bytes and image")
        if isinstance(given, (bytes, bytearray)):
            return bytes(given), "in the row", None
        if not isinstance(given, str) or not given:
            raise DataError(f"a picture is {shown(given)}, and no path, bytes or data URI")
        if given[:5].lower() == "data:":
            header, comma, text = given.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise DataError("a picture is a data URI that is not base64")
            return _decoded(text), "in the row", None
        if given.lower().startswith(_WEB):
            if not self._settings.allow_urls:
                raise DataError(
                    f"its picture {shown(given)} is an address on the web, from which nothing is fetched. Save the"
                    " pictures beside the rows, or set data.images.allow_urls: true"
                )
            return fetched(given), shown(given), None
        return self._stored(given)

    def _stored(self, given: str) -> tuple[bytes, str, Stays]:
        """The content of a file in the root. No path leads out of it."""
        root, name = self._settings.root or file_of_rows().rpartition("/")[0] or ".", shown(given)
        if urlsplit(root).scheme in ("", "file"):
            folder = Path(unquote(root.removeprefix("file://"))).expanduser().resolve()
            try:
                local = given.removeprefix("file://")
                path = (folder / local).resolve()
                inside = "://" not in local and path.is_relative_to(folder)
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a null byte
                raise DataError(f"its picture {name} cannot be read ({first_line(error)})") from error
            if not inside:
                raise DataError(
                    f"its picture {name} lies outside of {folder}. Set data.images.root to the folder of the pictures"
                )
            try:
                check_file(path)
                content = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else None
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else first_line(error)
                raise DataError(f"its picture {name} cannot be read ({reason}: {shortened(str(path))})") from error
            if content is None:
                raise DataError(f"its picture {name} has more than the {_MOST_BYTES:,} bytes allowed")
            return content, name, Stays(str(folder), path.relative_to(folder).as_posix())
        key = given.removeprefix(f"{root.rstrip('/')}/")
        if "://" in key or key.startswith("/") or ".." in key.split("/"):
            raise DataError(
                f"its picture {name} lies outside of {root}. Set data.images.root to the bucket of the pictures"
            )
        try:
            return bytes(_opened(root).get(key)), name, Stays(root, key)
        except NotFound as error:
            raise DataError(f"its picture {name} is not in {root}") from error
        except StorageError as error:
            raise DataError(f"its picture {name} cannot be read ({first_line(error)})") from error


_opened = lru_cache(maxsize=8)(open_store)


def _in_rows(given: dict[str, Any]) -> Stays | None:
    """Where the bytes of a struct lie in the rows' own file, if its reader has said so."""
    root, _, key = file_of_rows().rpartition("/")
    offset = given.get(OFFSET)
    return Stays(root, key, offset) if isinstance(offset, int) and key.endswith(".tar") else None


def fetched(address: str) -> bytes:
    """The bytes at an address on the web. Raises `DataError` if they cannot be had, or are too many."""
    request = urllib.request.Request(address, headers={"User-Agent": "capstan"})
    opener = urllib.request.build_opener(_Redirects)
    for left in reversed(range(_TRIES)):
        try:
            with opener.open(request, timeout=_WEB_SECONDS) as answer:
                return answer.read(_MOST_BYTES + 1)
        except (OSError, ValueError, HTTPException) as error:
            refused = 400 <= getattr(error, "code", 0) < 500
            if refused or not left or isinstance(error, ValueError):
                raise DataError(f"its picture {shown(address)} cannot be fetched ({first_line(error)})") from error
    raise AssertionError("the last try returns or raises")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, unless it leads from a public address into the network of this machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith(_WEB):
            raise DataError(f"its picture {shown(req.full_url)} is redirected to {shown(newurl)}, which is not fetched")
        if not is_public(urlsplit(newurl).hostname or "") and is_public(req.origin_req_host):
            raise DataError(
                f"its picture {shown(req.full_url)} is redirected to {shown(newurl)}, an address of a private network"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_public(host: str) -> bool:
    """Whether all addresses of a host are reachable from everywhere. Raises `OSError` if it has none."""
    found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(str(one).partition("%")[0]).is_global for one in found)


def _decoded(text: Any) -> bytes:
    try:
        # Encoders of mail and of some data sets break the text into lines.
        return base64.b64decode(re.sub(r"\s+", "", text), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"a picture is no base64 ({first_line(error)})") from error


def size_of(content: bytes, name: str) -> tuple[int, int]:
    """Height and width of a picture after it was turned. Decodes all of it, as a truncated one begins like a whole one.

    Raises `DataError` if it is damaged, moves, has too many pixels, or one row or column of them alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > _MOST_PIXELS:
                    raise DataError(
                        f"its picture {name} has {width} x {height} pixels, more than the {_MOST_PIXELS:,} allowed"
                    )
                # Phones write a second picture, for a screen, into the file of a photo.
                if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
                    raise DataError(f"its picture {name} has {picture.n_frames} frames. Give one of them as a picture")  # type: ignore[attr-defined]
                if min(width, height) < 2:
                    raise DataError(f"its picture {name} has {width} x {height} pixels, in which nothing can be seen")
                if picture.mode.startswith(_DEEP_COLOURS):
                    raise DataError(
                        f"its picture {name} has grey values of more than 8 bits, of which all above 255 would become"
                        " white. Save it with 8 bits"
                    )
                turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                picture.draft(None, (width // 8, height // 8))  # a JPEG is read whole, and decoded in part
                picture.load()
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"its picture {name} has too many pixels ({first_line(error)})") from error
    except UnidentifiedImageError as error:
        raise DataError(f"its picture {name} is no picture that can be read") from error
    except Exception as error:  # decoders raise errors of any kind for damaged files
        raise DataError(f"its picture {name} is damaged ({first_line(error)})") from error
    return (width, height) if turned else (height, width)


def decoded(content: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as transformers' own loader gives it: turned as its EXIF says, and in red, green and blue.

    A picture of another height and width than `size` is made larger or smaller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            turned = ImageOps.exif_transpose(picture).convert("RGB")
    if size is None or turned.size == (size[1], size[0]):
        return turned
    return turned.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def as_parts(texts: Sequence[str], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """OpenAI's parts of content: the `texts`, and between them the `pictures`, of which there is one fewer."""
    parts = list[dict[str, Any]]()
    for number, text in enumerate(texts):
        if number:
            buffer = io.BytesIO()
            pictures[number - 1].save(buffer, "PNG")
            uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": uri}})
        parts += [{"type": "text", "text": text}] if text else []
    return parts
