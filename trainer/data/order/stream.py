"""Gives each rank its part of every global step, as packed rows.

A global step takes the next `global_batch` bins of the epoch's plan. Arithmetic alone assigns them to ranks, so the
documents of a step never depend on the number of ranks, and a position is four integers.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.base.base import Base
from trainer.base.find.processor import read_processor
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.dataset.chapters import Chapters, whole
from trainer.data.dataset.dataset import (
    DESIRED_BIT,
    ID_BITS,
    MISMATCHED_BIT,
    REJECTED_BIT,
    SEGMENT_BITS,
    SHARED_BIT,
    TARGET_BIT,
    Dataset,
)
from trainer.data.dataset.manifest import ColumnRecord
from trainer.data.dataset.pictures import entries_in
from trainer.data.dataset.rollouts import Rollouts
from trainer.data.dataset.taught import StoredTeacher
from trainer.data.format.row_format import COUNTED, PICTURES
from trainer.data.order.order import EpochPlan, Window, nothing_visited, turns
from trainer.data.order.settings import Order, Position, eval_order, train_order
from trainer.model.head import IGNORE
from trainer.model.micro_batch import ColumnValues, MicroBatch, ModelInput, Role, Segments
from trainer.processes.devices import picture_readers
from trainer.store.store import Store

if TYPE_CHECKING:  # it reads pictures with Pillow, which runs of text do not need
    from trainer.data.order.pictures import Coming, PictureReader

WINDOWS_AHEAD = 2
_LOOK_SECONDS = 5.0
# Any id works: padding is a segment of its own and has no targets.
PAD = 0


# A window: its epoch, the place of its chapter in the order of the epoch, and its number in the chapter.
WindowPlace = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of the documents of a window.

    `values` are those of all documents; `offsets` (documents + 1,) say where each document's values begin.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A window in memory: the `tokens` of its documents, in the plan's order.

    `offsets` (documents + 1,) say where each document begins. `numbers` are the documents' numbers in the whole data
    set, and `columns` the values beside their tokens.
    """

    plan: Window
    numbers: NDArray[np.int64]
    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    columns: Mapping[str, _Column]


