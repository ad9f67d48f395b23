"""Reads the pictures of the documents of a rank's rows, and makes what the class takes of them.

Pictures are read in the order of the rows, ahead of the step that needs them, within a budget of bytes. Threads do it
for the first documents. A run that goes on gets worker processes, which leave the rank's Python to the training. They
need seconds to start, and nobody waits for that.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.base.find.media import Shown
from trainer.base.find.processor import Processor
from trainer.data.dataset.features import FeatureFiles, pictures_key
from trainer.data.dataset.pictures import PictureFiles, entries_in
from trainer.data.format.known.pictures.sources import pictured
from trainer.errors import DoesNotFit, StorageError, first_line
from trainer.model.micro_batch import Seen
from trainer.processes import children
from trainer.servers import Pictured
from trainer.store.store import Store, open_store

_THREADS = 8
# The documents with pictures that threads read before worker processes start.
_BEFORE_PROCESSES = 256
# The first guess of the bytes that the processor makes for each token of a picture.
_BYTES_A_TOKEN = 16 * 2**10

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Document:
    """A document's pictures on their way: the number of its `segment` in the row, and the bytes that they may take."""

    segment: int
    inputs: Future[Inputs]
    estimate: int
    key: str


class Coming:
    """The pictures of a row on their way."""

    def __init__(self, reader: "PictureReader", documents: Sequence[_Document]) -> None:
        self._reader, self._documents = reader, documents

    def arrived(self) -> tuple[Seen, ...]:
        """The pictures, once all have been read. They count no longer as read ahead.

        Raises `StorageError` if a picture cannot be read, or is not what was compiled.
        """
        try:
            return tuple(Seen(one.segment, one.inputs.result(), one.key) for one in self._documents)
        except BrokenProcessPool as error:
            raise DoesNotFit(
                "a process that reads pictures was killed, as happens when the machine's memory runs out. Free some, or"
                " lower data.images.read_ahead."
            ) from error
        finally:
            self._reader.taken(sum(one.estimate for one in self._documents))


