"""Data sets of several chapters: what is in each, their order, and reading one while the next is still compiled."""

import gzip
import json
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.compiled import compile_dataset
from tests.unit.data.test_data_compile import FINGERPRINT, settings, word_tokenizer, write
from trainer.config import Data
from trainer.config.source import Source
from trainer.data.compile import compile, fingerprint
from trainer.data.compile.compile import Place, Progress, compile_chapters
from trainer.data.compile.fingerprint import count_chapters
from trainer.data.dataset import chapters, dataset
from trainer.data.dataset.chapters import Chapters, give_up, open_chapters
from trainer.data.dataset.dataset import Reads, open_chapter, open_dataset
from trainer.data.order import order, stream
from trainer.data.order.order import turns
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.data.source import rows
from trainer.data.source.files import Take, expand
from trainer.errors import CapstanError, DataError, NotFound, Stopped, Unreachable
from trainer.model.micro_batch import MicroBatch
from trainer.run import layout
from trainer.store.store import Store, open_store


@dataclass
class Opened:
    """A chapter without content."""

    reads: Reads | None = None


A, B = 520, 230
"""Documents of the two sources: of the first 520 words, and of the next 230."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chapters of 6 KiB, in batches of 10 rows, blocks of 16 documents, and windows of two blocks."""
    monkeypatch.setattr(fingerprint, "CHAPTER_BYTES", 6144)
    monkeypatch.setattr(rows, "BATCH_ROWS", 10)
    monkeypatch.setattr(rows, "_READ_BYTES", 128)
    monkeypatch.setattr(dataset, "BLOCK_DOCUMENTS", 16)
    monkeypatch.setattr(compile, "SHARD_TOKENS", 600)
    monkeypatch.setattr(order, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(chapters, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_LOOK_SECONDS", 0.01)


def texts(first: int, count: int) -> list[dict[str, str]]:
    """Documents of their own number, 2 to 8 times, and an end."""
    return [{"text": " ".join([str(n)] * (2 + n % 7))} for n in range(first, first + count)]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    for index in range(4):
        write(tmp_path / f"a-{index}.jsonl", texts(index * A // 4, A // 4))
    return settings(str(tmp_path / "a-*.jsonl"), write(tmp_path / "b.jsonl", texts(A, B)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def compilation(store: Store, data: Data, **options: Any) -> Iterator[int]:
    files = expand(data.train, "data.train")
    return compile_chapters(data, files, word_tokenizer(), store, FINGERPRINT, **options)


@pytest.fixture
def compiled(store: Store, data: Data) -> Chapters:
    assert list(compilation(store, data)) == [0, 1, 2, 3]
    return open_chapters(store, FINGERPRINT, store.sub("run"))


def streamed(given: Chapters, rank: int = 0, world_size: int = 1, **options: Any) -> Stream:
    settings: dict[str, Any] = {"weights": (1.0, 1.0), "sequence_length": 16, "packing": True, "seed": 3} | options
    return Stream(given, Order(**settings), 12, micro_batch=1, rank=rank, world_size=world_size)


Step = list[tuple[Position, list[int]]]


def steps(given: Chapters, start: Position, count: int, world_size: int = 1) -> list[Step]:
    """Steps from `start` on, of all ranks: the bins in their global order, with their tokens."""
    ranks = [streamed(given, rank, world_size).read_from(start) for rank in range(world_size)]
    return [
        [bin for micro in zip(*(next(rank) for rank in ranks), strict=True) for batch in micro for bin in bins(batch)]
        for _ in range(count)
    ]


def bins(batch: MicroBatch) -> list[Any]:
    return [(place, batch.input.input_ids[0].tolist()) for place in batch.bins]


def epoch(given: Chapters, number: int, **options: Any) -> list[MicroBatch]:
    return [batch for step in streamed(given, **options).epoch(number) for batch in step if batch.bins]


def test_every_chapter_has_its_share_of_every_source(store: Store, compiled: Chapters) -> None:
    found = [compiled.get(chapter) for chapter in range(4)]
    for source, documents in ((0, A), (1, B)):
        held = [sum(s.documents for s in data.manifest.shards if s.source == source) for data in found]
        assert sum(held) == documents
        assert all(abs(count - documents / 4) <= 25 for count in held)
    whole = open_dataset(store, FINGERPRINT)
    assert [data.first_document for data in found] == [
        sum(s.documents for s in whole.manifest.shards if s.chapter < chapter) for chapter in range(4)
    ]
    last = found[-1]
    assert last.block(1).first_document == last.first_document + last.blocks[1]
    assert whole.manifest.chapters == compiled.count == 4
    keys = {entry.key for entry in whole.store.list()}
    assert not [key for key in keys if key.startswith(("chapter-", "progress-"))]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "arrow"])
def test_a_small_source_is_spread_over_all_chapters(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is read at one stroke, in the batches and with the buffers of every day."""
    monkeypatch.undo()
    draw = random.Random(0)
    content = [{"text": f"{draw.getrandbits(2000):x}"} for _ in range(12_000)]
    path, lines = tmp_path / f"small.{kind}", "".join(json.dumps(row) + "\n" for row in content).encode()
    match kind:
        case "jsonl":
            path.write_bytes(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        case "arrow":
            table = pyarrow.Table.from_pylist(content)
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=8000)
    files = expand([Source(path=str(path))], "data.train")
    counts, bad_rows = Counter[int](), list[DataError]()
    for batch, at in compile._read(files, 4, [Place()]):
        counts[at.chapter] += len(list(batch.rows(bad_rows.append)))
        assert len(pickle.dumps(batch)) < 2 * 128 * 520
    assert (sum(counts.values()), bad_rows) == (12_000, [])
    assert all(abs(counts[chapter] - 3000) < 700 for chapter in range(4))


def test_a_compressed_file_that_is_read_ahead_to_its_end_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its bytes are read before its first batch is made."""
    monkeypatch.undo()
    path = tmp_path / "short.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": str(n)}) + "\n" for n in range(400)).encode()))
    found = list(compile._read(expand([Source(path=str(path))], "data.train"), 2, [Place()]))
    assert sum(batch.content.count() for batch, _ in found) == 400
    assert [at.chapter for _, at in found] == [0, *[1] * (len(found) - 1)]


