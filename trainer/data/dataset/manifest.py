"""The manifest of a compiled data set, format 3: a list of its content, which proves that it is complete.

Each object beside the tokens is JSON that holds the `sha256` of its own canonical form.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import Damaged, NotFound, StorageError
from trainer.run import layout
from trainer.store.json_text import digest_of
from trainer.store.store import Store, read_twice

FORMAT = 3
MANIFEST = "manifest.json"
# The sizes in bytes of a token, an offset, a block and a hash in the binary files; see trainer/data/dataset/dataset.py.
_TOKEN, _OFFSET, _BLOCK, _HASH = 4, 8, 40, 8
_SEAL = "sha256"
_LEFT_OUT_NAMES, _LEFT_OUT_EXAMPLES = 20, 3

R = TypeVar("R", bound="SealedRecord")
Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SealedRecord(BaseModel):
    """An object that is written as JSON beside the tokens."""

    model_config = ConfigDict(extra="forbid")

    def sealed(self) -> bytes:
        """Its JSON with its hash. A field that is `None`, as in most data sets, has no key."""
        tree = self.model_dump(mode="json", exclude_none=True)
        return json.dumps({**tree, _SEAL: digest_of(tree)}, indent=1, ensure_ascii=False).encode()


@read_twice
def read_record(kind: type[R], folder: Store, key: str) -> R:
    """Read the record whose `sealed` bytes are under `key`. Raises `NotFound`, or `Damaged` for any other bytes."""
    where = f"{folder.uri}/{key}"
    return _record(kind, _tree(folder.get(key), where), where)


def _tree(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
        if not isinstance(tree, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise damaged(where, str(error)) from error
    return tree


def _record(kind: type[R], tree: dict[str, Any], where: str) -> R:
    try:
        is_whole = tree.pop(_SEAL, None) == digest_of(tree)
    except (ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        raise damaged(where, "its content does not match its sha256")
    try:
        return kind.model_validate(tree, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(where, f"{place}: {first['msg']}".removeprefix(": ")) from error


def damaged(where: str, reason: str) -> Damaged:
    return Damaged(f"{where} is damaged ({reason}). Delete {where.rpartition('/')[0]}, and what it has is made again.")


class FileRecord(SealedRecord):
    """An object of the data set: `key` in its folder, `size` in bytes, `sha256` in hex."""

    key: str = Field(pattern=r"^\w[\w-]*(\.[\w-]+)*$")
    size: Count
    sha256: Sha256

    @classmethod
    def put(cls, folder: Store, key: str, content: bytes) -> "FileRecord":
        """Write the object, and return its record."""
        folder.put(key, content)
        return cls(key=key, size=len(content), sha256=hashlib.sha256(content).hexdigest())


class ColumnRecord(SealedRecord):
    """A column of a shard's documents (trainer/data/format/row_format.py).

    It records the file of its values, end to end, and where the values of each block begin.
    """

    dtype: str
    per: Literal["document", "target", "token", "picture"]
    shape: list[Count] = []
    values_file: FileRecord
    blocks_file: FileRecord


class ShardRecord(SealedRecord):
    """A shard. It holds documents of one source and one chapter only.

    A shard of rollouts has no hashes, and two files of its own; see trainer/data/dataset/rollouts.py."""

    source: Count
    chapter: Count
    documents: Count
    tokens: Count
    targets: Count
    tokens_file: FileRecord
    documents_file: FileRecord
    blocks_file: FileRecord
    hashes_file: FileRecord | None = None
    columns_file: FileRecord | None = None
    samples_file: FileRecord | None = None
    columns: dict[str, ColumnRecord] | None = None

    @model_validator(mode="after")
    def _has_its_size(self) -> "ShardRecord":
        sizes = self.tokens_file.size, self.documents_file.size, self.blocks_file.size % _BLOCK
        hashes = self.hashes_file is None or self.hashes_file.size == _HASH * self.documents
        if sizes != (_TOKEN * self.tokens, _OFFSET * (self.documents + 1), 0) or not hashes:
            raise ValueError("the sizes of its files are not those of so many documents and tokens")
        return self


class SourceRecord(SealedRecord):
    """One source's share of the data set. `files` are the URIs of its files."""

    documents: Count = 0
    tokens: Count = 0
    targets: Count = 0
    files: list[str] = []


