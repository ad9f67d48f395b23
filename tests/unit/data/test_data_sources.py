import csv
import gzip
import io
import json
import tarfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from obstore.store import MemoryStore

from trainer.config import Data, Source, parse_config
from trainer.data.compile.inputs import find_train
from trainer.data.format.messages import read_tools
from trainer.data.source import binary_rows
from trainer.data.source import files as sources
from trainer.data.source import rows as reading
from trainer.data.source.files import SourceFile, Take, expand
from trainer.data.source.reading import Part, batches, rows
from trainer.errors import ConfigError, DataError, NotFound, StorageError
from trainer.store.store import Store

TEXT = pyarrow.string()
ROWS = [{"text": "one"}, {"text": "zwei ä"}, {"text": "three"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def find(*paths: Path | str) -> list[SourceFile]:
    return expand([Source(path=str(path)) for path in paths], "data.train")


def fail(error: DataError) -> None:
    raise error


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_globs_are_sorted_and_sources_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "c.odt", "deep/er/d.jsonl"):
        write(tmp_path / name, LINES)
    assert [file.uri for file in find(tmp_path / "**/d.jsonl")] == [str(tmp_path / "deep/er/d.jsonl")]
    files = find(tmp_path / "b.jsonl", tmp_path / "*.jsonl")
    assert [(file.key, file.source, file.size) for file in files] == [
        ("b.jsonl", 0, len(LINES)),
        ("a.jsonl", 1, len(LINES)),
        ("b.jsonl", 1, len(LINES)),
    ]


def test_a_folder_that_a_glob_matches_too_is_no_file_and_a_tilde_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl").mkdir()
    write(tmp_path / "a.jsonl", LINES)
    assert [file.key for file in find(tmp_path / "*.jsonl")] == ["a.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [file.uri for file in find("~/a.jsonl")] == [str(tmp_path / "a.jsonl")]


def test_lines_of_a_text_keep_their_white_space(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"def f():\r\n    return 1 \n\n\tend")
    assert [row["text"] for _, row in rows(find(path)[0], fail)] == ["def f():", "    return 1 ", "\tend"]


def test_a_table_may_have_lines_without_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,label\n\na,1\n\nb,2\n\n")
    assert [row for _, row in rows(find(path)[0], fail)] == [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a [1] #2.jsonl", LINES)
    assert [row for _, row in rows(find(path)[0], fail)] == ROWS
    assert [row for _, row in rows(find(path.as_uri())[0], fail)] == ROWS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/x.jsonl", r"data\.train\[1\]\.path: '.*missing/x\.jsonl' does not exist"),
        ("*.parquet", r"data\.train\[1\]\.path: '.*\*\.parquet' matches no file"),
        ("c.odt", r"data\.train\[1\]\.path: .*c\.odt cannot be read\. Allowed are \.jsonl, \.jsonl\.gz"),
        ("[ac].*", r"data\.train\[1\]\.path: .*c\.odt cannot be read\. Allowed are \.jsonl, \.jsonl\.gz"),
        ("", r"data\.train\[1\]\.path: '.*' is a folder, but neither .* Name its files, for example .*/\*\.jsonl"),
    ],
)
def test_a_path_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "c.odt", LINES)
    with pytest.raises(DataError, match=message):
        find(tmp_path / "a.jsonl", tmp_path / name)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "path",
    [
        "x" * 5000 + ".jsonl",
        "~nobody-of-this-name/x.jsonl",
        "\udcff.jsonl",
        "*.jsonl",
        "line/*.jsonl",
        "s3://",
        "az://c/x",
    ],
)
def test_a_path_that_no_system_knows_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    (tmp_path / "\udcff.jsonl").write_bytes(LINES)
    (tmp_path / "line").mkdir()
    (tmp_path / "line/a\nb.jsonl").write_bytes(LINES)
    with pytest.raises((DataError, ConfigError), match=r"^data\.train\[0\]\.path: [^\n]*$"):
        find(path)


