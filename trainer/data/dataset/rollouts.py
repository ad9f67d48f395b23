"""Sampled answers as data: a chapter for each step, in the run's folder. It is committed once and trained on once.

    <run>/rollouts/<key>/data/chapter-000000012/
        manifest.json           a data set of one chapter and shard (trainer/data/dataset/manifest.py); written last,
                                with a create-only PUT
        tokens-<attempt>.bin    its documents: each is a prompt and an answer, whose tokens are the targets
        columns-<attempt>.bin   fp32 (tokens, 2): of each answer's token the sampler's log p in nats and the advantage;
                                NaN for a prompt's
        samples-<attempt>.jsonl  the chapter's figures in the first line, then a line for each answer: texts, reward
        judged.json             where a teacher on ranks of its own judges the answers: its record, written last,
                                with a create-only PUT
        judged-<attempt>.bin    fp32 (targets,): its log p of each in nats

If two processes sample or judge the same chapter, only one of them commits it. If a process dies before it commits, the
chapter is sampled or judged again.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.chapters import Chapters
from trainer.data.dataset.dataset import TARGET_BIT, TOKEN, Dataset, open_dataset, reader, write_shard
from trainer.data.dataset.manifest import (
    FORMAT,
    MANIFEST,
    Counters,
    DatasetManifest,
    FileRecord,
    SealedRecord,
    ShardRecord,
    SourceRecord,
    read_manifest,
    read_record,
)
from trainer.errors import AlreadyExists, NotFound
from trainer.run import layout
from trainer.store.store import Store

_COLUMNS = np.dtype(("<f4", (2,)))
_LOG_P = np.dtype("<f4")
_BYTES = np.dtype("u1")
_JUDGED = "judged.json"
_NUMBERS = 2**32  # the distance between the document numbers of two consecutive chapters


@dataclass(frozen=True)
class Rollout:
    """The tokens of a prompt and of one answer to it, with the sampler's log p of each answer token in nats.

    The answer has one advantage, or one for each of its tokens. `shown` is its line in the samples.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    log_p: Sequence[float]
    advantage: float | Sequence[float]
    shown: Mapping[str, Any]


def _folder(place: Store, number: int) -> Store:
    return place.sub(layout.dataset(layout.chapter_of_rollouts(number)))


def is_committed(place: Store, number: int) -> bool:
    return _folder(place, number).exists(MANIFEST)


def commit(place: Store, number: int, rollouts: Sequence[Rollout], figures: Mapping[str, Any]) -> bool:
    """Commit these rollouts as the chapter of this number. Returns False if another process was faster."""
    name = layout.chapter_of_rollouts(number)
    folder, attempt = _folder(place, number), secrets.token_hex(8)
    tokens, columns = list[NDArray[np.uint32]](), list[NDArray[np.float32]]()
    for one in rollouts:
        answer = np.array(one.answer, TOKEN) | TARGET_BIT
        tokens += [np.array(one.prompt, TOKEN), answer]
        columns += [np.full((len(one.prompt), 2), np.nan, "<f4"), np.empty((len(answer), 2), "<f4")]
        columns[-1][:, 0], columns[-1][:, 1] = one.log_p, one.advantage
    every = np.concatenate(tokens)
    offsets = np.cumsum([0, *(len(one.prompt) + len(one.answer) for one in rollouts)])
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (figures, *(one.shown for one in rollouts)))
    files = write_shard(folder, attempt, every, offsets)
    files["columns_file"] = FileRecord.put(folder, f"columns-{attempt}.bin", np.concatenate(columns).tobytes())
    files["samples_file"] = FileRecord.put(folder, f"samples-{attempt}.jsonl", lines.encode())
    counts: dict[str, Any] = {
        "documents": len(rollouts),
        "tokens": len(every),
        "targets": sum(len(one.answer) for one in rollouts),
    }
    shard = ShardRecord(source=0, chapter=0, **counts, **files)
    manifest = DatasetManifest(
        format=FORMAT,
        fingerprint=name,
        chapters=1,
        **counts,
        sources=[SourceRecord(**counts)],
        shards=[shard],
        counters=Counters(rows=len(rollouts)),
        bad_rows=[],
    )
    return _commit(folder, MANIFEST, manifest, files.values())


def _commit(folder: Store, key: str, record: SealedRecord, files: Iterable[FileRecord]) -> bool:
    """Create the record that commits the files. If another process was faster, remove the files and return False."""
    try:
        folder.create(key, record.sealed())
    except AlreadyExists:
        for file in files:
            folder.delete(file.key)
        return False
    return True


