"""A teacher's log-probabilities of a data set's targets. All runs with the same teacher read them.

They lie in a folder beside the data:

    data/<fingerprint>/teacher-<hash of its settings>/
        teacher.json             its settings, what it was made of, and the form of the records
        block-000000007.bin      a record for each target of the documents in block 7 of the data set, in their order
        block-000000007.json     the records of each document, and their SHA-256; written second, it commits the block
        whole.json               the first document of each block and the totals; written last

A record is little-endian and has no padding. First come the ids of the teacher's k likeliest tokens, the likeliest
first, in 2 bytes each for a vocabulary of at most 65,536 tokens, else in 4. Then come their log-probabilities in nats,
and that of all other tokens together, F16. Each object can be verified by itself, so a pass that was killed keeps what
it wrote.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.dataset import Reads
from trainer.data.dataset.manifest import Count, SealedRecord, Sha256, read_record
from trainer.errors import AlreadyExists, ConfigError, Damaged, NotFound, shown
from trainer.run import layout
from trainer.store.json_text import digest_of
from trainer.store.store import Buffer, Store
from trainer.tuning.objective.teacher import Teacher, id_bytes

_TEACHER, _WHOLE = "teacher.json", "whole.json"
_BLOCK = re.compile(r"block-(\d{9})\.json")
# The log p of a token that the teacher excludes. F16 can represent it, and its probability rounds to zero.
_LEAST = -1000.0


class TeacherRecord(SealedRecord):
    """The `settings` that name a teacher, and the `facts` that decide its values.

    For each target k of the `vocabulary` tokens are stored.
    """

    format: Literal[1] = 1
    settings: dict[str, Any]
    facts: dict[str, Any]
    k: Count
    vocabulary: Count

    @property
    def dtype(self) -> np.dtype:
        ids = f"<u{id_bytes(self.vocabulary)}"
        return np.dtype([("ids", ids, (self.k,)), ("log_p", "<f2", (self.k + 1,))])


class BlockRecord(SealedRecord):
    """Document i of a block has its records [offsets[i], offsets[i + 1]), whose SHA-256 is digests[i]."""

    offsets: list[Count]
    digests: list[Sha256]


class WholeTeacher(SealedRecord):
    """The record that a teacher is stored completely.

    `firsts` has the first document of each block, then the number of all documents. `values` is a hash over the hashes
    of all values.
    """

    firsts: list[Count]
    targets: Count
    bytes: Count
    values: Sha256 | None = None


class Likeliest(NamedTuple):
    """`ids` (targets, k) int64, and `log_p` (targets, k + 1) fp32 in nats; the last is that of all other tokens."""

    ids: NDArray[np.int64]
    log_p: NDArray[np.float32]


def teacher_folder(data: Store, settings: Mapping[str, Any]) -> Store:
    """The folder of the teacher with these settings, inside the folder of the data set."""
    return data.sub(f"teacher-{digest_of(settings)[:20]}")


def read_teacher(folder: Store) -> TeacherRecord | None:
    """The record that is stored there, or None; raises `Damaged`."""
    try:
        return _record(TeacherRecord, folder, _TEACHER)
    except NotFound:
        return None


def begin_teacher(folder: Store, teacher: Teacher, facts: Mapping[str, Any], vocabulary: int) -> TeacherRecord:
    """The record of the folder, which is written now if it does not exist yet.

    Raises `ConfigError` if a teacher with other `facts` has written there.
    """
    k = min(teacher.top_k, vocabulary)
    record = TeacherRecord(settings=teacher.to_json(), facts=dict(facts), k=k, vocabulary=vocabulary)
    try:
        folder.create(_TEACHER, record.sealed())
    except AlreadyExists:
        record = _record(TeacherRecord, folder, _TEACHER)
    other = sorted(name for name in record.facts.keys() | facts.keys() if record.facts.get(name) != facts.get(name))
    if other:
        raise ConfigError(
            f"{teacher.setting}: {shown(teacher.name)} is not the teacher that has written {folder.uri}: its {other[0]}"
            " is another. Put that one back, or delete the folder and have this one write it anew."
        )
    return record


def written_blocks(folder: Store) -> set[int]:
    return {int(found[1]) for entry in folder.list() if (found := _BLOCK.fullmatch(entry.key))}


def write_block(folder: Store, record: TeacherRecord, block: int, documents: Sequence[Likeliest]) -> int:
    """Write the teacher's values of each document of the block. Returns the number of its targets."""
    parts = list[bytes]()
    for ids, log_p in documents:
        values = np.zeros(len(ids), record.dtype)
        values["ids"], values["log_p"] = ids, np.concatenate([np.maximum(log_p[:, :-1], _LEAST), log_p[:, -1:]], 1)
        parts.append(values.tobytes())
    offsets = np.cumsum([0, *(len(ids) for ids, _ in documents)]).tolist()
    folder.put(_key(block, "bin"), b"".join(parts))
    digests = [hashlib.sha256(part).hexdigest() for part in parts]
    folder.put(_key(block, "json"), BlockRecord(offsets=offsets, digests=digests).sealed())
    return offsets[-1]