def test_an_unknown_scheme_names_the_allowed_ones() -> None:
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: .* has the scheme 'https'\. Allowed .* s3://"):
        find("https://example.com/x.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES[:20], mtime=0) + gzip.compress(LINES[20:], mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
    ],
    ids=["plain", "bom", "gzip", "zstd"],
)
def test_every_compression_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert list(rows(find(path)[0], fail)) == [(f"{path}:{n}", row) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": "1"}\n' * 130),
        ("a.jsonl.gz", gzip.compress(b'{"a": "1"}\n' * 130, mtime=0)),
        ("a.json", b"[" + b'{"a": "1"}, ' * 129 + b'{"a": "1"}]'),
        ("a.csv", b"a,b\n" + b"1,2\n" * 130),
        ("a.tsv", b"a\tb\n" + b"1\t2\n" * 130),
    ],
)
def test_the_last_batch_of_a_text_says_that_all_of_the_file_was_read(tmp_path: Path, name: str, content: bytes) -> None:
    """Chapters are shares of what was read, so they would move with it."""
    found = list(batches(find(write(tmp_path / name, content))[0]))
    assert [batch.first for batch in found] == [1, 129]
    assert found[-1].read == len(content)


def test_a_batch_of_long_rows_ends_before_128_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BATCH_BYTES", 30)
    found = batches(find(write(tmp_path / "a.jsonl", b'{"a": "1"}\n' * 7))[0])
    assert [(batch.first, batch.read) for batch in found] == [(1, 33), (4, 66), (7, 77)]


def test_an_array_may_begin_behind_a_mark_and_white_space_and_a_value_of_a_table_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    assert [row for _, row in rows(find(path)[0], fail)] == ROWS
    path = write(tmp_path / "a.csv", b"text,label\n" + b"x" * 200_000 + b",1\n")
    assert [len(row["text"]) for _, row in rows(find(path)[0], fail)] == [200_000]


@pytest.mark.parametrize("error", [OSError, ValueError, OverflowError, MemoryError, RecursionError, csv.Error])
def test_whatever_a_damaged_file_does_to_its_reader_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def read(*_: Any) -> Any:
        raise error("oops")

    monkeypatch.setitem(reading.TEXTS, ".jsonl", read)
    with pytest.raises(DataError, match=r"a\.jsonl: damaged or not of the kind its name says \(oops\)\. Replace"):
        list(rows(find(write(tmp_path / "a.jsonl", LINES))[0], fail))


@pytest.mark.parametrize(
    "row", [{"b": {"y": 1, "x": 2}, "a": "\ud800"}, {"b": datetime(2024, 1, 2), "a": 1}, {"b": b"\xff", "a": 1}]
)
def test_a_row_of_any_values_is_held_out_or_not_whatever_the_order_of_its_keys(row: dict[str, Any]) -> None:
    other = dict(reversed(row.items()))
    sides = [(Part(0.5, seed).has(row), Part(0.5, seed).has(other)) for seed in range(20)]
    assert set(sides) == {(True, True), (False, False)}


def test_a_data_set_of_the_hub_is_not_looked_for_before_a_run_and_every_other_path_is(tmp_path: Path) -> None:
    there = Source(path=str(write(tmp_path / "a.jsonl", LINES)))
    lost = Source(path=str(tmp_path / "lost.jsonl"))
    said = sources.unusable(Data(train=[there, Source(path="hf://nobody/nothing")], eval=[there, lost]))
    assert [text.partition(": ")[0] for text in said] == ["data.eval[1].path"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("a.parquet", True), ("a.jsonl.gz", True), ("a.txt.zst", True), ("a.tar.gz", True), ("a.tar.zst", True)),
        *((f"a.mds.{kind}", True) for kind in ("zstd", "gz", "br", "bz2")),
        *((name, False) for name in ("a.jsonl", "a.arrow", "a.mds", "a.tar")),
    ],
)
def test_a_file_that_holds_its_rows_compressed_is_known_by_its_name(name: str, expected: bool) -> None:
    assert sources.is_compressed(name) is expected


def test_the_rows_of_a_parquet_file_are_those_of_its_footer_if_it_has_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert binary_rows.parquet_rows(find(path)[0]) == len(ROWS)
    path.write_bytes(b"PAR1" + b"x" * 20)
    with pytest.raises(DataError, match=r"a\.parquet: damaged or not of the kind its name says \(.*\)\. Replace the"):
        binary_rows.parquet_rows(find(path)[0])