class _Judgement(SealedRecord):
    """The file of a teacher's log p of a chapter's targets.

    It also has the mean of the sampler's log p minus the teacher's, in nats a token.
    """

    file: FileRecord
    divergence: float


def is_judged(place: Store, number: int) -> bool:
    return _folder(place, number).exists(_JUDGED)


def commit_judgement(place: Store, number: int, log_p: NDArray[np.float32], divergence: float) -> bool:
    """Commit the teacher's log p of the chapter's targets. Returns False if another process was faster."""
    folder, key = _folder(place, number), f"judged-{secrets.token_hex(8)}.bin"
    file = FileRecord.put(folder, key, log_p.astype(_LOG_P).tobytes())
    return _commit(folder, _JUDGED, _Judgement(file=file, divergence=divergence), [file])


def _judgement(folder: Store) -> _Judgement:
    return read_record(_Judgement, folder, _JUDGED)


def chapter_figures(place: Store, number: int) -> dict[str, Any]:
    """The figures of a committed chapter. Raises `Damaged` if the file is not what was written."""
    name = layout.chapter_of_rollouts(number)
    (shard,) = read_manifest(place, name).shards
    assert shard.samples_file is not None
    content = reader(place.sub(layout.dataset(name)), _BYTES)(shard.samples_file).tobytes()
    return json.loads(content.partition(b"\n")[0])


class Rollouts:
    """The chapters in the folder `place`, at most `count`, and the columns of their documents.

    With `judged` a teacher judges each chapter. A chapter is ready only after that, and the advantage of a token is the
    teacher's log p minus the sampler's."""

    def __init__(self, place: Store, count: int, *, judged: bool = False) -> None:
        self.place, self._judged = place, judged
        self.chapters = Chapters(count, self._open)
        self._columns = lru_cache(maxsize=4)(self._read_columns)

    def is_ready(self, number: int) -> bool:
        return (is_judged if self._judged else is_committed)(self.place, number)

    def figures(self, number: int) -> dict[str, Any]:
        """The figures of a chapter that is ready. Raises `Damaged` if the file is not what was written."""
        found = chapter_figures(self.place, number)
        if self._judged:
            found["divergence"] = _judgement(_folder(self.place, number)).divergence
        return found

    def read(self, documents: Sequence[int]) -> NDArray[np.float32]:
        """The sampler's log p in nats and the advantage of these documents' targets, in order: (targets, 2)."""
        rows = [np.zeros((0, 2), np.float32)]
        for number in documents:
            data, every = self._columns(number // _NUMBERS)
            begin, end = data.offsets[number % _NUMBERS :][:2]
            rows.append(every[begin:end])
        found = np.concatenate(rows)
        return found[~np.isnan(found[:, 0])]

    def forget_before(self, number: int) -> None:
        """Remove the chapters before this one, except their samples. Nobody will train on these chapters again."""
        old = layout.dataset(layout.chapter_of_rollouts(number))
        every = self.place.list(old.partition("/")[0] + "/")
        gone = [entry.key for entry in every if entry.key < old and "/samples-" not in entry.key]
        # Remove the manifests first: a folder without one is no chapter.
        for key in sorted(gone, key=lambda key: not key.endswith(MANIFEST)):
            self.place.delete(key)

    def _open(self, number: int) -> Dataset:
        """Open the chapter. Raises `NotFound` until it is ready, so that nobody reads an unfinished chapter ahead."""
        if not self.is_ready(number):
            raise NotFound(f"{self.place.uri} has not yet all of {layout.chapter_of_rollouts(number)}.")
        data = open_dataset(self.place, layout.chapter_of_rollouts(number))
        return replace(data, first_document=number * _NUMBERS)

    def _read_columns(self, chapter: int) -> tuple[Dataset, NDArray[np.float32]]:
        data = self.chapters.get(chapter)
        file = data.manifest.shards[0].columns_file
        assert file is not None
        every = data.reads.patiently(lambda: reader(data.store, _COLUMNS)(file))
        if self._judged:
            judged = data.reads.patiently(lambda: reader(data.store, _LOG_P)(_judgement(data.store).file))
            every, targets = every.copy(), ~np.isnan(every[:, 0])
            every[targets, 1] = judged - every[targets, 0]
        return data, every
