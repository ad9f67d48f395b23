import json
import multiprocessing
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.view.compiling import compile_progress
from tests.compiled import compile_dataset
from trainer.config import Data
from trainer.data.compile import compile
from trainer.data.compile.compile import Progress
from trainer.data.compile.encode import BatchEncoder, Encoded
from trainer.data.compile.pool import map_batches
from trainer.data.dataset.dataset import TARGET_BIT, Dataset, open_dataset
from trainer.data.dataset.manifest import LeftOut
from trainer.data.source import rows
from trainer.data.source.files import SourceFile, expand
from trainer.data.source.reading import Part, batches
from trainer.data.source.rows import Batch
from trainer.errors import DataError, NotFound, StorageError
from trainer.store.store import Store, open_store

FINGERPRINT = "f" * 20


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The words "0" to "999" are the tokens 0 to 999; 1000 ends a text."""
    vocabulary = {str(n): n for n in range(1000)} | {"</s>": 1000, "<unk>": 1001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def write(path: Path, content: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def texts(first: int, count: int, words: int = 3) -> list[dict[str, str]]:
    return [{"text": " ".join(str((first + n + w) % 1000) for w in range(words))} for n in range(count)]


def settings(*paths: str, **options: Any) -> Data:
    base = {"train": [{"path": path} for path in paths], "format": "text", "sequence_length": 16}
    return Data.model_validate(base | options)


def build(store: Store, data: Data, **options: Any) -> Dataset:
    files = expand(data.train, "data.train")
    return compile_dataset(data, files, word_tokenizer(), store, FINGERPRINT, **options)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(rows, "BATCH_ROWS", 100)


@pytest.mark.usefixtures("small_shards")
def test_documents_come_back_in_order_with_their_targets(tmp_path: Path, store: Store) -> None:
    a, b = write(tmp_path / "a.jsonl", texts(0, 700)), write(tmp_path / "b.jsonl", texts(700, 300))
    dataset = build(store, settings(a, b))
    assert [source.documents for source in dataset.manifest.sources] == [700, 300]
    assert [shard.documents for shard in dataset.manifest.shards] == [500, 200, 300]
    assert np.diff(dataset.blocks).tolist() == [256, 244, 200, 256, 44]
    assert dataset.block_sources.tolist() == [0, 0, 0, 1, 1]
    assert dataset.lengths.tolist() == [4] * 1000
    assert (dataset.manifest.tokens, dataset.manifest.targets) == (4000, 3000)
    read = dataset.read(np.arange(5))
    assert sum(map(len, read.parts)) == 4000
    for number in range(1000):
        stored = read.gather(np.array([number]))
        expected = [number, *((number + w) % 1000 for w in (1, 2)), 1000]
        assert (stored & ~TARGET_BIT).tolist() == expected
        assert (stored & TARGET_BIT).astype(bool).tolist() == [False, True, True, True]


def test_a_compiled_data_set_is_opened_and_not_compiled_again(tmp_path: Path, store: Store) -> None:
    data = settings(write(tmp_path / "a.jsonl", texts(0, 5)))
    first = build(store, data)
    reports: list[Progress] = []
    assert build(store, data, progress=reports.append).manifest == first.manifest
    assert not reports
    with pytest.raises(NotFound):
        open_dataset(store, "0" * 20)


@pytest.mark.usefixtures("small_shards")
def test_a_killed_compilation_goes_on_after_its_last_shard(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = settings(*(write(tmp_path / f"{name}.jsonl", [*texts(0, 1200), 1]) for name in "ab"), on_bad_row="skip")
    other = open_store(str(tmp_path / "other"))
    expected = build(other, data)
    encoded: list[str] = []
    plain = BatchEncoder.__call__

    def observed(self: BatchEncoder, batch: Batch) -> Encoded:
        encoded.append(f"{Path(batch.uri).name}:{batch.first}")
        return plain(self, batch)

    def die_in_the_second_file(now: Progress) -> None:
        if now.documents == 2100:
            raise KeyboardInterrupt

    monkeypatch.setattr(BatchEncoder, "__call__", observed)
    with pytest.raises(KeyboardInterrupt):
        build(store, data, progress=die_in_the_second_file)
    encoded.clear()
    assert build(store, data).manifest == expected.manifest
    assert encoded[0] == "b.jsonl:501"
    folder = store.sub(f"data/{FINGERPRINT}")
    assert {entry.key for entry in folder.list()} == {entry.key for entry in other.sub(f"data/{FINGERPRINT}").list()}
    for entry in folder.list("tokens-"):
        assert folder.get(entry.key) == other.sub(f"data/{FINGERPRINT}").get(entry.key)


def compile_and_stop(data: Data, folder: str, reached: Event) -> None:
    """Another process: compiles on two cores in small shards, and in the second file waits to be killed."""
    compile.SHARD_TOKENS, rows.BATCH_ROWS = 2000, 100

    def report(now: Progress) -> None:
        if now.documents == 2100:
            reached.set()
            multiprocessing.Event().wait(120)

    build(open_store(folder), data, mapper=partial(map_batches, processes=2), progress=report)


@pytest.mark.usefixtures("small_shards")
def test_a_sigkill_leaves_no_process_and_finished_shards_are_not_compiled_again(tmp_path: Path, store: Store) -> None:
    data = settings(*(write(tmp_path / f"{name}.jsonl", texts(0, 1200)) for name in "ab"))
    spawning = multiprocessing.get_context("spawn")
    reached = spawning.Event()
    victim = spawning.Process(target=compile_and_stop, args=(data, str(tmp_path / "store"), reached), daemon=False)
    victim.start()
    try:
        assert reached.wait(300)
        workers = psutil.Process(victim.pid).children(recursive=True)
    finally:
        victim.kill()
        victim.join(10)
    assert victim.exitcode == -9
    assert not psutil.wait_procs(workers, timeout=300)[1]
    folder = tmp_path / "store/data" / FINGERPRINT
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert len(finished) == 4 * len(list(folder.glob("progress-*"))) >= 4
    manifest = build(store, data).manifest
    assert manifest == build(open_store(str(tmp_path / "other")), data).manifest
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished


def test_a_writer_that_loses_the_race_opens_the_winners(tmp_path: Path, store: Store) -> None:
    data = settings(write(tmp_path / "a.jsonl", texts(0, 5)))

    def winner_first(_: Progress) -> None:
        build(store, data)

    assert build(store, data, progress=winner_first).manifest == build(store, data).manifest


@pytest.mark.usefixtures("small_shards")
def test_other_processes_give_the_same_data_set(tmp_path: Path, store: Store) -> None:
    data = settings(write(tmp_path / "a.jsonl", [*texts(0, 500), 1, *texts(0, 200)]), on_bad_row="skip")
    alone = build(open_store(str(tmp_path / "other")), data)
    assert build(store, data, mapper=partial(map_batches, processes=2)).manifest == alone.manifest


@pytest.mark.usefixtures("small_shards")
def test_progress_counts_bytes_rows_and_tokens(tmp_path: Path, store: Store) -> None:
    paths = [write(tmp_path / name, texts(0, 150)) for name in ("a.jsonl", "b.jsonl")]
    size = sum(Path(path).stat().st_size for path in paths)
    reports: list[Progress] = []
    build(store, settings(*paths), progress=reports.append)
    assert [report.rows for report in reports] == [100, 150, 250, 300, 300]
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    assert reports[-1] == Progress(bytes_done=size, bytes=size, rows=300, documents=300, tokens=1200)


@pytest.mark.parametrize(
    ("row", "reason"),
    [("[1]", r"a\.jsonl:2: not JSON"), ('{"body": "1"}', r"a\.jsonl:2: no field 'text' \(the row has: body\)")],
)
def test_a_bad_row_fails_with_file_and_line_or_is_skipped_and_counted(
    tmp_path: Path, store: Store, row: str, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1 2"}\n' + row + '\n{"text": "3 4"}\n')
    with pytest.raises(DataError, match=reason + r".*set data\.on_bad_row: skip"):
        build(store, settings(str(path)))
    manifest = build(store, settings(str(path), on_bad_row="skip")).manifest
    assert (manifest.counters.rows, manifest.counters.bad_rows, manifest.documents) == (3, 1, 2)
    assert len(manifest.bad_rows) == 1
    assert manifest.bad_rows[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", [pytest.param("a.jsonl", marks=pytest.mark.long), "a.parquet"])
def test_a_row_of_100_mb_is_a_bad_row(tmp_path: Path, store: Store, name: str) -> None:
    path = tmp_path / name
    text = "1 2 " * 25_000_000
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["1", text, "2"]}), path)
    else:
        path.write_text(f'{{"text": "1"}}\n{{"text": "{text}"}}\n{{"text": "2"}}\n')
    with pytest.raises(DataError, match=rf"{name}:2: .*(64|67|16),\d+.*set data\.on_bad_row: skip"):
        build(store, settings(str(path)))
    manifest = build(store, settings(str(path), on_bad_row="skip")).manifest
    assert (manifest.documents, manifest.counters.bad_rows) == (2, 1)


def test_a_template_that_raises_makes_a_bad_row(tmp_path: Path, store: Store) -> None:
    template = "{{ raise_exception('no such talk') if messages[0].content == '13' else messages[0].content }}"
    (tmp_path / "t.jinja").write_text(template)
    talks = [{"messages": [{"role": "user", "content": f"{n} {n}" if n != 13 else "13"}]} for n in range(20)]
    path = write(tmp_path / "a.jsonl", talks)
    options = {"format": "chat", "template": str(tmp_path / "t.jinja"), "train_on": {"roles": "all"}}
    with pytest.raises(DataError, match=r"a\.jsonl:14: the chat template refuses the conversation: no such talk"):
        build(store, settings(path, **options))
    manifest = build(store, settings(path, on_bad_row="skip", **options)).manifest
    assert (manifest.documents, manifest.counters.bad_rows) == (19, 1)


def test_only_the_first_bad_rows_are_described(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "a.jsonl", [*([1] * 50), {"text": "1 2"}])
    manifest = build(store, settings(path, on_bad_row="skip")).manifest
    assert (manifest.counters.bad_rows, len(manifest.bad_rows)) == (50, 20)


def test_a_long_document_is_truncated_dropped_or_refused(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "a.jsonl", [*texts(0, 1, words=3), *texts(0, 1, words=40)])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 41 tokens, but data\.sequence_length is 16"):
        build(store, settings(path, on_too_long="fail"))
    dropped = build(store, settings(path, on_too_long="drop"))
    assert (dropped.lengths.tolist(), dropped.manifest.counters.dropped) == ([4], 1)
    store.delete(f"data/{FINGERPRINT}/manifest.json")
    split = build(store, settings(path, on_too_long="split"))
    assert (split.lengths.tolist(), split.manifest.counters.split) == ([4, 16, 16, 9], 1)
    assert split.manifest.targets == 3 + 15 + 15 + 8
    store.delete(f"data/{FINGERPRINT}/manifest.json")
    truncated = build(store, settings(path))
    assert (truncated.lengths.tolist(), truncated.manifest.counters.truncated) == ([4, 16], 1)
    assert truncated.manifest.targets == 3 + 15


def test_a_document_that_is_shorter_than_the_least_length_is_dropped(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "a.jsonl", [*texts(0, 1, words=2), *texts(0, 1, words=3)])
    found = build(store, settings(path, min_length=4))
    assert (found.lengths.tolist(), found.manifest.counters.dropped) == ([4], 1)


def test_a_document_without_targets_is_counted_and_not_written(tmp_path: Path, store: Store) -> None:
    pairs = [{"prompt": "1 2", "completion": " 3"}, {"prompt": "7 " * 20, "completion": "8"}]
    data = settings(write(tmp_path / "a.jsonl", pairs), format="prompt_completion")
    manifest = build(store, data).manifest
    assert (manifest.documents, manifest.counters.truncated, manifest.counters.without_targets) == (1, 1, 1)


def test_nothing_to_train_on_says_why(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "a.jsonl", [1, {"text": ""}, *texts(0, 2, words=40)])
    with pytest.raises(
        DataError,
        match=r"a\.jsonl: none of the 4 rows .* 1 bad rows, 1 without a token to train, 2 dropped as too long",
    ):
        build(store, settings(path, on_bad_row="skip", on_too_long="drop"))
    assert not store.exists(f"data/{FINGERPRINT}/manifest.json")


def test_a_number_of_rows_is_held_out_by_the_same_order_as_a_share(tmp_path: Path) -> None:
    given = [{"text": f"{n % 90}"} for n in range(100)]  # ten rows come twice
    paths = [write(tmp_path / "a.jsonl", given[:60]), write(tmp_path / "b.jsonl", given[60:])]

    def bad(error: DataError) -> None:
        raise error

    def read(part: Part, files: list[SourceFile]) -> list[str]:
        return [row["text"] for file in files for batch in batches(file) for _, row in part.rows(batch, bad)]

    def held_out(amount: float, seed: int = 0) -> list[str]:
        files = expand(settings(*paths).train, "data.train")
        part = Part(amount, seed, held_out=True).over(files)
        kept_apart, trained = read(part, files), read(replace(part, held_out=False), files)
        assert Counter(kept_apart + trained) == Counter(row["text"] for row in given)
        assert not set(kept_apart) & set(trained), "equal rows are on one side"
        return kept_apart

    found = {number: held_out(number) for number in (1, 7, 30, 98)}
    assert all(number - 1 <= len(rows) <= number for number, rows in found.items()), found
    assert set(found[7]) < set(found[30]) < set(found[98])
    assert set(held_out(30, seed=1)) != set(found[30])
    assert set(found[7]) <= set(held_out(0.2)), "the lowest rows of a share are those of a number"
    with pytest.raises(DataError, match="data.held_out: 100 rows leave nothing to train on, as data.train has 100"):
        held_out(100)
    paths = [write(tmp_path / "c.jsonl", [{"text": "a"}] * 9)]
    with pytest.raises(DataError, match="more than 3 rows are equal to the first"):
        held_out(3)


def test_rows_that_are_held_out_are_those_that_are_not_trained_on(tmp_path: Path, store: Store) -> None:
    """Equal rows stay together, and another seed holds others out."""
    data = settings(write(tmp_path / "a.jsonl", texts(0, 1000) * 2))

    def rows_of(part: Part) -> list[tuple[int, ...]]:
        store.delete(f"data/{FINGERPRINT}/manifest.json")
        dataset = build(store, data, part=part)
        read = dataset.read(np.arange(len(dataset.blocks) - 1))
        return [tuple(read.gather(np.array([number])).tolist()) for number in range(dataset.manifest.documents)]

    everything = rows_of(Part())
    train, held_out = rows_of(Part(0.1, seed=4)), rows_of(Part(0.1, seed=4, held_out=True))
    assert Counter(train) + Counter(held_out) == Counter(everything)
    assert not set(train) & set(held_out)
    assert 0.07 < len(held_out) / len(everything) < 0.13
    assert set(held_out) != set(rows_of(Part(0.1, seed=5, held_out=True)))


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, store: Store) -> None:
    data = settings(write(tmp_path / "a.jsonl", texts(0, 5)))
    files = expand(data.train, "data.train")
    write(tmp_path / "a.jsonl", texts(1, 5))
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        compile_dataset(data, files, word_tokenizer(), store, FINGERPRINT)


def damage(store: Store, key: str, byte: int) -> None:
    content = bytearray(store.get(key))
    content[byte] ^= 1
    store.put(key, bytes(content))


def test_a_damaged_block_is_found_and_its_neighbours_are_read(tmp_path: Path, store: Store) -> None:
    dataset = build(store, settings(write(tmp_path / "a.jsonl", texts(0, 600))))
    damage(store, f"data/{FINGERPRINT}/tokens-00000.bin", 256 * 16 + 5)
    assert [len(part) for part in dataset.read(np.array([0, 2])).parts] == [256 * 4, 88 * 4]
    with pytest.raises(StorageError, match=rf"{FINGERPRINT}/tokens-00000\.bin: bytes 4096 to 8192 are not what was"):
        dataset.read(np.array([0, 1, 2]))


def test_a_truncated_or_deleted_shard_is_named(tmp_path: Path, store: Store) -> None:
    dataset = build(store, settings(write(tmp_path / "a.jsonl", texts(0, 600))))
    key = f"data/{FINGERPRINT}/tokens-00000.bin"
    store.put(key, store.get(key)[:-8])
    with pytest.raises(StorageError, match=rf"{key}: .*truncated"):
        dataset.read(np.array([0, 2]))
    store.delete(key)
    with pytest.raises(NotFound, match=rf"{key} does not exist"):
        dataset.read(np.array([0]))


@pytest.mark.parametrize("name", ["documents-00000.bin", "blocks-00000.bin"])
def test_a_damaged_index_is_found_on_opening(tmp_path: Path, store: Store, name: str) -> None:
    build(store, settings(write(tmp_path / "a.jsonl", texts(0, 600))))
    damage(store, f"data/{FINGERPRINT}/{name}", 9)
    with pytest.raises(StorageError, match=rf"{name} is damaged"):
        open_dataset(store, FINGERPRINT)


def test_an_index_that_is_gone_is_damage_and_not_a_data_set_to_wait_for(tmp_path: Path, store: Store) -> None:
    build(store, settings(write(tmp_path / "a.jsonl", texts(0, 600))))
    store.delete(f"data/{FINGERPRINT}/blocks-00000.bin")
    with pytest.raises(
        StorageError, match=r"blocks-00000\.bin is damaged \(it does not exist\)\. Delete .* made again"
    ) as raised:
        open_dataset(store, FINGERPRINT)
    assert not isinstance(raised.value, NotFound)


@pytest.mark.usefixtures("small_shards")
def test_what_the_template_leaves_out_is_counted_and_said_once_also_after_a_kill(tmp_path: Path, store: Store) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    talks = [{"messages": [{"role": "user", "content": "1 2 3", "mood": "9"}]} for _ in range(900)]
    path = write(
        tmp_path / "a.jsonl", [*talks, *({"messages": [{"role": "user", "content": "4"}]} for _ in range(100))]
    )
    data = settings(path, format="chat", template=str(tmp_path / "t.jinja"), train_on={"roles": "all"})

    def die(now: Progress) -> None:
        if now.documents == 800:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, data, progress=die)
    said: list[str] = []
    with compile_progress(said.append, bar=False) as show:
        manifest = build(store, data, progress=partial(show, "train")).manifest
    assert manifest.left_out == {"mood": LeftOut(rows=900, examples=[f"{path}:{n}" for n in (1, 2, 3)])}
    assert said[-1] == f"train data: the chat template leaves out what rows carry: mood in 900 rows, such as {path}:1"
    assert sum("leaves out" in line for line in said) == 1


def test_the_speed_of_a_compilation_is_that_since_its_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], list[str]()
    monkeypatch.setattr("launcher.view.compiling.time", SimpleNamespace(monotonic=lambda: clock[0]))
    with compile_progress(said.append, bar=False) as show:
        show("train", Progress(1, 8, rows=10, documents=10, tokens=5000))
        clock[0] += 9.9
        show("train", Progress(2, 8, rows=20, documents=20, tokens=6500))  # a line every ten seconds is enough
        clock[0] += 0.1
        show("train", Progress(2, 8, rows=30, documents=30, tokens=7000))
    assert said == [
        "compiling train data: 10 documents, 5,000 tokens, 0 tokens/s (12 %)",
        "compiling train data: 30 documents, 7,000 tokens, 200 tokens/s (25 %)",
    ], "what a killed compilation has left is no work of this one"


def test_a_compilation_says_how_it_reads_rows_and_shows_a_bar_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said, tasks = list[str](), list[tuple[Any, ...]]()

    class Bars:
        def __init__(self, shown: bool) -> None:
            assert shown

        def __enter__(self) -> "Bars":
            return self

        def __exit__(self, *_: object) -> None: ...

        def add_task(self, what: str) -> int:
            tasks.append(("begun", what))
            return len(tasks)

        def update(self, task: int, description: str, completed: int, total: int) -> None:
            tasks.append((task, description.partition(":")[0], completed, total))

    monkeypatch.setattr("launcher.view.compiling.progress_bars", Bars)
    with compile_progress(said.append, bar=True) as show:
        show("train", Progress(0, 8, forms=("a.jsonl: texts",), notes=("b.jsonl: one row",)))
        show("train", Progress(3, 8, rows=10, documents=10, tokens=5000))
        show("held-out", Progress(1, 2))
    assert said == ["train data: a.jsonl: texts", "train data: b.jsonl: one row"]
    assert tasks == [
        ("begun", "train"),
        (1, "compiling train data", 0, 8),
        (1, "compiling train data", 3, 8),
        ("begun", "held-out"),
        (4, "compiling held-out data", 1, 2),
    ]


@pytest.mark.usefixtures("small_shards")
def test_a_journal_of_another_number_of_sources_is_not_gone_on_with(tmp_path: Path, store: Store) -> None:
    def die(now: Progress) -> None:
        if now.documents == 800:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, settings(write(tmp_path / "a.jsonl", texts(0, 900))), progress=die)
    folder = store.sub(f"data/{FINGERPRINT}")
    assert compile.ShardWriter(folder, 1).shards
    assert not compile.ShardWriter(folder, 2).shards