def test_a_store_that_is_out_of_reach_is_asked_for_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, reads = list[float](), Reads()
    monkeypatch.setattr(dataset, "time", SimpleNamespace(monotonic=lambda: sum(waited)))
    over: Any = SimpleNamespace(wait=lambda pause: waited.append(pause))
    reads.over = over

    def request() -> None:
        raise Unreachable("nobody answers")

    with pytest.raises(Unreachable):
        reads.patiently(request)
    assert waited[:6] == [0.25, 0.5, 1, 2, 4, 5]
    assert max(waited) == 5
    assert 290 < sum(waited) <= 300
    assert reads.repeated == len(waited)
    waited.clear()
    reads.over = SimpleNamespace(wait=lambda pause: waited.append(pause) or True)  # type: ignore[assignment]
    with pytest.raises(Unreachable):
        reads.patiently(request)
    assert len(waited) == 1, "nobody needs the data any more"


def test_every_document_is_visited_once_an_epoch_and_chapters_change_their_places(compiled: Chapters) -> None:
    for number in (0, 1):
        batches = epoch(compiled, number)
        assert Counter(d for batch in batches for d in batch.documents) == Counter(range(A + B))
        places = [place for batch in batches for place in batch.bins]
        assert places == sorted(places, key=lambda at: (at.chapter, at.window, at.bin))
        assert {place.chapter for place in places} == {0, 1, 2, 3}
    assert turns(4, 3, 0) == [0, 1, 2, 3]
    assert sorted(turns(4, 3, 1)) == [0, 1, 2, 3] != turns(4, 3, 1)
    assert {word for batch in epoch(compiled, 0) for word in batch.input.input_ids[0].tolist()} >= set(range(A + B))


