"""The index of the pictures of a compiled data set, and where their bytes are.

Files of other modalities (trainer/base/find/media) are in the same index, and are called pictures here.

Each picture of a document has an entry of `PICTURE`, in a column beside the tokens. The bytes lie in a pack, an object
of the data set's folder that holds many pictures end to end, or stay in the file that the row names. Such a file's name
is in a list of names, which is an object too. The objects are called by their content, so that two compilations of the
same rows write the same ones:

    pictures/1f0c...    picture picture picture ...             an entry has its first byte there, and its size
    pictures/9b3e...    ["data", "cat.jpg", 0], [...], ...      an entry has its number in the list, and the size
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.base.find.media import numbered
from trainer.data.dataset.dataset import Dataset
from trainer.data.dataset.manifest import damaged
from trainer.data.format.row_format import COUNTED, PICTURES
from trainer.errors import Damaged, NotFound, first_line
from trainer.run import layout
from trainer.store.store import Store, open_store

PICTURE = np.dtype(
    [
        *(("sha256", "V32"), ("height", "<u4"), ("width", "<u4"), ("begin", "<u4"), ("tokens", "<u4")),
        *(("object", "<u8"), ("place", "<u4"), ("size", "<u4"), ("stays", "u1"), ("modality", "u1")),
    ]
)
"""A picture of a document.

`height` and `width` are those in which the processor gets it, or the two numbers that another modality keeps of the
shape of a file. `begin` and `tokens` say where its tokens are in the document. `object` names the pack with its bytes,
or if it `stays` in a file the list of names. `place` is its first byte there, or its number in the list. `modality` is
the number of its modality, 0 for a picture.
"""
NAMED = ["sha256", "height", "width"]
"""The fields that say which picture it is."""
NO_PICTURES: NDArray[np.void] = np.empty(0, PICTURE)
_PACK_BYTES = 32 * 2**20
_SAMPLED_BLOCKS = 8
_MOST_BYTES = 2**28  # more than a compilation takes


def entries_in(column: NDArray[np.uint8]) -> NDArray[np.void]:
    """The entries (pictures,) of `PICTURE` in the values (pictures, bytes) of their column."""
    return np.ascontiguousarray(column).view(PICTURE)[:, 0]


def columns_of(places: NDArray[np.void]) -> dict[str, Any]:
    """The columns of a document with these pictures."""
    return {COUNTED: len(places), PICTURES: np.ascontiguousarray(places).view(np.uint8).reshape(-1, PICTURE.itemsize)}


def end_to_end(parts: Iterable[tuple[int, NDArray[np.void]]]) -> NDArray[np.void]:
    """The pictures of texts that follow each other, each given by its number of tokens and its pictures."""
    found, before = list[NDArray[np.void]](), 0
    for length, places in parts:
        moved = places.copy()
        moved["begin"] += before
        found.append(moved)
        before += length
    return np.concatenate([NO_PICTURES, *found])


def apart() -> bool:
    """Whether the text of a picture depends on the others of its document: of most processors it does not."""
    return False


def cut_before(
    places: NDArray[np.void], limit: int, together: Callable[[], bool] = apart
) -> tuple[int, NDArray[np.void]]:
    """Where a text ends that gets at most `limit` tokens and no part of a picture, and its pictures.

    If they belong `together`, it has all or none."""
    ends = places["begin"] + places["tokens"]
    if (beyond := np.flatnonzero(ends > limit)).size:
        first = 0 if beyond[0] and together() else beyond[0]
        limit = min(limit, int(places["begin"][first]))
    return limit, places[ends <= limit]


def cut_behind(
    places: NDArray[np.void], cut: int, together: Callable[[], bool] = apart
) -> tuple[int, NDArray[np.void]]:
    """Where a text begins that loses its first `cut` tokens and all of the pictures in them, and its pictures.

    If they belong `together`, it has all or none."""
    lost = places["begin"] < cut
    if lost.any():
        last = len(places) - 1 if not lost.all() and together() else int(np.flatnonzero(lost)[-1])
        cut = max(cut, int(places["begin"][last] + places["tokens"][last]))
    kept = places[places["begin"] >= cut].copy()
    kept["begin"] -= cut
    return cut, kept


class DifferentPictures(NamedTuple):
    """The documents of a data set that have pictures, without those that have the pictures of another one, and the
    tokens of theirs that stand for pictures."""

    documents: int
    tokens: int


def different_pictures(dataset: Dataset) -> DifferentPictures:
    """Reads the pictures' entries, and the tokens beside them, of the whole data set. Raises `StorageError`."""
    known, tokens = set[bytes](), 0
    for block in range(len(dataset.blocks) - 1 if PICTURES in dataset.columns else 0):
        read = dataset.read(np.array([block]))
        counts, values = (np.concatenate(read.columns[name]) for name in (COUNTED, PICTURES))
        entries = entries_in(values)
        for own in np.split(entries, np.cumsum(counts)[:-1]):
            if len(own) and (named := own[NAMED].tobytes()) not in known:
                known.add(named)
                tokens += int(own["tokens"].sum())
    return DifferentPictures(len(known), tokens)