class Counters(SealedRecord):
    """Counts of rows: all rows, those that became no document, and those that were cut to the sequence length.

    If rows have labels, also the desired answers that can be trained on. If words have tags, also the words whose tag
    no token can carry."""

    rows: Count = 0
    bad_rows: Count = 0
    dropped: Count = 0
    truncated: Count = 0
    split: Count = 0
    without_targets: Count = 0
    desired: Count | None = None
    untagged: Count | None = None

    def plus(self, other: "Counters") -> "Counters":
        both = {name: [count for count in (value, getattr(other, name)) if count is not None] for name, value in self}
        return Counters(**{name: sum(counts) for name, counts in both.items() if counts})


class LeftOut(SealedRecord):
    """Rows that carry something which their text does not contain: their number, and the places of the first ones."""

    rows: Count = 0
    examples: list[str] = []


def add_left_out(total: dict[str, LeftOut], more: Mapping[str, LeftOut]) -> None:
    """Add `more`, which was found in later rows, to `total`.

    Only the first names are kept, because rows may bring any number of them.
    """
    for what, found in more.items():
        if what in total or len(total) < _LEFT_OUT_NAMES:
            known = total.get(what, LeftOut())
            examples = [*known.examples, *found.examples][:_LEFT_OUT_EXAMPLES]
            total[what] = LeftOut(rows=known.rows + found.rows, examples=examples)


def made_of(column: ColumnRecord) -> tuple[str, str, tuple[int, ...]]:
    """The form of the column's values, which is the same in all shards."""
    return column.dtype, column.per, tuple(column.shape)


class DatasetManifest(SealedRecord):
    """The content of a data set with `chapters` chapters, or of those that are compiled so far.

    `bad_rows` describes the first few bad rows, as `file:line: reason`. `left_out` is set if the chat template leaves
    out something that rows carry.
    """

    format: Literal[3]
    fingerprint: str
    chapters: int = Field(ge=1, le=2**20)
    documents: Count
    tokens: Count
    targets: Count
    sources: list[SourceRecord]
    shards: list[ShardRecord]
    counters: Counters
    bad_rows: list[str]
    left_out: dict[str, LeftOut] | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> "DatasetManifest":
        if any(shard.source >= len(self.sources) or shard.chapter >= self.chapters for shard in self.shards):
            raise ValueError("a shard belongs to a source or a chapter that does not exist")
        kinds = {
            tuple((name, *made_of(column)) for name, column in (shard.columns or {}).items()) for shard in self.shards
        }
        if len(kinds) > 1:
            raise ValueError("its shards have not the same columns")
        if any(before.chapter > after.chapter for before, after in pairwise(self.shards)):
            raise ValueError("its shards are not in the order of their chapters")
        for name in ("documents", "tokens", "targets"):
            found = [0] * len(self.sources)
            for shard in self.shards:
                found[shard.source] += getattr(shard, name)
            if found != [getattr(source, name) for source in self.sources] or sum(found) != getattr(self, name):
                raise ValueError(f"the {name} of its shards do not add up")
        return self


def chapter_key(chapter: int) -> str:
    """The key of the manifest up to and including `chapter`, which exists while later chapters are compiled."""
    return f"chapter-{chapter:05d}.json"


@read_twice
def read_manifest(store: Store, fingerprint: str, chapter: int | None = None) -> DatasetManifest:
    """The manifest of a whole data set. If a `chapter` is given, one with this chapter and all before it is enough.

    Raises:
        NotFound: it was not written yet.
        Damaged: it is not what was written.
        StorageError: it is of another format.
    """
    folder = store.sub(layout.dataset(fingerprint))
    if chapter is not None:
        for key in (MANIFEST, chapter_key(chapter)):
            with contextlib.suppress(NotFound):
                return _parsed(folder.get(key), f"{folder.uri}/{key}", fingerprint)
    # The whole manifest may also have been written, and the chapter's removed, between the two reads above.
    return _parsed(folder.get(MANIFEST), f"{folder.uri}/{MANIFEST}", fingerprint)


def _parsed(data: bytes, where: str, fingerprint: str) -> DatasetManifest:
    tree = _tree(data, where)
    if isinstance(tree.get("format"), int) and tree["format"] != FORMAT:
        raise StorageError(f"{where}: has format {tree['format']}, but {FORMAT} is needed. Delete it.")
    manifest = _record(DatasetManifest, tree, where)
    if manifest.fingerprint != fingerprint:
        raise damaged(where, f"it is the manifest of the data set {manifest.fingerprint!r}")
    return manifest
