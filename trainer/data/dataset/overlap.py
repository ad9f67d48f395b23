"""Finds documents of an evaluation set that the run also trains on. A loss over these measures memorisation.

A compilation keeps an 8-byte hash of each document's tokens. So the same text counts as the same document in any file,
and whichever of its tokens are trained. Two sets are compared once, and the result is kept beside the training data.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.dataset import HASH, reader
from trainer.data.dataset.manifest import Count, DatasetManifest, SealedRecord, read_manifest, read_record
from trainer.errors import Damaged, DataError, NotFound
from trainer.run import layout
from trainer.store.store import Store

_REFUSED_SHARE = 0.9
"""So large a share means that the set is the training data, or a part of it."""
_SAID_SHARE = 0.01


class Overlap(SealedRecord):
    """How many documents of an evaluation set are also training documents, out of all its documents.

    Only training data that is already compiled is compared.
    """

    shared: Count
    documents: Count
    chapters: Count

    @property
    def share(self) -> float:
        return self.shared / max(1, self.documents)


def refuse_overlaps(store: Store, train: str, evaluated: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each set that shares documents with the training data, and a sentence about it.

    `train` and `evaluated` are fingerprints.

    Raises:
        DataError: a set is the training data, or a part of it.
    """
    for name, key in evaluated.items():
        found = overlap_of(store, train, key)
        if found is None or found.share < _SAID_SHARE:
            continue
        what = f"{found.shared:,} of {found.documents:,} documents ({found.share:.0%}) are in the training data, too"
        if found.share >= _REFUSED_SHARE:
            where = "data.eval" if name == "eval" else name
            raise DataError(
                f"{where}: {what}, so its loss would tell what was learnt by heart. Give other data, or data.held_out:"
                " 0.01 to take some of the training data out."
            )
        yield name, f"{what}: its loss is better than that of other text"


def overlap_of(store: Store, train: str, evaluated: str) -> Overlap | None:
    """The documents that two compiled sets share. None if one set has no hashes; sampled answers have none."""
    manifest = read_manifest(store, train, chapter=0)
    chapters = 1 + max(shard.chapter for shard in manifest.shards)
    folder, key = store.sub(layout.dataset(train)), f"overlap-{evaluated}.json"
    try:
        kept = read_record(Overlap, folder, key)
        if kept.chapters == chapters:
            return kept
    except (NotFound, Damaged):  # what is damaged is counted again
        pass
    ordered = document_hashes(store, evaluated)
    if ordered is None or any(shard.hashes_file is None for shard in manifest.shards):
        return None
    found = np.zeros(len(ordered), np.bool_)
    for trained in _hashes(store, train, manifest):  # one shard at a time is in memory
        found |= np.isin(ordered, trained)
    overlap = Overlap(shared=int(found.sum()), documents=len(found), chapters=chapters)
    folder.put(key, overlap.sealed())
    return overlap


def document_hashes(store: Store, fingerprint: str) -> NDArray[np.uint64] | None:
    """The hashes of a compiled set's documents, (documents,). None if it has no hashes."""
    manifest = read_manifest(store, fingerprint)
    found = list(_hashes(store, fingerprint, manifest))
    return np.concatenate(found) if len(found) == len(manifest.shards) > 0 else None


def _hashes(store: Store, fingerprint: str, manifest: DatasetManifest) -> Iterator[NDArray[np.uint64]]:
    """Yield the hashes of the documents of each shard."""
    read = reader(store.sub(layout.dataset(fingerprint)), HASH)
    for shard in manifest.shards:
        if shard.hashes_file is not None:
            yield read(shard.hashes_file)