def test_a_store_that_fails_is_no_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cause: Exception) -> Any:
        raise StorageError("it cannot be listed") from cause

    given = [Source(path="s3://bucket/a.jsonl")]
    monkeypatch.setattr(sources, "_find_remote", lambda *_: fail(OSError("no network")))
    with pytest.raises(StorageError, match="it cannot be listed"):
        expand(given, "data.train")
    monkeypatch.setattr(sources, "_find_remote", lambda *_: fail(ValueError("a name  with a\nbreak")))
    with pytest.raises(
        DataError, match=r"'s3://bucket/a\.jsonl' cannot be used: a name with a break\. Rename the file"
    ):
        expand(given, "data.train")


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(rows(find(path)[0], fail)) == [(f"{path}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_bad_lines_are_reported_with_their_place_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 6)
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n\xef\xbb\xbf{"a": 3}')
    bad: list[str] = []
    good = list(rows(find(path)[0], lambda error: bad.append(str(error))))
    assert good == [(f"{path}:1", {"a": 1}), (f"{path}:6", {"a": 2})]
    expected = [f"{path}:3: not JSON", f"{path}:4: not JSON", f"{path}:5: not UTF-8", f"{path}:7: not JSON"]
    assert [text.partition(" (")[0] for text in bad] == expected


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.tar"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"this is no compressed file")
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        list(rows(find(path)[0], fail))


def test_a_file_that_went_away_is_no_damaged_file(tmp_path: Path) -> None:
    files = find(write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)))
    (tmp_path / "a.jsonl.gz").unlink()
    with pytest.raises(NotFound, match=r"a\.jsonl\.gz does not exist"):
        list(rows(files[0], fail))


def save_hf_dataset(folder: Path) -> None:
    """Write the files that `Dataset.save_to_disk` writes: Arrow streams, and state.json which names them in order."""
    folder.mkdir()
    for name, part in (("data-00000-of-00002.arrow", ROWS[:2]), ("data-00001-of-00002.arrow", ROWS[2:])):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    names = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))


def mds_shard(rows: list[dict[str, Any]]) -> bytes:
    """A shard as MosaicML Streaming's MDSWriter lays it out: a fixed and two varying columns."""
    samples = []
    for number, row in enumerate(rows, -1):
        picture, text = b"\xff\xd8", row["text"].encode()
        sizes = np.array([len(picture), len(text)], "<u4").tobytes()
        samples.append(sizes + number.to_bytes(8, "little", signed=True) + picture + text)
    columns = {"column_names": ["n", "picture", "text"], "column_encodings": ["int", "jpeg", "str"]}
    header = json.dumps({**columns, "column_sizes": [8, None, None], "format": "mds", "version": 2}).encode()
    start = 4 * (len(rows) + 2) + len(header)
    offsets = start + np.cumsum([0, *map(len, samples)])
    return np.array([len(rows), *offsets], "<u4").tobytes() + header + b"".join(samples)


def save_mds(folder: Path, compress: bool) -> None:
    folder.mkdir()
    shards = []
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        name = f"shard.{number:05d}.mds"
        zipped = f"{name}.zstd" if compress else None
        (folder / (zipped or name)).write_bytes(zstandard.compress(mds_shard(part)) if compress else mds_shard(part))
        shards.append({"format": "mds", "raw_data": {"basename": name}, "zip_data": zipped and {"basename": zipped}})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def test_a_saved_hf_data_set_is_read_in_its_order(tmp_path: Path) -> None:
    save_hf_dataset(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "*.arrow"):
        found = [(where.rpartition("/")[2], row) for file in find(path) for where, row in rows(file, fail)]
        names = [f"data-0000{n}-of-00002.arrow:{row}" for n, row in ((0, 1), (0, 2), (1, 1))]
        assert found == list(zip(names, ROWS, strict=True))
    for file in find(tmp_path / "saved"):
        read = [0, *(batch.read for batch in batches(file))]
        assert read == sorted(set(read)), "progress goes on from one piece of a file to the next"
        assert file.size - 16 <= read[-1] <= file.size


def test_a_saved_hf_data_set_without_rows_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(DataError, match=r"matches no file"):
        find(tmp_path)


def test_a_data_set_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test\. Name one, for example .*/train"):
        find(tmp_path)


@pytest.mark.parametrize("compress", [False, True])
def test_mds_shards_are_read_with_the_columns_of_texts_and_pictures(tmp_path: Path, compress: bool) -> None:
    save_mds(tmp_path / "mds", compress)
    found = [row for file in find(tmp_path / "mds") for _, row in rows(file, fail)]
    assert [row.pop("picture") for row in found] == [b"\xff\xd8"] * 3
    assert found == [{"n": number, **row} for number, row in zip((-1, 0, -1), ROWS, strict=True)]