def finish_teacher(folder: Store, record: TeacherRecord, firsts: Sequence[int], targets: int) -> WholeTeacher:
    """Write the record that all blocks are there."""
    values = digest_of([_record(BlockRecord, folder, _key(block, "json")).digests for block in range(len(firsts) - 1)])
    whole = WholeTeacher(firsts=list(firsts), targets=targets, bytes=targets * record.dtype.itemsize, values=values)
    folder.put(_WHOLE, whole.sealed())
    return whole


def read_whole(folder: Store) -> WholeTeacher | None:
    """The totals of a teacher that is stored completely, else None."""
    try:
        return _record(WholeTeacher, folder, _WHOLE)
    except NotFound:
        return None


def taught_identity(store: Store, dataset: str, teacher: Teacher) -> dict[str, Any]:
    """The hash of all values of a stored teacher. It must equal a checkpoint's to resume from it.

    Empty until the teacher is stored completely.
    """
    whole = read_whole(teacher_folder(store.sub(layout.dataset(dataset)), teacher.to_json()))
    return {"teacher_values": whole.values} if whole else {}


class StoredTeacher:
    """Reads a teacher's values of documents, by their numbers in the whole data set.

    A document's values are read when they are needed, and verified.
    """

    def __init__(self, folder: Store, record: TeacherRecord, whole: WholeTeacher, reads: Reads) -> None:
        self._folder, self._dtype, self._reads = folder.failing_fast(), record.dtype, reads
        self._firsts = np.array(whole.firsts, np.int64)
        self._block = lru_cache(maxsize=4096)(self._read_block)

    def read(self, documents: Sequence[int]) -> Likeliest:
        """Read the values of the targets of the `documents`, in this order.

        Raises:
            StorageError: they are not what was written, also after a second attempt, or the store is out of reach.
        """
        numbers = np.array(documents, np.int64)
        blocks, found = np.searchsorted(self._firsts, numbers, side="right") - 1, dict[int, Buffer]()
        for block in np.unique(blocks).tolist():
            mine = numbers[blocks == block].tolist()
            found.update(
                zip(mine, self._read(block, [number - int(self._firsts[block]) for number in mine]), strict=True)
            )
        records = np.frombuffer(b"".join(found[number] for number in numbers.tolist()), self._dtype)
        log_p = records["log_p"].astype(np.float32)
        # After rounding to 16 bits the probabilities may not sum to 1.
        log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        return Likeliest(records["ids"].astype(np.int64), log_p)

    def _read_block(self, block: int) -> BlockRecord:
        return self._reads.patiently(lambda: _record(BlockRecord, self._folder, _key(block, "json")))

    def _read(self, block: int, places: list[int]) -> list[Buffer]:
        index, key, size = self._block(block), _key(block, "bin"), self._dtype.itemsize
        starts, ends = ([index.offsets[place + more] * size for place in places] for more in (0, 1))
        digests = [bytes.fromhex(index.digests[place]) for place in places]
        why = _damaged(self._folder, key, "its SHA-256 differs")
        return self._reads.proven(self._folder, key, starts, ends, digests, lambda *_: why)


def _key(block: int, kind: str) -> str:
    return f"block-{block:09d}.{kind}"


def _record(kind: Any, folder: Store, key: str) -> Any:
    try:
        record = read_record(kind, folder, key)
    except Damaged as error:
        raise _damaged(folder, key, "it is not what was written") from error
    if isinstance(record, BlockRecord) and (
        len(record.offsets) != len(record.digests) + 1 or any(a > b for a, b in pairwise([0, *record.offsets]))
    ):
        raise _damaged(folder, key, "its documents do not follow each other")
    return record


def _damaged(folder: Store, key: str, reason: str) -> Damaged:
    return Damaged(f"{folder.uri}/{key} is damaged ({reason}). Delete {folder.uri}, and run capstan teach again.")
