"""The rows of a tar of WebDataset: the members whose names differ in their endings alone make up a sample.

0001.jpg    a picture of the row
0001.json   its other fields
0002.0.png  the row has two pictures,
0002.1.png  in this order
0002.json   or in the order in which its fields name them: {"images": ["0002.1.png", "0002.0.png"], ...}
"""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from trainer.data.format import strict_json
from trainer.data.format.formats import Row
from trainer.data.source import rows
from trainer.data.source.files import SourceFile
from trainer.data.source.rows import Batch, Decoded, buffered
from trainer.errors import NOT_JSON, DataError

_PORTION_BYTES = 8 * 2**20
_MOST_BYTES = 2**28
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# A row with one of these is refused by the fields that other rows have it in.
_OTHER_MEDIA = {
    **dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov"), "videos"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a"), "audios"),
}
_NAMING = ("path", "url", "image", "image_url")


class _Sample:
    """The members of one row. `offset` is where a member begins in a file that is not compressed."""

    def __init__(self, key: str) -> None:
        self.key, self.size = key, 0
        self._row: Row = {}
        self._pictures: dict[str, dict[str, Any]] = {}
        self._error: DataError | None = None

    def add(self, name: str, ending: str, content: bytes, offset: int | None) -> None:
        self.size += len(content)
        kind = ending.rpartition(".")[2]
        if kind in _PICTURES:
            where = {} if offset is None else {"offset": offset}
            self._pictures[name] = {"bytes": content, "path": PurePosixPath(name).name, **where}
        elif kind in _OTHER_MEDIA:
            self._row.setdefault(_OTHER_MEDIA[kind], []).append(name)
        elif kind == "json":
            try:
                found: Any = strict_json.loads(content.decode("utf-8-sig"))
            except (*NOT_JSON, strict_json.TwiceNamed) as error:
                self._error = DataError(f"its member {name!r} is not JSON ({error})")
            else:
                self._row |= found if isinstance(found, dict) else {ending: found}
        elif kind in ("txt", "text", "cls"):
            self._row[ending] = content.decode("utf-8", "replace")

    def row(self) -> Row | DataError:
        if self._error is not None:
            return self._error
        names = {PurePosixPath(name).name: picture for name, picture in self._pictures.items()} | self._pictures
        used = set[int]()

        def own(value: Any, key: str = "") -> Any:
            """The value, with the pictures in place of the names of members."""
            if isinstance(value, str) and key in (*_NAMING, "images") and value in names:
                used.add(id(names[value]))
                return names[value]
            if isinstance(value, list):
                return [own(item, key) for item in value]
            return {name: own(item, name) for name, item in value.items()} if isinstance(value, dict) else value

        row: Row = own(self._row)
        rest = [picture for picture in self._pictures.values() if id(picture) not in used]
        if rest and used:
            return DataError(f"its fields name {len(used)} of its {len(names)} pictures")
        return {**row, "images": rest} if rest else row


def samples_of_tar(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """The samples of a tar in batches. Raises Python's own errors if it is damaged."""
    source = buffered(file)
    stream: Any = source
    if compression is not None:
        import pyarrow

        stream = pyarrow.input_stream(source, compression=compression)
    first, part, size = 1, list[Row | DataError](), 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for sample in _samples(tar, compressed=compression is not None):
                part.append(sample.row())
                size += sample.size
                if len(part) == rows.BATCH_ROWS or size >= _PORTION_BYTES:
                    yield Batch(file.uri, first, Decoded(part), source.tell())
                    first, part, size = first + len(part), [], 0
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error
    if part:
        yield Batch(file.uri, first, Decoded(part), source.tell())


def _samples(tar: tarfile.TarFile, *, compressed: bool) -> Iterable[_Sample]:
    sample: _Sample | None = None
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile keeps all of them otherwise
        if not member.isfile():
            continue
        path = PurePosixPath(member.name)
        begin, _, ending = path.name.partition(".")
        key = str(path.with_name(begin)) if begin else ""
        if not key:
            continue  # a hidden file, such as a Mac's
        if member.size > _MOST_BYTES:
            raise ValueError(f"its member {member.name!r} has more than {_MOST_BYTES:,} bytes")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        content = tar.extractfile(member)
        assert content is not None
        sample.add(member.name, ending.lower(), content.read(), None if compressed else member.offset_data)
    if sample is not None:
        yield sample