def test_a_truncated_mds_shard_is_named(tmp_path: Path) -> None:
    save_mds(tmp_path / "mds", compress=False)
    path = tmp_path / "mds" / "shard.00000.mds"
    write(path, path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"shard\.00000\.mds: damaged"):
        list(rows(find(path)[0], fail))


def test_a_folder_of_shards_of_another_version_is_refused(tmp_path: Path) -> None:
    save_mds(tmp_path / "mds", compress=False)
    index = json.loads((tmp_path / "mds" / "index.json").read_text())
    shards = [*index["shards"], {**index["shards"][0], "format": "jsonl"}]
    for other in ({"version": 1}, {"shards": shards}):
        (tmp_path / "mds" / "index.json").write_text(json.dumps({**index, **other}))
        with pytest.raises(DataError, match=r"cannot be read: its index\.json is not that of MDS, version 2"):
            find(tmp_path / "mds")


def save_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of files, with a folder before them."""
    folder = tarfile.TarInfo("x")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(path, "w") as tar:
        tar.addfile(folder)
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def test_members_of_a_tar_whose_names_begin_alike_are_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 2)
    members = {
        "x/a.txt": b"one",
        "x/a.json": b'\xef\xbb\xbf{"n": 1}',
        "x/.a": b"hidden",
        "x/b.json": b"[2]",
        "y/b.cls": b"3",
    }
    found = find(save_tar(tmp_path / "a.tar", members | {"x/c.json": b"{", "x/d.en.TXT": "zwei \xe4".encode()}))[0]
    bad: list[str] = []
    good = list(rows(found, lambda error: bad.append(str(error))))
    expected = [{"txt": "one", "n": 1}, {"json": [2]}, {"cls": "3"}, {"en.txt": "zwei \xe4"}]
    assert good == [(f"{found.uri}:{number}", row) for number, row in zip((1, 2, 3, 5), expected, strict=True)]
    (told,) = bad
    assert told.startswith(f"{found.uri}:4: its member 'x/c.json' is not JSON (")
    assert [batch.first for batch in batches(found)] == [1, 3, 5]
    monkeypatch.setattr(binary_rows, "_MOST_BYTES", 7)
    with pytest.raises(DataError, match=r"a\.tar: damaged .*its member 'x/a\.json' has more than 7 bytes"):
        list(rows(found, fail))


def test_only_files_of_the_very_same_name_are_a_row_of_a_tar(tmp_path: Path) -> None:
    """A link has no content of its own, and 10 begins as 1 does."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, target in (("1.txt", ""), ("1.cls", "1.txt"), ("10.txt", ""), ("2.txt", ""), ("2.text", "1.txt")):
            header = tarfile.TarInfo(name)
            if target:
                header.type, header.linkname = (tarfile.SYMTYPE if "cls" in name else tarfile.LNKTYPE), target
                tar.addfile(header)
            else:
                header.size = len(name)
                tar.addfile(header, io.BytesIO(name.encode()))
    assert [row for _, row in rows(find(tmp_path / "a.tar")[0], fail)] == [
        {"txt": "1.txt"}, {"txt": "10.txt"}, {"txt": "2.txt"},
    ]  # fmt: skip


def test_a_member_of_a_tar_stands_where_a_field_of_files_names_it_and_nowhere_else(tmp_path: Path) -> None:
    fields = {"text": "a.png", "image": "a.png"}
    found = find(save_tar(tmp_path / "a.tar", {"a.json": json.dumps(fields).encode(), "a.png": b"\x89PNG"}))[0]
    ((_, row),) = rows(found, fail)
    assert row["text"] == "a.png"
    whole = (tmp_path / "a.tar").read_bytes()
    ((_, packed),) = rows(find(write(tmp_path / "a.tar.gz", gzip.compress(whole)))[0], fail)
    assert packed == {**fields, "image": {"bytes": b"\x89PNG", "path": "a.png"}}, "it has no place in the file"
    begin = row["image"]["offset"]
    assert (row["image"]["bytes"], whole[begin : begin + 4]) == (b"\x89PNG", b"\x89PNG")