def pictured_documents(dataset: Dataset, block: int) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.void]]]:
    """Yields the tokens of each document of a block, and the entries of its pictures. Raises as `Dataset.read`."""
    read = dataset.read(np.array([block]))
    for number in range(*dataset.blocks[block : block + 2].tolist()):
        own = np.array([number])
        values = read.gather_column(PICTURES, own)[0] if PICTURES in dataset.columns else None
        entries = NO_PICTURES if values is None else entries_in(values)
        yield read.gather(own), entries


class Stays(NamedTuple):
    """A file with a picture that is not copied: `key` in the folder or bucket `root`, from byte `offset` on."""

    root: str
    key: str
    offset: int = 0

    @property
    def uri(self) -> str:
        return f"{self.root.rstrip('/')}/{self.key}"


@dataclass(frozen=True)
class Placed:
    """A picture of this `shape` whose bytes have their place: the fields of `PICTURE`, without that of its tokens."""

    sha256: bytes
    shape: Any
    object: int = 0
    place: int = 0
    size: int = 0
    stays: bool = False

    def entry(self, begin: int, tokens: int) -> tuple[Any, ...]:
        modality = self.shape.modality
        own = (self.sha256, *modality.numbers(self.shape), begin, tokens)
        return (*own, self.object, self.place, self.size, self.stays, modality.number)


@dataclass
class _Batch:
    """The pictures of the rows that are encoded together. A picture that they have twice is written once."""

    known: dict[bytes, Placed] = field(default_factory=dict[bytes, Placed])
    pack: bytearray = field(default_factory=bytearray)
    packs: list[int] = field(default_factory=list[int])
    names: list[Stays] = field(default_factory=list[Stays])


class PictureWriter:
    """Writes the pictures of a compilation into the `folder` of its data set, one batch of rows after another.

    It holds at most one pack in memory. Each process that encodes rows has its own."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._batch = _Batch()

    def __reduce__(self) -> Any:
        return _reopened, (self._folder.uri,)

    def place(self, content: bytes, shape: Any, stays: Stays | None) -> Placed:
        """Keep a picture of the batch: its bytes, or the name of the file in which it stays."""
        batch, digest = self._batch, hashlib.sha256(content).digest()
        if (known := batch.known.get(digest)) is not None:
            return replace(known, shape=shape)
        # Until the end of the batch an object is its number in the batch.
        if stays is None:
            if batch.pack and len(batch.pack) + len(content) > _PACK_BYTES:
                self._end_pack()
            placed = Placed(digest, shape, len(batch.packs), len(batch.pack), len(content))
            batch.pack += content
        else:
            placed = Placed(digest, shape, 0, len(batch.names), len(content), stays=True)
            batch.names.append(stays)
        batch.known[digest] = placed
        return placed

    def end(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The entries (pictures, bytes) of the batch with the names of their objects, which are then written."""
        self._end_pack()
        batch, self._batch = self._batch, _Batch()
        entries = entries_in(values).copy()
        packed = entries["stays"] == 0
        entries["object"][packed] = np.array(batch.packs or [0], np.uint64)[entries["object"][packed]]
        if batch.names:
            listed = json.dumps(batch.names, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
            entries["object"][~packed] = self._write(listed, zlib.compress(listed))
        return entries.view(np.uint8).reshape(-1, PICTURE.itemsize)

    def _end_pack(self) -> None:
        if self._batch.pack:
            content = bytes(self._batch.pack)
            self._batch.packs.append(self._write(content, content))
            self._batch.pack = bytearray()

    def _write(self, named: bytes, content: bytes) -> int:
        """Write an object that is called by `named`, and return its number."""
        number = int.from_bytes(hashlib.sha256(named).digest()[:8], "little")
        if not self._folder.exists(key := layout.pictures(number)):
            self._folder.put(key, content)
        return number


def _reopened(uri: str) -> PictureWriter:
    return PictureWriter(open_store(uri))


class SampledFiles(NamedTuple):
    """The entries of the files of some documents, how many files of an epoch `each` of them stands for, (entries,), and
    the tokens of the epoch."""

    entries: NDArray[np.void]
    each: NDArray[np.float64]
    tokens: float


def sampled_files(dataset: Dataset, weights: Sequence[float]) -> SampledFiles:
    """The files of documents in some blocks of each source, at even distances. An epoch visits a source's documents as
    often as its weight says."""
    entries, each, tokens, sources = [NO_PICTURES], [np.empty(0)], 0.0, dataset.block_sources
    lengths = np.diff(dataset.offsets[dataset.blocks])
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source) if weight else np.empty(0, np.int64)
        if not len(own):
            continue
        places = np.unique(np.linspace(0, len(own) - 1, min(len(own), _SAMPLED_BLOCKS)).astype(np.int64))
        read = dataset.read(own[places])
        found = entries_in(np.concatenate(read.columns[PICTURES]))
        of_source = weight * int(lengths[own].sum())
        entries.append(found)
        each.append(np.full(len(found), of_source / sum(map(len, read.parts))))
        tokens += of_source
    return SampledFiles(np.concatenate(entries), np.concatenate(each), tokens)