@dataclass(eq=False)
class Stream:
    """One rank's view of a data set, chapter by chapter, in one order.

    `accumulation`, a rank's micro-batches in a step, is global_batch / (world_size * micro_batch), rounded up. The
    stream holds the window in use and the two after it, which it reads in the background, and for a moment the one
    before: at most 4 x 64 MiB of tokens, unless single documents are longer than a block. It reads nothing ahead beyond
    `epochs`.

    With `parts`, groups of so many consecutive ranks share their rows: each rank gets a slice of every row of its
    group.

    Four attributes may be set before the first step is read. `reference` is (documents, answers) fp32 of the whole
    data set, from which each row gets its values. `teacher` gives each row the teacher's predictions of its targets.
    With `rollouts` a step is one chapter, with as many rows as the chapter has. `pictures` reads the pictures of the
    documents of this rank's rows.
    """

    chapters: Chapters
    order: Order
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    epochs: int | None = None
    parts: int = 1
    reference: NDArray[np.float32] | None = None
    teacher: StoredTeacher | None = None
    rollouts: Rollouts | None = None
    pictures: "PictureReader | None" = None
    updates: int = 1  # that learn from a chapter

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        assert self.world_size % self.parts == 0
        # Ranks that share their rows form a group. It takes the bins that a single rank would take.
        self._group, self._part = divmod(self.rank, self.parts)
        self._groups = self.world_size // self.parts
        self.accumulation = -(-self.global_batch // (self._groups * self.micro_batch))
        self._stored: dict[str, ColumnRecord] = {}  # columns, which are the same in all chapters
        self._padding = np.full(self.order.capacity, PAD, np.uint32)
        self._numbers = np.arange(self.micro_batch * self.order.capacity, dtype=np.int32)
        # The windows ahead may be of the next chapter or epoch.
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._windows = _ReadAhead(self._load, self._next_window)

    def step(self, position: Position) -> list[MicroBatch]:
        """This rank's micro-batches of the global step that begins at `position`.

        There are always `accumulation` of them, or with rollouts as many as the chapter needs. Bin b of the step
        belongs to rank (b // micro_batch) % world_size. At the end of an epoch, or with more ranks than bins, rows are
        empty: all padding, no targets.

        Raises:
            StorageError: the data cannot be read, or is not what was written.
        """
        return [row.complete() for row in self._packed(self._take(position)[0])]

    def advance(self, position: Position) -> Position:
        """The place where the next global step begins. After an epoch's last bin that is the next epoch's first."""
        return self._take(position)[1]

    def read_from(
        self,
        position: Position,
        compiling: Callable[[bool], None] = lambda awaited: None,
        steps: int | None = None,
        skipped: Collection[Position] = (),
    ) -> Generator[list[MicroBatch], None, None]:
        """Yield every step from `position` on, without end. Reads the next step while the caller works on this one, and
        pictures of more steps as far as the reader of pictures has room.

        Nothing is read ahead beyond so many `steps`. Those at the positions `skipped` are not counted and have no
        pictures, because nothing is trained with them.

        Calls `compiling(True)` every five seconds while the caller waits for a chapter that is not compiled yet. Once
        it is compiled, calls `compiling(False)` if the step's data takes longer.

        Raises:
            DataError, Stopped: on every rank at the same step, for a chapter that will not be compiled.
        """
        place, given = position, 0

        def pack() -> tuple[list[_Row], bool]:
            nonlocal place
            bins, following = self._take(place)
            trained = place not in skipped
            rows = self._packed(bins, blind=not trained)
            place = following
            return rows, trained

        with ThreadPoolExecutor(1, "next-step") as pool:
            ahead = deque[Future[tuple[list[_Row], bool]]]()
            try:
                while True:
                    if not ahead:
                        ahead.append(pool.submit(pack))
                    awaited = False
                    while not wait([ahead[0]], _LOOK_SECONDS).done:
                        before, awaited = awaited, self.chapters.awaited
                        if before or awaited:
                            compiling(awaited)
                    rows, trained = ahead.popleft().result()
                    given += trained
                    # Each step that is read lets the pictures be one step more ahead, until there is no more room.
                    for _ in range(2):
                        due = steps is None or given + len(ahead) < steps
                        if due and (not ahead or (self.pictures is not None and self.pictures.has_room)):
                            ahead.append(pool.submit(pack))
                    yield [row.complete() for row in rows]
            finally:
                self.chapters.close()

    def epoch(self, epoch: int) -> Iterator[list[MicroBatch]]:
        """Yield every step of one epoch. All ranks get the same number of steps and of micro-batches."""
        position = Position(epoch)
        while position.epoch == epoch:
            yield self.step(position)
            position = self.advance(position)

    def padding(self) -> MicroBatch:
        """A row without documents, for a rank that has fewer rows than others."""
        return self._pack([]).complete()

    def _packed(self, bins: list[Position], *, blind: bool = False) -> "list[_Row]":
        """This rank's rows of the bins of a step. A `blind` step has no pictures."""
        rows, share = list[_Row](), self._groups * self.micro_batch
        for micro in range(-(-len(bins) // share) if self.rollouts else self.accumulation):
            first = (micro * self._groups + self._group) * self.micro_batch
            rows.append(self._pack(bins[first : first + self.micro_batch], blind=blind))
        return rows

    def _take(self, position: Position) -> tuple[list[Position], Position]:
        """The bins of the step that begins at `position`, and where the next step begins."""
        epoch, chapter, window, place = position.epoch, position.chapter, position.window, position.bin
        if self.rollouts is not None:
            plan = self._plan(epoch, chapter)
            whole_chapter = [
                Position(epoch, window, k, chapter)
                for window in range(plan.num_windows)
                for k in range(plan.window(window).num_bins)
            ]
            # Several updates may learn from one chapter. `place` counts the finished ones.
            if place + 1 < self.updates:
                return whole_chapter, Position(epoch, bin=place + 1, chapter=chapter)
            return whole_chapter, Position(epoch, chapter=chapter + 1)
        taken: list[Position] = []
        # A full step does not wait for the next chapter.
        while chapter < self.chapters.count and len(taken) < self.global_batch:
            plan = self._plan(epoch, chapter)
            while window < plan.num_windows:
                end = min(plan.window(window).num_bins, place + self.global_batch - len(taken))
                taken += (Position(epoch, window, k, chapter) for k in range(place, end))
                if end < plan.window(window).num_bins:
                    return taken, Position(epoch, window, end, chapter)
                window, place = window + 1, 0
            chapter, window = chapter + 1, 0
        if chapter < self.chapters.count:
            return taken, Position(epoch, chapter=chapter)
        if not taken and position == Position(epoch):
            raise nothing_visited(epoch, self.order)
        # Without weights, the last chapters of the epoch have nothing to visit.
        return (taken, Position(epoch + 1)) if taken else self._take(Position(epoch + 1))

    def _chapter(self, epoch: int, turn: int) -> int:
        return turns(self.chapters.count, self.order.seed, epoch)[turn]

    def _make_plan(self, epoch: int, turn: int) -> EpochPlan:
        data = self.chapters.get(self._chapter(epoch, turn))
        self._stored = {name: column.record for name, column in data.columns.items()}
        return EpochPlan(data.offsets, data.blocks, data.block_sources, self.order, epoch, turn)

    def _next_window(self, place: WindowPlace) -> WindowPlace | None:
        """The next window to prefetch, or None. Never blocks on an uncompiled chapter."""
        epoch, turn, window = place
        if not self.chapters.has(self._chapter(epoch, turn)):
            return None
        if window + 1 < self._plan(epoch, turn).num_windows:
            return epoch, turn, window + 1
        if turn + 1 < self.chapters.count:
            return epoch, turn + 1, 0
        return None if epoch + 1 == self.epochs else (epoch + 1, 0, 0)

    def _load(self, place: WindowPlace) -> _Loaded:
        epoch, turn, window = place
        data = self.chapters.get(self._chapter(epoch, turn))
        plan = self._plan(epoch, turn).window(window)
        lengths = data.offsets[plan.documents + 1] - data.offsets[plan.documents]
        blocks = data.read(plan.blocks)
        tokens, offsets = blocks.gather(plan.documents), np.concatenate([[0], np.cumsum(lengths)])
        columns = dict[str, _Column]()
        for name in data.columns:
            values = blocks.gather_column(name, plan.documents)
            columns[name] = _Column(np.concatenate(values), np.cumsum([0, *map(len, values)]))
        if positions := self.order.reserved:
            for name, column in columns.items():
                if data.columns[name].record.per == "token":
                    places = np.repeat(_begins(tokens, offsets), positions)
                    filled = np.insert(column.values, places, 0, axis=0)
                    columns[name] = _Column(filled, reserve(tokens, offsets, positions)[1])
            tokens, offsets = reserve(tokens, offsets, positions)
        return _Loaded(plan, plan.documents + data.first_document, tokens, offsets, columns)

    def _lay(self, bins: list[Position]) -> "_Laid":
        """Lay bins end to end, each padded to its capacity. Missing bins are padding."""
        pieces: list[NDArray[np.uint32]] = []
        starts: list[int] = []  # of the documents so far
        ends: list[int] = []  # of the segments so far
        documents: list[int] = []
        columns = {name: list[NDArray[Any]]() for name in self._stored}
        length, padding = self.order.capacity, 0
        for row in range(self.micro_batch):
            room = length
            if row < len(bins):
                loaded = self._windows.get((bins[row].epoch, bins[row].chapter, bins[row].window))
                first, last = loaded.plan.borders[bins[row].bin : bins[row].bin + 2].tolist()
                begin, end = loaded.offsets[[first, last]].tolist()
                pieces.append(loaded.tokens[begin:end])
                starts += (loaded.offsets[first:last] + (row * length - begin)).tolist()
                ends += (loaded.offsets[first + 1 : last + 1] + (row * length - begin)).tolist()
                documents += loaded.numbers[first:last].tolist()
                for name, column in loaded.columns.items():
                    columns[name].append(column.values[slice(*column.offsets[[first, last]].tolist())])
                room -= end - begin
            for name, record in self._stored.items():
                rows = room if record.per == "token" else 0
                columns[name].append(np.zeros((rows, *record.shape), record.dtype))
            if room:
                pieces.append(self._padding[:room])
                ends.append((row + 1) * length)
                padding += room
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        return _Laid(np.concatenate(pieces), np.array(starts, np.int64), ends, documents, joined, padding)

    def _pack(self, bins: list[Position], *, blind: bool = False) -> "_Row":
        """The row of these bins, with what the model and the objective get of its documents."""
        stored, starts, ends, documents, columns, padding = self._lay(bins)
        input_ids = (stored & ID_BITS).view(np.int32)
        segments = _segments(stored, starts, ends)
        begun, answers = stored[starts], len(segments.lengths) - segments.roles.count(Role.PADDING)
        prefixes = np.array([tokens for _, tokens in segments.prefixes] or 0, np.int32)
        before = np.array(segments.borders[:-1], np.int32) - prefixes
        positions = self._numbers[: len(stored)] - np.repeat(before, np.array(segments.lengths))
        found: dict[str, tuple[Any, NDArray[Any]]] = {"desired": ("document", (begun & DESIRED_BIT).astype(np.bool_))}
        found |= {name: (self._stored[name].per, values) for name, values in columns.items()}
        if self.reference is not None:
            found["reference"] = ("document", self.reference[documents])
        if self.teacher is not None:
            taught = self.teacher.read(documents)
            found |= {"teacher_ids": ("target", taught.ids), "teacher_log_p": ("target", taught.log_p)}
        if self.rollouts is not None:
            found["sampled"] = ("target", self.rollouts.read(documents))
        given = ModelInput.of(torch.from_numpy(input_ids)[None], torch.from_numpy(positions)[None], segments)
        seen = None
        reads_prompts = self.pictures is not None and self.pictures.reads_prompts
        if COUNTED in found and (reads_prompts or found[COUNTED][1].any()) and not blind:
            assert self.pictures is not None, "the rows have pictures, and nothing was given to read them"
            counts, values = (found[name][1] for name in (COUNTED, PICTURES))
            begins = np.repeat(starts, counts) + entries_in(values)["begin"]
            numbers = np.searchsorted(np.array(segments.borders), begins, side="right") - 1
            each = np.split(stored, segments.borders[1:-1])
            ids = np.split(input_ids, segments.borders[1:-1])
            seen = self.pictures.begin(values, numbers.tolist(), ids, [tokens_before_answer(one) for one in each])
        row = MicroBatch(
            given,
            labels=torch.from_numpy(_labels(stored, input_ids))[None],
            tokens=len(stored) - padding - answers * self.order.reserved,
            targets=int(np.count_nonzero(stored >= TARGET_BIT)),
            bins=tuple(bins),
            documents=tuple(documents),
            columns={name: ColumnValues(per, torch.from_numpy(values)) for name, (per, values) in found.items()},
        )
        return _Row(row, self._part, self.parts, seen)


class _Laid(NamedTuple):
    """Bins laid end to end: their `stored` tokens (uint32), of which `padding` belong to no document.

    `starts` are the places of the documents, int64, and `ends` those behind their segments and behind padding.
    `documents` are the documents' numbers in the whole data set, and `columns` the values beside their tokens.
    """

    stored: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: list[int]
    documents: list[int]
    columns: dict[str, NDArray[Any]]
    padding: int


@dataclass(frozen=True, eq=False)
class _Row:
    """A packed row, of which the rank gets the slice `part` of `parts`. Its pictures may still be on their way."""

    row: MicroBatch
    part: int
    parts: int
    seen: "Coming | None" = None

    def complete(self) -> MicroBatch:
        """The row, or the rank's slice of it, with its pictures. Raises `StorageError` if one cannot be read."""
        row = self.row
        if self.seen is not None:
            row = replace(row, input=replace(row.input, seen=self.seen.arrived()))
        return row if self.parts == 1 else row.cut(self.part, self.parts)


def reserve(
    tokens: NDArray[np.uint32], offsets: NDArray[np.int64], positions: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Put `positions` untrained positions before each document, and before the second answer of a document with two.

    `tokens` holds the documents end to end. `offsets` (documents + 1,) say where each begins and where the last ends.
    """
    marks, starts = REJECTED_BIT | DESIRED_BIT | MISMATCHED_BIT, _begins(tokens, offsets)
    reserved = np.full((len(starts), positions), PAD, np.uint32)
    reserved[:, 0] |= tokens[starts] & marks  # the answer begins here now
    tokens = np.insert(tokens & ~marks, np.repeat(starts, positions), reserved.ravel())
    return tokens, offsets + positions * np.searchsorted(starts, offsets)


def _begins(tokens: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first token of each document, and of the second answer of each document with two."""
    second = np.flatnonzero(tokens & (REJECTED_BIT | MISMATCHED_BIT))
    return np.sort(np.concatenate([offsets[:-1], second]))


def tokens_before_answer(stored: NDArray[np.uint32]) -> int:
    """The tokens of a segment before its first target. All, if it has none."""
    targets = np.flatnonzero(stored & TARGET_BIT)
    return int(targets[0]) if len(targets) else len(stored)


def _segments(stored: NDArray[np.uint32], starts: NDArray[np.int64], ends: list[int]) -> Segments:
    """The segments of a row. Its documents begin at `starts`; documents and padding end at `ends`.

    A second answer begins inside its document, and so does every answer that shares the document's prompt.
    """
    inside = np.flatnonzero(stored & SEGMENT_BITS)
    borders = np.sort(np.array([0, *ends, *inside], np.int64))
    firsts = stored[borders[:-1]]
    roles = np.full(len(firsts), Role.PADDING)
    roles[np.searchsorted(borders, starts)] = Role.DOCUMENT
    # The bit of a role wins over that of a shared prompt, because the prefix already records the sharing.
    bits = ((SHARED_BIT, Role.ALTERNATIVE), (MISMATCHED_BIT, Role.MISMATCHED), (REJECTED_BIT, Role.REJECTED))
    for bit, role in bits:
        roles[(firsts & bit) > 0] = role
    lengths = np.diff(borders).tolist()
    return Segments(tuple(lengths), tuple(map(Role, roles.tolist())), _prefixes(stored, starts, borders))


def _prefixes(
    stored: NDArray[np.uint32], starts: NDArray[np.int64], borders: NDArray[np.int64]
) -> tuple[tuple[int, int], ...]:
    """The prefix of each segment between `borders`, as in `Segments.prefixes`. Documents begin at `starts`.

    Answers that share a prompt share all of it except its last token. That token predicts the first token of the
    answer, so each answer has its own copy.
    """
    shared = np.flatnonzero(stored & SHARED_BIT)
    if not len(shared):
        return ()
    begins = starts[np.searchsorted(starts, shared, side="right") - 1]
    trained = np.flatnonzero(stored & TARGET_BIT)
    tokens = trained[np.searchsorted(trained, begins)] - 1 - begins
    found = np.zeros((len(borders) - 1, 2), np.int64)
    found[np.searchsorted(borders, shared)] = np.stack([begins, tokens], axis=1)
    return tuple((begin, size) for begin, size in found.tolist())


def _labels(stored: NDArray[np.uint32], input_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """The token that each position must predict, (T,) both.

    The first token of a document is never a target, so no label crosses a border.
    """
    labels = np.empty_like(input_ids)
    following = labels[:-1]
    np.right_shift(stored.view(np.int32)[1:], 31, out=following)  # all ones where the top bit, `TARGET_BIT`, is set
    following &= input_ids[1:] - np.int32(IGNORE)
    following += np.int32(IGNORE)
    labels[-1] = IGNORE
    return labels


class _ReadAhead:
    """Loads windows in the background, in the order in which they will be asked for."""

    def __init__(
        self, load: Callable[[WindowPlace], _Loaded], after: Callable[[WindowPlace], WindowPlace | None]
    ) -> None:
        self._load = load
        self._after = after
        self._pool = ThreadPoolExecutor(WINDOWS_AHEAD, "read-ahead")
        self._loading: dict[WindowPlace, Future[_Loaded]] = {}
        self._place: WindowPlace | None = None

    def get(self, place: WindowPlace) -> _Loaded:
        """The window at `place`. Starts loading the windows after it, and forgets the others."""
        if place == self._place:
            return self._loading[place].result()
        self._place = place
        wanted = [place]
        while len(wanted) <= WINDOWS_AHEAD and (following := self._after(wanted[-1])):
            wanted.append(following)
        self._loading = {key: self._loading.get(key) or self._pool.submit(self._load, key) for key in wanted}
        return self._loading[place].result()


def train_stream(config: Config, chapters: Chapters, rank: int, world_size: int) -> Stream:
    """The stream of a run's training data."""
    order = train_order(config)
    epochs = ceil(config.train.epochs) if config.train.epochs else None
    batches, parts = (config.train.global_batch, config.train.micro_batch), config.sharding.sequence_parallel
    return Stream(chapters, order, *batches, rank, world_size, epochs, parts)


def rollout_stream(config: Config, rollouts: Rollouts, rank: int, world_size: int) -> Stream:
    """The stream of a run's sampled answers: one chapter for each step, or for several consecutive steps."""
    order = replace(train_order(config), weights=(1.0,), fractions=())
    batches = config.train.global_batch, config.train.micro_batch
    updates = config.rollout.updates
    return Stream(rollouts.chapters, order, *batches, rank, world_size, epochs=1, rollouts=rollouts, updates=updates)


def sees_pictures(stream: Stream, config: Config, base: Base, folder: Store) -> Stream:
    """The stream, which reads the pictures of its data set in `folder` if its rows have any.

    Raises `ConfigError` if the base has no processor of pictures.
    """
    if ROW_KINDS[config.data.kind].sees:
        processor = read_processor(base.directory, base.name)  # it says which packages are missing
        from trainer.data.order.pictures import PictureReader

        again = partial(read_processor, base.directory, base.name)
        budget, ranks = config.data.images.read_ahead, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        readers = picture_readers(len(os.sched_getaffinity(0)), ranks)
        stream.pictures = PictureReader(folder, processor, budget, readers, again)
    return stream


def eval_stream(config: Config, dataset: Dataset, rank: int, world_size: int) -> Stream:
    """The stream of an evaluation: `for (batch,) in stream.epoch(0)` visits every document once, whatever its weight.

    All ranks get the same number of micro-batches. The bins do not depend on the ranks or on the run's seed.
    """
    micro_batch, parts = config.train.micro_batch, config.sharding.sequence_parallel
    order = eval_order(config, dataset.manifest)
    batch = world_size // parts * micro_batch
    return Stream(whole(dataset), order, batch, micro_batch, rank, world_size, epochs=1, parts=parts)


def block_stream(dataset: Dataset, block: int, order: Order, micro_batch: int) -> Stream:
    """The rows of one block of the data set, for one rank. `epoch(0)` visits each document of the block once.

    `order` is that of an evaluation of the whole data set.
    """
    return Stream(whole(dataset.block(block)), order, micro_batch, micro_batch, 0, 1, epochs=1)