def test_rows_with_pictures_are_read_a_few_megabytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pyarrow.Table.from_pylist([{"n": number, "picture": bytes(1000)} for number in range(9)])
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    monkeypatch.setattr(binary_rows, "PORTION_BYTES", 4200)
    found = list(batches(find(tmp_path / "a.arrow")[0]))
    assert [len(list(batch.content.rows())) for batch in found] == [4, 4, 1]
    end = found[-1].read
    assert ([batch.read for batch in found], end) == (
        [end * 4 // 9, end * 8 // 9, end],
        pytest.approx(10_000, abs=1000),
    )
    shard = write(tmp_path / "a.mds", mds_shard([{"text": "x" * 900}] * 9))
    assert [batch.content.count() for batch in batches(find(shard)[0])] == [4, 4, 1]
    sounds = [{"n": number, "audio": {"array": [0.5] * 125, "sampling_rate": 16_000}} for number in range(9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sounds), tmp_path / "b.parquet", use_dictionary=False)
    assert [len(list(batch.content.rows())) for batch in batches(find(tmp_path / "b.parquet")[0])] == [4, 4, 1]
    tar = save_tar(tmp_path / "c.tar", {f"{number}.txt": bytes(1000) for number in range(9)})
    assert [len(list(batch.content.rows())) for batch in batches(find(tar)[0])] == [5, 4]


def test_a_folder_in_a_bucket_is_a_data_set_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf_dataset(tmp_path / "saved")
    store = Store("s3://bucket/saved", MemoryStore())
    for path in (tmp_path / "saved").iterdir():
        store.put(path.name, path.read_bytes())
    monkeypatch.setattr(sources, "open_store", lambda uri, setting: {"s3://bucket/saved/": store}[uri])
    assert [row for file in find("s3://bucket/saved/") for _, row in rows(file, fail)] == ROWS


def test_a_line_that_is_too_long_is_a_bad_row_and_never_whole_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    path = write(tmp_path / "a.jsonl", b'{"a": "' + b"x" * 5000 + b'"}\n' + b'{"a": "' + b"y" * 900 + b'"}\n')
    bad: list[str] = []
    assert [where for where, _ in rows(find(path)[0], lambda error: bad.append(str(error)))] == [f"{path}:2"]
    assert bad == [f"{path}:1: the line has more than 1,000 bytes"]
    assert max(len(line) for batch in batches(find(path)[0]) for line in batch.content.lines) == 1001  # pyright: ignore


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3://bucket/data/ with a.jsonl, b.jsonl.zst, c.odt and deeper/d.jsonl."""
    store = Store("s3://bucket/data", MemoryStore())
    for key in ("a.jsonl", "c.odt", "deeper/d.jsonl"):
        store.put(key, LINES)
    store.put("b.jsonl.zst", zstandard.compress(LINES))
    folders = {store.uri: store}
    monkeypatch.setattr(sources, "open_store", lambda uri, setting: folders[uri])


@pytest.mark.usefixtures("bucket")
def test_a_bucket_is_read_like_a_folder() -> None:
    files = find("s3://bucket/data/*.jsonl*", "s3://bucket/data/a.jsonl")
    assert [file.uri.rpartition("/")[2] for file in files] == ["a.jsonl", "b.jsonl.zst", "a.jsonl"]
    for file in files:
        assert list(rows(file, fail)) == [(f"{file.uri}:{n}", row) for n, row in enumerate(ROWS, 1)]


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/data/z.jsonl",
            r"data\.train\[0\]\.path: 's3://bucket/data/z\.jsonl' cannot be read: .* does not",
        ),
        ("s3://bucket/data/z*", r"data\.train\[0\]\.path: 's3://bucket/data/z\*' matches no file"),
        ("s3://bucket/d*/a.jsonl", r"has a wildcard in a folder"),
    ],
)
def test_a_bucket_path_that_cannot_be_used_is_named(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(path)


def many(tmp_path: Path) -> list[Path]:
    """Two files of 70 and 230 rows, an empty line among them, and a Parquet file of 51."""
    lines = [json.dumps({"text": str(number)}) for number in range(300)]
    one = write(tmp_path / "many-a.jsonl", "\n".join([*lines[:10], "", *lines[10:70]]).encode())
    other = write(tmp_path / "many-b.jsonl", "\n".join(lines[70:]).encode())
    table = pyarrow.table({"text": [str(number) for number in range(300, 351)]})
    pyarrow.parquet.write_table(table, tmp_path / "many-c.parquet")
    return [one, other, tmp_path / "many-c.parquet"]


def with_take(files: list[SourceFile], amount: float, seed: int | None, skip: int = 0) -> list[SourceFile]:
    take = Take(amount, seed, tuple(files), skip)
    return [replace(file, take=take) for file in files]


def numbers_taken(tmp_path: Path, amount: float, seed: int | None = None, skip: int = 0) -> list[int]:
    files = with_take(find(tmp_path / "many-*"), amount, seed, skip)
    return [int(row["text"]) for file in files for _, row in rows(file, fail)]


@pytest.mark.parametrize("amount", [1, 71, 300, 1000, 0.01, 0.5, 0.999])
def test_the_first_rows_are_those_of_the_split_of_datasets(tmp_path: Path, amount: float) -> None:
    from datasets import Dataset, ReadInstruction

    many(tmp_path)
    whole = Dataset.from_dict({"number": range(351)})
    unit = {"unit": "%", "to": amount * 100} if amount < 1 else {"unit": "abs", "to": min(351, amount)}
    if amount * 100 == round(amount * 100) or amount >= 1:
        (split,) = ReadInstruction("all", **unit).to_absolute({"all": len(whole)})  # type: ignore[arg-type]
        assert numbers_taken(tmp_path, amount) == whole[slice(split.from_ or 0, split.to)]["number"]
    assert numbers_taken(tmp_path, amount) == list(range(round(amount * 351) if amount < 1 else min(351, int(amount))))


@pytest.mark.parametrize("skip", [1, 69, 70, 299, 350, 400])
@pytest.mark.parametrize("amount", [1, 80, 2**62])
def test_rows_that_are_skipped_are_those_before_a_part_of_a_split(tmp_path: Path, amount: int, skip: int) -> None:
    many(tmp_path)
    assert numbers_taken(tmp_path, amount, skip=skip) == list(range(351))[skip : skip + amount]
    shuffled = numbers_taken(tmp_path, 351, 7)
    assert sorted(shuffled) == list(range(351))
    both = set(numbers_taken(tmp_path, skip, 7)) | set(numbers_taken(tmp_path, amount, 7, skip))
    assert both == set(numbers_taken(tmp_path, min(351, skip + amount), 7))


def test_a_share_is_taken_of_rows_in_every_kind_of_file(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(ROWS).encode())
    save_tar(tmp_path / "b.tar", {f"{number}.json": json.dumps(row).encode() for number, row in enumerate(ROWS)})
    write(tmp_path / "c.mds", mds_shard(ROWS))
    files = with_take(find(tmp_path / "*"), 0.5, None)
    assert [row["text"] for file in files for _, row in rows(file, fail)] == [row["text"] for row in ROWS + ROWS[:1]]
    assert [batch.content.count() for file in files[:2] for batch in batches(file)] == [3, 1]


def test_a_source_skips_rows_with_and_without_take(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"row {number}"}) for number in range(9))
    write(tmp_path / "a.jsonl", lines.encode())

    def taken(**options: Any) -> list[str]:
        text = "run: {name: demo}\nmodel: {base: /m}\ntrain: {steps: 10}\ndata:\n  train: "
        source = {"path": str(tmp_path / "a.jsonl"), **options}
        files, _, _ = find_train(parse_config(text + json.dumps([source])))
        return [row["text"].removeprefix("row ") for file in files for _, row in rows(file, fail)]

    assert taken(skip=7) == ["7", "8"]
    assert taken(skip=3, take=2) == ["3", "4"]
    assert set(taken(take_seed=1, skip=4)) | set(taken(take_seed=1, take=4)) == set("012345678")