class PictureFiles:
    """Reads the bytes of the pictures of the data set in `folder`."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._names = lru_cache(maxsize=256)(self._read_names)

    def read(self, entry: Any) -> bytes:
        """The bytes of a picture by its entry of `PICTURE`, checked by their hash.

        Raises:
            StorageError: the store cannot be read, or a picture is gone or is not what was compiled.
        """
        digest, number, place, size = (entry[name] for name in ("sha256", "object", "place", "size"))
        noun = self.kept(entry).modality.noun
        if size > _MOST_BYTES:
            raise self.unfit(f"one has {size:,} bytes")
        stays = self._name(int(number), int(place)) if entry["stays"] else None
        content = b""
        for _ in range(2):
            if stays is None:
                content = self._folder.get_range(layout.pictures(int(number)), int(place), int(place) + int(size))
            else:
                content = self._reread(stays, int(size), noun)
            if hashlib.sha256(content).digest() == digest.tobytes():
                return bytes(content)
        if stays is None:
            where = f"{self._folder.uri}/{layout.pictures(int(number))}"
            raise damaged(where, f"the {noun} at byte {place} is not what was written: its SHA-256 differs")
        raise Damaged(f"{stays.uri}: the {noun} has changed since the data was compiled. {self._remedy()}")

    def kept(self, entry: Any) -> Any:
        """Return what an entry says of the shape of its picture. Raises `StorageError` if none has it."""
        try:
            return numbered(int(entry["modality"])).kept(int(entry["height"]), int(entry["width"]))
        except ValueError as error:
            raise self.unfit(f"one has {entry['size']:,} bytes and {error}") from error

    def _reread(self, stays: Stays, size: int, noun: str) -> bytes:
        try:
            return reread(stays, size)
        except (NotFound, OSError) as error:
            raise Damaged(
                f"{stays.uri}: the {noun} cannot be read any more ({first_line(error)}). {self._remedy()}"
                f" data.images.copy: true keeps copies of all {noun}s in the store."
            ) from error

    def _remedy(self) -> str:
        return f"Put the file back, or delete {self._folder.uri}, and the rows are compiled again with what is there."

    def unfit(self, why: str) -> Damaged:
        """The error of a document whose pictures are not what they were when it was compiled."""
        return damaged(f"{self._folder.uri}/pictures", f"the pictures of a document do not fit it: {why}")

    def _name(self, number: int, place: int) -> Stays:
        if place >= len(names := self._names(number)):
            where = f"{self._folder.uri}/{layout.pictures(number)}"
            raise damaged(where, f"it has {len(names):,} names, and a picture has the number {place:,}")
        return names[place]

    def _read_names(self, number: int) -> list[Stays]:
        key = layout.pictures(number)
        try:
            listed = json.loads(zlib.decompress(self._folder.get(key)))
            return [Stays(str(root), str(key), int(offset)) for root, key, offset in listed]
        except (zlib.error, ValueError, TypeError, RecursionError) as error:
            raise damaged(f"{self._folder.uri}/{key}", f"it is no list of names ({first_line(error)})") from error


def reread(stays: Stays, size: int) -> bytes:
    """Up to `size` bytes of a picture that stays in its file."""
    if "://" not in stays.root:
        with Path(stays.root, stays.key).open("rb") as file:
            file.seek(stays.offset)
            return file.read(size)
    return bytes(_opened(stays.root).get_range(stays.key, stays.offset, stays.offset + size))


_opened = lru_cache(maxsize=8)(open_store)