class PictureReader:
    """Reads the pictures of a compiled data set in `folder`, and gives them to the base's `processor`.

    It has room for more while it holds less than `budget` bytes. `again` makes the processor in each of up to
    `processes` worker processes; without any, threads read all pictures."""

    def __init__(
        self,
        folder: Store,
        processor: Processor,
        budget: int = 0,
        processes: int = 0,
        again: Callable[[], Processor] | None = None,
        before_processes: int = _BEFORE_PROCESSES,
    ) -> None:
        self._processor = processor
        self._read: Callable[[NDArray[np.void], NDArray[np.int32], int], Inputs]
        self._read = _Reading(PictureFiles(folder), processor)
        self._budget, self._held, self._lock = budget, 0, Lock()
        self._each = _BYTES_A_TOKEN
        self._threads = ThreadPoolExecutor(_THREADS, "pictures")
        self.workers: ProcessPoolExecutor | None = None
        self._left = before_processes
        # Other processes have other memories, and so other stores in memory.
        self._start: Callable[[], ProcessPoolExecutor] | None = None
        if again is not None and processes > 0 and not folder.uri.startswith("memory://"):
            self._start = partial(_started, processes, folder.uri, again)

    def over(self, features: FeatureFiles) -> None:
        """Read features that are kept, from now on, and no picture."""
        self._read, self._start = _Kept(features, self._processor), None

    def leave_out(self, known: Callable[[str], bool]) -> None:
        """Read no pictures of documents whose features are `known` by their key. They have no inputs."""
        plain = self._read
        self._read = lambda entries, *text: {} if known(pictures_key(entries)) else plain(entries, *text)
        self._start = None

    @property
    def has_room(self) -> bool:
        return self._held < self._budget

    @property
    def reads_prompts(self) -> bool:
        """Whether the class must be told of each document which of its tokens are before its answer."""
        return self._processor.reads_prompts

    def begin(
        self,
        values: NDArray[Any],
        segments: Sequence[int],
        ids: Sequence[NDArray[np.int32]],
        prompts: Sequence[int],
    ) -> Coming:
        """Begin to read the pictures of a row.

        `values` (pictures, bytes) are their entries, and `segments` (pictures,) the numbers of the row's segments that
        they are in, ascending. `ids` are the tokens of each segment, and `prompts` how many of them are before its
        answer.
        """
        entries = entries_in(values)
        numbers, begins = np.unique(np.array(segments, np.int64), return_index=True)
        wanted = dict(zip(numbers.tolist(), np.split(entries, begins)[1:], strict=True))
        documents = [self._submit(number, own, ids[number], prompts[number]) for number, own in wanted.items()]
        if self.reads_prompts:
            others = (number for number in range(len(ids)) if number not in wanted)
            documents += [self._without(number, ids[number], prompts[number]) for number in others]
        return Coming(self, documents)

    def _without(self, segment: int, ids: NDArray[np.int32], prompt: int) -> _Document:
        """A document without pictures, of whose tokens the class is told all the same."""
        inputs = Future[Inputs]()
        inputs.set_result(self._processor.token_types(ids.tolist(), prompt))
        return _Document(segment, inputs, 0, "")

    def _submit(self, segment: int, entries: NDArray[np.void], ids: NDArray[np.int32], prompt: int) -> _Document:
        estimate = int(entries["tokens"].sum()) * self._each
        with self._lock:
            self._held += estimate
        self._left -= 1
        if self._left < 0 and self.workers is None and self._start is not None:
            self.workers = self._start()
        if self.workers is None:
            inputs = self._threads.submit(self._read, entries, ids, prompt)
        else:
            raw = self.workers.submit(_read_in_worker, entries, ids, prompt)
            inputs = self._threads.submit(lambda: _as_tensors(raw.result()))
        inputs.add_done_callback(lambda done: self._learn(done, entries))
        return _Document(segment, inputs, estimate, pictures_key(entries))

    def _learn(self, done: Future[Inputs], entries: NDArray[np.void]) -> None:
        """Estimate the next pictures by what these have taken."""
        if not done.cancelled() and done.exception() is None and (made := done.result()):  # none if left out
            taken = sum(value.nbytes for value in made.values())
            self._each = max(1, taken // max(1, int(entries["tokens"].sum())))

    def taken(self, estimate: int) -> None:
        with self._lock:
            self._held -= estimate


class _Reading:
    """Reads, checks and decodes the pictures of a document, and makes the inputs of its class."""

    def __init__(self, files: PictureFiles, processor: Processor) -> None:
        self._files, self._processor = files, processor

    def __call__(self, entries: NDArray[np.void], ids: NDArray[np.int32], prompt: int) -> Inputs:
        try:
            files = _shown(self._files, self._processor, entries)
            lacks = self._processor.lacks(tuple(one.shape for one in files), ids)
            made = self._processor.inputs(files, ids.tolist(), prompt)
        except StorageError:
            raise
        except Exception as error:  # a decoder or a processor may raise any error
            raise self._files.unfit(f"they cannot be read as when it was compiled ({first_line(error)})") from error
        if lacks:
            raise self._files.unfit(f"its text has {abs(lacks)} tokens too {'few' if lacks > 0 else 'many'} for them")
        return made


class ServedPictures:
    """Makes prompts for a server of documents with pictures of a data set in `folder`."""

    def __init__(self, folder: Store, processor: Processor) -> None:
        self._files, self._processor = PictureFiles(folder), processor

    def prompt(self, entries: NDArray[np.void], ids: list[int]) -> Pictured:
        """The document of tokens `ids` with the pictures `entries`, as they go to the processor.

        Raises `DataError` if a server cannot get them."""
        texts, spans, done = list[str](), list[range](), 0
        for one in entries:
            begin = int(one["begin"])
            texts.append(self._processor.decode(ids[done:begin]))
            done = begin + int(one["tokens"])
            spans.append(range(begin, done))
        texts.append(self._processor.decode(ids[done:]))
        files = _shown(self._files, self._processor, entries)
        return pictured(ids, spans, texts, files, self._processor)


def _shown(files: PictureFiles, processor: Processor, entries: NDArray[np.void]) -> list[Shown]:
    """The files of these entries as the base's processor gets them."""
    kept = [files.kept(one) for one in entries]
    read = map(files.read, entries)
    return [own.modality.shown(content, own, processor.made) for own, content in zip(kept, read, strict=True)]


class _Kept:
    """Reads the kept features of a document's pictures, in the place of what would be made of these."""

    def __init__(self, features: FeatureFiles, processor: Processor) -> None:
        self._features, self._processor = features, processor

    def __call__(self, entries: NDArray[np.void], ids: NDArray[np.int32], prompt: int) -> Inputs:
        kept = self._features.read(pictures_key(entries), self._processor.names)
        return {**kept, **self._processor.token_types(ids.tolist(), prompt)}


def _started(processes: int, uri: str, again: Callable[[], Processor]) -> ProcessPoolExecutor:
    with children.spawned_apart():
        return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (uri, again))


_worker: _Reading | None = None


def _start_worker(uri: str, again: Callable[[], Processor]) -> None:
    global _worker
    children.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides what it means
    os.nice(5)  # the rank comes first
    torch.set_num_threads(1)
    _worker = _Reading(PictureFiles(open_store(uri)), again())
    gc.freeze()


def _read_in_worker(entries: NDArray[np.void], ids: NDArray[np.int32], prompt: int) -> dict[str, tuple[Any, str]]:
    """The inputs as numpy's arrays: tensors would travel through the machine's shared memory, of which containers often
    have little."""
    assert _worker is not None
    return {name: (_bits(value), str(value.dtype)) for name, value in _worker(entries, ids, prompt).items()}


def _bits(value: torch.Tensor) -> NDArray[Any]:
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def _as_tensors(given: Mapping[str, tuple[NDArray[Any], str]]) -> Inputs:
    return {
        name: torch.from_numpy(value).view(torch.bfloat16) if dtype == "torch.bfloat16" else torch.from_numpy(value)
        for name, (value, dtype) in given.items()
    }