@pytest.mark.parametrize(("amount", "seed"), [(5, 42), (0.25, 42), (100, 7)])
def test_a_choice_is_that_of_a_shuffle_of_datasets(tmp_path: Path, amount: float, seed: int) -> None:
    from datasets import Dataset

    many(tmp_path)
    count = round(amount * 351) if amount < 1 else int(amount)
    theirs = Dataset.from_dict({"number": range(351)}).shuffle(seed=seed).select(range(count))["number"]
    assert numbers_taken(tmp_path, amount, seed) == sorted(theirs)


def test_the_place_of_a_row_that_is_taken_is_its_line(tmp_path: Path) -> None:
    many(tmp_path)
    first, _, last = with_take(find(tmp_path / "many-*"), 0.999, None)
    assert [where for where, _ in rows(first, fail)][9:11] == [f"{first.uri}:10", f"{first.uri}:12"]
    assert [where for where, _ in rows(last, fail)][-1] == f"{last.uri}:51"


def test_the_first_rows_are_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.jsonl", LINES + b"\xff" * 100)
    (file,) = with_take(find(path), 2, None)
    assert [row for _, row in rows(file, fail)] == ROWS[:2]
    monkeypatch.setattr(reading, "BATCH_ROWS", 2)
    assert [batch.first for batch in batches(file)] == [1]


