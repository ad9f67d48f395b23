import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from obstore.store import MemoryStore

from trainer.config import Source
from trainer.data import sources
from trainer.data.sources import SourceFile, expand, rows
from trainer.errors import DataError, NotFound
from trainer.store import Store

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
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, LINES)
    files = find(tmp_path / "b.jsonl", tmp_path / "*.jsonl")
    assert [(file.key, file.source, file.size) for file in files] == [
        ("b.jsonl", 0, len(LINES)),
        ("a.jsonl", 1, len(LINES)),
        ("b.jsonl", 1, len(LINES)),
    ]


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a [1] #2.jsonl", LINES)
    assert [row for _, row in rows(find(path)[0], fail)] == ROWS
    assert [row for _, row in rows(find(path.as_uri())[0], fail)] == ROWS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/x.jsonl", r"data\.train\[1\]\.path: '.*missing/x\.jsonl' does not exist"),
        ("*.parquet", r"data\.train\[1\]\.path: '.*\*\.parquet' matches no file"),
        ("c.txt", r"data\.train\[1\]\.path: .*c\.txt cannot be read\. Allowed are \.jsonl, \.jsonl\.gz"),
        ("", r"data\.train\[1\]\.path: '.*' is a folder\. Name its files, for example .*/\*\.jsonl"),
    ],
)
def test_a_path_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "c.txt", LINES)
    with pytest.raises(DataError, match=message):
        find(tmp_path / "a.jsonl", tmp_path / name)
    assert not (tmp_path / "missing").exists()


def test_an_unknown_scheme_names_the_allowed_ones() -> None:
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: .* has the scheme 'https'\. Allowed .* s3://"):
        find("https://example.com/x.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
        ("a.jsonl.zst", zstandard.compress(LINES)),
    ],
)
def test_every_compression_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    assert list(rows(find(path)[0], fail)) == [(f"{path}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(rows(find(path)[0], fail)) == [(f"{path}:{n}", row) for n, row in enumerate(ROWS, 1)]


def test_bad_lines_are_reported_with_their_place_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    bad: list[str] = []
    good = list(rows(find(path)[0], lambda error: bad.append(str(error))))
    assert good == [(f"{path}:1", {"a": 1}), (f"{path}:6", {"a": 2})]
    assert [text.partition(": not JSON (")[0] for text in bad] == [f"{path}:{line}" for line in (3, 4, 5)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"this is no compressed file")
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        list(rows(find(path)[0], fail))


def test_a_file_that_went_away_is_no_damaged_file(tmp_path: Path) -> None:
    files = find(write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)))
    (tmp_path / "a.jsonl.gz").unlink()
    with pytest.raises(NotFound, match=r"a\.jsonl\.gz does not exist"):
        list(rows(files[0], fail))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3://bucket/data/ with a.jsonl, b.jsonl.zst, c.txt and deeper/d.jsonl."""
    store = Store("s3://bucket/data", MemoryStore())
    for key in ("a.jsonl", "c.txt", "deeper/d.jsonl"):
        store.put(key, LINES)
    store.put("b.jsonl.zst", zstandard.compress(LINES))
    folders = {store.uri: store}
    monkeypatch.setattr(sources, "open_store", folders.__getitem__)


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