def test_the_global_order_knows_no_ranks(compiled: Chapters) -> None:
    """Two epochs of some 28 steps; steps go on across the borders of chapters."""
    expected = steps(compiled, Position(), 60)
    assert max(place.epoch for step in expected for place, _ in step) >= 1
    assert any(len({place.chapter for place, _ in step}) == 2 for step in expected)
    for world_size in (2, 3, 4):
        assert steps(compiled, Position(), 60, world_size) == expected


def test_a_resume_inside_a_later_chapter_gives_the_next_sample(store: Store, compiled: Chapters) -> None:
    expected, here = steps(compiled, Position(), 60), Position()
    for taken in range(60):
        if (here.epoch, here.chapter, here.window > 0) == (1, 1, True):
            restored = Position.from_json(here.to_json())
            again = open_chapters(store, FINGERPRINT, store.sub("run"))
            assert steps(again, restored, 5, world_size=3) == expected[taken : taken + 5]
            return
        here = streamed(compiled).advance(here)
    raise AssertionError("no step begins inside chapter 1 of epoch 1")


def test_a_position_of_a_checkpoint_without_chapters_is_in_the_first() -> None:
    assert Position.from_json({"epoch": 1, "window": 2, "bin": 3}) == Position(1, 2, 3, chapter=0)


@pytest.mark.parametrize("documents", [120, 260, 330, 400, 740])
def test_a_killed_compilation_gives_the_same_bytes(tmp_path: Path, store: Store, data: Data, documents: int) -> None:
    """Killed in the middle of either source of early and late chapters; and again as soon as it has gone on."""
    other = open_store(str(tmp_path / "other"))
    list(compilation(other, data))

    def die(now: Progress) -> None:
        if now.documents >= documents:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            list(compilation(store, data, progress=die))
    assert list(compilation(store, data)) == [0, 1, 2, 3]
    folder, expected = (each.sub(layout.dataset(FINGERPRINT)) for each in (store, other))
    assert {entry.key: folder.get(entry.key) for entry in folder.list()} == {
        entry.key: expected.get(entry.key) for entry in expected.list()
    }


