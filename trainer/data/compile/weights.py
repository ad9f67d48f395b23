"""Finds out whether a run's rows say themselves what is trained of them, before anything is compiled.

Earlier versions ignored such words: the `weight` of a message, its `train`, and those of parts of a content. Data that they compiled of
rows without them is as good as ever, and found under its old fingerprint; other data gets another one. So the rows have to be looked
through once. It takes a small part of what compiling takes, and its result is kept beside the data.
"""

from collections.abc import Callable, Sequence

from trainer.data.dataset.manifest import Record, unsealed
from trainer.data.format.messages import MASKS, is_masked
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import batches
from trainer.errors import Damaged, DataError, NotFound
from trainer.run import layout
from trainer.store.store import Store

# Versions that knew fewer of these words kept their answer under other names.
_KEY = "masks.json"


class Weights(Record):
    """Whether the data set in whose folder this lies has messages with weights, and therefore another name."""

    weighted: bool


def kept_weights(store: Store, fingerprint: str) -> bool | None:
    """The answer that was kept for the data of this fingerprint, the one without weights; None if there is none."""
    folder = store.sub(layout.dataset(fingerprint))
    try:
        return unsealed(Weights, folder.get(_KEY), f"{folder.uri}/{_KEY}").weighted
    except (NotFound, Damaged):
        return None


def keep_weights(store: Store, fingerprint: str, weighted: bool) -> None:
    store.sub(layout.dataset(fingerprint)).put(_KEY, Weights(weighted=weighted).sealed())


def find_weights(files: Sequence[SourceFile], progress: Callable[[int], None]) -> bool:
    """Whether any message of any row says what is trained of it; `progress` gets the bytes of the files read so far.

    Raises:
        DataError: a file as a whole is damaged.
    """
    before = 0

    def skip(error: DataError) -> None:
        """Whether bad rows matter is told when they are compiled."""

    for file in files:
        form = file.form
        if form is None or form.kind != "chat":
            continue
        for batch in batches(file):
            if any(is_masked(form.messages(row)) for _, row in batch.with_key(*MASKS).rows(skip)):
                return True
            progress(before + batch.read)
        before += file.size
    return False