TWICE = '{"text": "a", "text": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("a.jsonl", f'{{"text": "ok"}}\n{TWICE}\n', 2),
        ("a.json", f'[{{"text": "ok"}}, {TWICE}, {{"text": "on"}}]', 2),
        ("a.jsonl", '{"text": "ok"}\n{"m": [{"role": "user", "text": 1, "text": 2}]}\n', 2),
    ],
)
def test_a_row_that_names_a_key_twice_is_a_bad_row_with_its_place(
    tmp_path: Path, name: str, content: str, row: int
) -> None:
    bad: list[DataError] = []
    (file,) = find(write(tmp_path / name, content.encode()))
    read = list(rows(file, bad.append))
    assert [str(error) for error in bad] == [
        f"{tmp_path / name}:{row}: an object has the key 'text' twice; keep one of them"
    ]
    assert read[0] == (f"{tmp_path / name}:1", {"text": "ok"})
    assert len(read) == content.count("ok") + content.count("on")


def test_json_inside_of_a_row_names_each_key_once_too() -> None:
    assert read_tools('[{"name": "f"}]') == [{"name": "f"}]
    with pytest.raises(DataError, match="in the tools, which are JSON, an object has the key 'name' twice"):
        read_tools('[{"name": "f", "name": "g"}]')
    shard = mds_shard([{"text": "a"}])
    with pytest.raises(ValueError, match="two columns have the same name"):
        binary_rows.read_shard(shard.replace(b'"n", "picture", "text"', b'"n", "text",    "text"'))


def test_a_parquet_file_with_a_column_twice_is_named(tmp_path: Path) -> None:
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], ["text", "text"]), tmp_path / "a.parquet")
    (file,) = find(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: damaged .*two columns have the same name"):
        list(rows(file, fail))


def test_arguments_of_a_call_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """Arrow gives all values of a struct the same keys, with nulls; a map has its own."""

    def call(**arguments: Any) -> dict[str, Any]:
        return {"messages": [{"role": "assistant", "content": None, "call": {"arguments": arguments}}], "note": None}

    given = [call(city="Rome"), call(day=None, hours=[1])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    (file,) = find(tmp_path / "a.parquet")
    read = [row for _, row in rows(file, fail)]
    assert [row["messages"][0]["call"]["arguments"] for row in read] == [{"city": "Rome"}, {"hours": [1]}]
    assert read[0]["note"] is None, "a column is one of the row's own fields"
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    inner = pyarrow.struct(
        [("call", pyarrow.struct([("m", kind), ("l", pyarrow.list_(pyarrow.int64())), ("n", TEXT)]))]
    )
    flat = pyarrow.struct([("a", TEXT), ("b", TEXT)])
    own = [("a", None), ("b", 2)]
    columns = {
        "m": pyarrow.array([own, [("a", 1), ("a", 2)]], kind),
        "flat": pyarrow.array([{"a": "x", "b": None}] * 2, flat),
        "of": pyarrow.array([[("k", {"a": "x", "b": None})]] * 2, pyarrow.map_(TEXT, flat)),
        "calls": pyarrow.array(
            [[("k", {"call": {"a": "x", "b": None}})]] * 2, pyarrow.map_(TEXT, pyarrow.struct([("call", flat)]))
        ),
        "deep": pyarrow.array([{"call": {"m": own, "l": [None, 1], "n": None}}] * 2, inner),
    }
    expected = {
        "flat": {"a": "x", "b": None},
        "of": {"k": {"a": "x", "b": None}},
        "calls": {"k": {"call": {"a": "x"}}},
        "deep": {"call": {"m": dict(own), "l": [None, 1]}},
    }
    names = list(expected)
    pyarrow.parquet.write_table(pyarrow.table(columns).select(names), tmp_path / "b.parquet")
    assert [row for _, row in rows(find(tmp_path / "b.parquet")[0], fail)] == [expected] * 2
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    (file,) = find(tmp_path / "b.parquet")
    bad: list[DataError] = []
    assert [row for _, row in rows(file, bad.append)] == [{"m": dict(own), **expected}]
    assert "b.parquet:2: its column 'm' cannot be read" in str(bad[0])