def test_small_sources_are_one_chapter(store: Store, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = expand(data.train, "data.train")
    assert count_chapters(files) == 1
    size = sum(file.size for file in files)
    monkeypatch.setattr(fingerprint, "CHAPTER_BYTES", -(-size // 2))
    taken = [replace(file, take=Take(0.5, None, tuple(files))) for file in files]
    few = [replace(file, take=Take(5, None, tuple(files))) for file in files]
    assert [count_chapters(given) for given in (files, taken, few)] == [2, 1, 2], "a share counts by its bytes"
    monkeypatch.undo()
    dataset = compile_dataset(data, files, word_tokenizer(), store, FINGERPRINT)
    assert {shard.chapter for shard in dataset.manifest.shards} == {0}
    assert open_chapter(store, FINGERPRINT, 0).manifest == dataset.manifest


def test_a_reader_gets_a_chapter_once_it_is_compiled(store: Store, data: Data, compiled: Chapters, tmp_path: Path):
    expected = steps(compiled, Position(), 28)
    other = open_store(str(tmp_path / "other"))
    compiling = compilation(other, data)
    done = [next(compiling)]
    with pytest.raises(NotFound):
        open_chapter(other, FINGERPRINT, 1)

    def compile_one_more(_: bool) -> None:
        done.extend(islice(compiling, 1))

    source = streamed(open_chapters(other, FINGERPRINT, other.sub("run")))
    reader, read, needed = source.read_from(Position(), compile_one_more), [], []
    for _ in range(28):
        read.append([bin for batch in next(reader) for bin in bins(batch)])
        needed.append(len(done))
    assert read == expected
    assert needed[0] == 1
    assert needed == sorted(needed)
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error", [DataError("a.jsonl:7: not JSON"), Stopped("stopped by SIGTERM")], ids=["bad", "stop"]
)
def test_a_reader_ends_with_the_reason_when_no_more_is_compiled(store: Store, data: Data, error: CapstanError) -> None:
    """The data that is already compiled is read first."""
    compiling, run, read = compilation(store, data), store.sub("run"), []
    next(compiling)
    source = streamed(open_chapters(store, FINGERPRINT, run))
    with pytest.raises(type(error), match=str(error)):
        read.extend(source.read_from(Position(), lambda _: give_up(run, error)))
    assert {place.chapter for step in read for batch in step for place in batch.bins} == {0}
    assert 5 < len(read) < 10


def test_a_reader_that_is_done_does_not_wait(store: Store, data: Data) -> None:
    compiling = compilation(store, data)
    next(compiling)
    reader = streamed(open_chapters(store, FINGERPRINT, store.sub("run"))).read_from(Position())
    next(reader)
    del reader  # with threads that wait for chapter 1


def test_a_reader_that_is_done_does_not_wait_for_a_store_that_is_out_of_reach() -> None:
    """Python joins the threads of pools when it ends, and these would repeat their requests for minutes."""

    def open_chapter(chapter: int) -> Any:
        raise Unreachable("the store is being restarted")

    reader = Chapters(1, open_chapter)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(reader.get, 0)
        while not reader.reads.retried:
            assert not waiting.done()
        reader.close()
        with pytest.raises(Unreachable):
            waiting.result(timeout=10)


def test_only_a_chapter_that_is_needed_and_was_never_compiled_is_awaited() -> None:
    opened, compiled, slow = Counter[int](), Event(), Event()
    looked, asked, again = Event(), Event(), Event()

    def open_chapter(chapter: int) -> Any:
        opened[chapter] += 1
        if chapter == 9:
            looked.set()
        if chapter == 9 or (chapter, opened[0]) == (0, 1):
            raise NotFound(str(chapter))
        if (chapter, opened[0]) == (0, 2):
            asked.set()
            compiled.wait(10)
        elif chapter == 0:
            again.set()
            slow.wait(10)
        return Opened()

    reader = Chapters(10, open_chapter)
    with ThreadPoolExecutor() as pool:
        assert not reader.has(9)
        assert looked.wait(10)
        assert not reader.awaited, "nobody needs the last chapter yet"
        waiting = pool.submit(reader.get, 0)
        assert asked.wait(10)
        assert reader.awaited
        compiled.set()
        assert waiting.result(10).reads is reader.reads
        assert not reader.awaited
        for chapter in (1, 2, 3, 4):
            reader.get(chapter)
        waiting = pool.submit(reader.get, 0)  # only four are kept open
        assert again.wait(10)
        assert not reader.awaited, "its store takes long"
        slow.set()
        waiting.result(10)
        reader.close()


def test_a_chapter_that_will_not_come_is_not_read_ahead_and_ends_the_run_only_where_it_is_needed() -> None:
    def open_chapter(chapter: int) -> Any:
        raise DataError("line 7")

    reader = Chapters(1, open_chapter)
    with pytest.raises(DataError, match="line 7"):
        reader.get(0)
    assert not reader.has(0)
    reader.close()


def test_a_fraction_holds_in_every_chapter(compiled: Chapters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_BLOCKS", 64)  # so small a source is chosen from by documents, not by blocks
    tokens = [Counter[bool]() for _ in range(4)]
    for batch in epoch(compiled, 0, fractions=(None, 0.1)):
        row = batch.input.input_ids[0][: batch.tokens]
        tokens[batch.bins[0].chapter].update(word >= A for word in row.tolist() if word < A + B)
    for found in tokens:
        assert 0.05 < found[True] / found.total() < 0.15  # a dozen documents, drawn


def test_a_chapter_may_lack_a_source_with_a_fraction(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = write(tmp_path / "b.jsonl", [*({"text": ""} for _ in range(150)), *texts(700, 30)])
    data = settings(write(tmp_path / "a.jsonl", texts(0, 300)), empty)
    assert len(list(compilation(store, data))) > 1
    given = open_chapters(store, FINGERPRINT, store.sub("run"))
    assert {shard.source for shard in given.get(0).manifest.shards} == {0}
    visited = Counter(d for batch in epoch(given, 0, fractions=(None, 0.05)) for d in batch.documents)
    assert len(visited) < 330
    assert len(visited) >= 300
