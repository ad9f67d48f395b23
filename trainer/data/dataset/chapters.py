"""Opens the chapters of a data set shortly before they are read, and waits for those that are not compiled yet.

The process that compiles them owns the ranks (launcher/drive/driver.py). If it cannot go on, it leaves the reason in
the run's folder. If it is killed, the ranks end with it. So a wait needs neither a time limit nor a heartbeat.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

from trainer.data.dataset.dataset import Dataset, Reads, open_chapter
from trainer.data.dataset.manifest import read_manifest
from trainer.errors import CapstanError, Damaged, DataError, NotFound, Stopped
from trainer.run import layout
from trainer.store.store import Store, read_twice

LOOK_SECONDS = 2.0
# The previous chapter, the one in use, and those in which the windows that are read ahead may lie.
_OPEN = 4


class Chapters:
    """`count` chapters. `open_chapter` opens one, or raises `NotFound` until it is compiled.

    At most four are kept open. `given_up` returns the reason once no more of them will be compiled. `reads` counts
    repeated reads.
    """

    def __init__(
        self,
        count: int,
        open_chapter: Callable[[int], Dataset],
        given_up: Callable[[], CapstanError | None] = lambda: None,
        reads: Reads | None = None,
    ) -> None:
        self.count, self.reads = count, reads or Reads()
        self._needed: list[int] = []
        self._uncompiled: set[int] = set()
        self._open_chapter, self._given_up = open_chapter, given_up
        self._news = threading.Event()
        self._pool = ThreadPoolExecutor(_OPEN, "chapters")
        self._opening = lru_cache(maxsize=_OPEN)(self._open)

    def get(self, chapter: int) -> Dataset:
        """The chapter. Waits until it is compiled, however long that takes.

        Raises:
            DataError, Stopped: it will not be compiled.
            StorageError: it cannot be read, or is damaged.
        """
        self._needed.append(chapter)
        try:
            return self._opening(chapter).result()
        finally:
            self._needed.remove(chapter)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for a chapter that is not compiled yet."""
        return not self._uncompiled.isdisjoint(self._needed)

    def has(self, chapter: int) -> bool:
        """Whether `get` would return at once. If not, the chapter is opened in the background."""
        opening = self._opening(chapter)
        return opening.done() and opening.exception() is None

    def close(self) -> None:
        """End all waits, also those for a store that is out of reach. Nobody needs the chapters any more."""
        self.reads.over.set()
        self._news.set()

    def look(self) -> None:
        """Make all waits check again now, because a chapter was just committed."""
        self._news.set()
        self._news.clear()

    def _open(self, chapter: int) -> Future[Dataset]:
        return self._pool.submit(self._wait_for, chapter)

    def _wait_for(self, chapter: int) -> Dataset:
        while True:
            error = self.reads.patiently(self._given_up)  # first, so that all ranks agree: no chapter comes after it
            try:
                data = self.reads.patiently(lambda: self._open_chapter(chapter))
            except NotFound:
                if error is not None:
                    raise error from None
                self._uncompiled.add(chapter)
            else:
                self._uncompiled.discard(chapter)
                return replace(data, reads=self.reads)
            self._news.wait(LOOK_SECONDS)
            if self.reads.over.is_set():
                raise CancelledError


def whole(dataset: Dataset) -> Chapters:
    """The data set as one chapter. Evaluation reads a set in this way, whatever chapters it was compiled in."""
    return Chapters(1, lambda _: dataset, reads=dataset.reads)


def open_chapters(store: Store, fingerprint: str, folder: Store) -> Chapters:
    """The chapters of a data set for the ranks of `folder`. The first one must be compiled."""
    count = read_manifest(store, fingerprint, chapter=0).chapters
    return Chapters(count, partial(open_chapter, store, fingerprint), lambda: given_up(folder))


def give_up(folder: Store, error: BaseException) -> None:
    """Tell the ranks of `folder`, which may be waiting, that no more of its data will be compiled or sampled."""
    reason = {"reason": str(error), "stopped": isinstance(error, Stopped)}
    folder.put(layout.NO_MORE_DATA, json.dumps(reason).encode())


def forget_given_up(folder: Store) -> None:
    """Clear what an earlier start left with `give_up`, because the data is compiled or sampled again now."""
    folder.delete(layout.NO_MORE_DATA)


@read_twice
def given_up(folder: Store) -> CapstanError | None:
    """The reason why no more of the folder's data will come. None if more may come."""
    try:
        given = json.loads(folder.get(layout.NO_MORE_DATA))
        return (Stopped if given["stopped"] else DataError)(given["reason"])
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{folder.uri}/{layout.NO_MORE_DATA} is damaged: it does not say why the data ends.") from error
