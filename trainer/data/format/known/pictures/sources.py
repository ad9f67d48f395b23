"""Reads the bytes of the pictures that rows name, and checks each one before anything is trained with it."""

import base64
import binascii
import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data.format.pictures import BadPicture
from trainer.data.render.document import file_of_rows
from trainer.errors import DataError, NotFound, StorageError, first_line, shown
from trainer.store.store import open_store

_MOST_PIXELS = 2**27
_MOST_BYTES = 2**28
HELD = ("bytes", "base64", "image", "path", "url", "image_url")
"""The keys under which a struct, or a part of a content, has a picture or says where it is."""
_WEB = ("http", "https", "ftp")


@dataclass(frozen=True)
class Picture:
    """The bytes of a picture as they are stored, and its height and width after it was turned as its EXIF says."""

    content: bytes
    sha256: bytes
    height: int
    width: int


class PictureSource:
    """Reads pictures that lie in `root`, a folder or a bucket; without one in the folder of the rows' file."""

    def __init__(self, root: str | None) -> None:
        self._root = root

    def read(self, given: Any) -> Picture:
        """The picture that a row names or holds. Raises `BadPicture` if it cannot be trained with."""
        try:
            return self._checked(given)
        except DataError as error:
            raise BadPicture(str(error)) from error

    def _checked(self, given: Any) -> Picture:
        content, name = self._content(given)
        if not content:
            raise DataError(f"its picture {name} is empty")
        if len(content) > _MOST_BYTES:
            raise DataError(f"its picture {name} has {len(content):,} bytes, more than the {_MOST_BYTES:,} allowed")
        height, width = size_of(content, name)
        return Picture(content, hashlib.sha256(content).digest(), height, width)

    def _content(self, given: Any) -> tuple[bytes, str]:
        """The bytes of a picture, and its name in messages."""
        if isinstance(given, dict):
            for key in HELD:
                if given.get(key):
                    return self._content(_decoded(given[key]) if key == "base64" else given[key])
            raise DataError("a picture has none of path, url, base64, bytes and image")
        if isinstance(given, (bytes, bytearray)):
            return bytes(given), "in the row"
        if not isinstance(given, str) or not given:
            raise DataError(f"a picture is {shown(given)}, and no path, bytes or data URI")
        if given.startswith("data:"):
            header, comma, text = given.partition(",")
            if not comma or not header.endswith(";base64"):
                raise DataError("a picture is a data URI that is not base64")
            return _decoded(text), "in the row"
        scheme = urlsplit(given).scheme
        if scheme in _WEB:
            raise DataError(
                f"its picture {shown(given)} is an address on the web, from which nothing is fetched. Save the pictures"
                " beside the rows"
            )
        return self._stored(given), shown(given)

    def _stored(self, given: str) -> bytes:
        """The content of a file in the root. No path leads out of it."""
        root = self._root or file_of_rows().rpartition("/")[0] or "."
        if urlsplit(root).scheme in ("", "file"):
            folder = Path(unquote(root.removeprefix("file://"))).resolve()
            path = (folder / given.removeprefix("file://")).resolve()
            if not path.is_relative_to(folder):
                raise DataError(
                    f"its picture {shown(given)} lies outside of {folder}. Set data.images.root to the folder of the"
                    " pictures"
                )
            try:
                return path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"its picture {shown(given)} cannot be read ({os.strerror(error.errno or 0)}: {path})"
                ) from error
        key = given.removeprefix(f"{root.rstrip('/')}/")
        if urlsplit(key).scheme or key.startswith("/") or ".." in key.split("/"):
            raise DataError(
                f"its picture {shown(given)} lies outside of {root}. Set data.images.root to the bucket of the pictures"
            )
        try:
            return bytes(_opened(root).get(key))
        except NotFound as error:
            raise DataError(f"its picture {shown(given)} is not in {root}") from error
        except StorageError as error:
            raise DataError(f"its picture {shown(given)} cannot be read ({first_line(error)})") from error


_opened = lru_cache(maxsize=8)(open_store)


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"a picture is no base64 ({first_line(error)})") from error


def size_of(content: bytes, name: str) -> tuple[int, int]:
    """Height and width of a picture after it was turned. Decodes all of it, as a truncated one begins like a whole one.

    Raises `DataError` if it is damaged, moves, has too many pixels, or one row or column of them alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
                if width * height > _MOST_PIXELS:
                    raise DataError(
                        f"its picture {name} has {width} x {height} pixels, more than the {_MOST_PIXELS:,} allowed"
                    )
                if getattr(picture, "n_frames", 1) > 1:
                    raise DataError(f"its picture {name} has {picture.n_frames} frames. Give one of them as a picture")  # type: ignore[attr-defined]
                if min(width, height) < 2:
                    raise DataError(f"its picture {name} has {width} x {height} pixels, in which nothing can be seen")
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


def decoded(content: bytes) -> Image.Image:
    """The picture as transformers' own loader gives it: turned as its EXIF says, and in red, green and blue."""
    with Image.open(io.BytesIO(content)) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")
