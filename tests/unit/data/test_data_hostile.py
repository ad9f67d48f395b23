"""Rows and files that are wrong in every way: one sentence that names the file and the row, or skipped and counted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from launcher.smoke.small import first_rows
from tests.compiled import compile_dataset
from tests.material import byte_tokenizer
from trainer.config import Data, Source
from trainer.data.dataset.dataset import Dataset
from trainer.data.source.binary_rows import read_shard
from trainer.data.source.files import expand
from trainer.data.source.reading import EVERYTHING, Part, rows
from trainer.data.source.rows import Batch
from trainer.errors import DataError
from trainer.store.store import open_store

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
GOOD = {"messages": [USER, ASSISTANT]}


def build(path: Path, on_bad_row: str, part: Part = EVERYTHING) -> Dataset:
    (path.parent / "t.jinja").write_text(TEMPLATE)
    data = Data.model_validate(
        {
            "train": [{"path": str(path)}],
            "format": "chat",
            "template": str(path.parent / "t.jinja"),
            "sequence_length": 64,
            "on_bad_row": on_bad_row,
        }
    )
    store = open_store(str(path.parent / "store"))
    return compile_dataset(data, expand(data.train, "data.train"), byte_tokenizer(), store, "f" * 20, part)


def is_refused_or_skipped(path: Path, reason: str, row: int = 2, rows: int = 3, part: Part = EVERYTHING) -> None:
    """Row `row` of the file's `rows` is bad: it ends the compilation with one line, or is counted and left out."""
    with pytest.raises(DataError) as refused:
        build(path, "fail", part)
    text = str(refused.value)
    assert text.startswith(f"{path}:{row}: "), text
    assert reason in text
    assert text.isprintable()
    assert len(text) < len(str(path)) + 600
    manifest = build(path, "skip", part).manifest
    assert (manifest.counters.rows, manifest.counters.bad_rows) == (rows, 1)
    assert manifest.bad_rows == [text.removesuffix(". Correct the row, or set data.on_bad_row: skip.")]


def called(calls: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ASSISTANT, "tool_calls": calls}]}


JSON_ROWS: dict[str, tuple[Any, str]] = {
    "calls that are a number": (called(5), "the tool calls of turn 2 are of type int, and not a list"),
    "calls that are an object": (called({"a": 1}), "the tool calls of turn 2 are an object"),
    "calls that are a text": (called("x"), "the tool calls of turn 2 are of type str"),
    "a call that is null": (called([None]), "turn 2 has a tool call that is null"),
    "arguments that are no JSON": (called([{"function": {"name": "f", "arguments": "{"}}]), "not JSON"),
    "deep arguments": (called([{"function": {"arguments": "[" * 100_000}}]), "not JSON"),
    "half a surrogate pair as a key": (b'{"\\ud800": 1}', r"the row has: \ud800"),
    "half a surrogate pair as a role": (b'{"messages": [{"role": "\\udfff", "content": "x"}]}', r"\udfff"),
    "a line break and an escape in a key": ({"a\n\x1b[31m": 1}, r"a\n\x1b[31m"),
    "a key of a megabyte": ({"k" * 2**20: 1}, "kkk..."),
    "thousands of keys": ({f"key{n}": n for n in range(20_000)}, "no field 'messages'"),
    "deep nesting": (b'{"messages": ' + b"[" * 100_000, "not JSON"),
    "a number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}", "not JSON"),
    "no number at all": (b'{"messages": NaN}', "the messages are of type float"),
    "tools that are a number": ({**GOOD, "tools": 5}, "the tools are of type int"),
    "tools that are deep": ({**GOOD, "tools": "[" * 100_000}, "the tools are given as text that is not JSON"),
    "a role of every length": ({"messages": [{"role": ["x" * 9999], "content": "x"}]}, "turn 1 has the role"),
    "a byte order mark inside": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "a zero byte": (b"\0" * 9, "not JSON"),
}


@pytest.mark.parametrize("name", JSON_ROWS)
def test_a_bad_line_is_one_sentence(tmp_path: Path, name: str) -> None:
    row, reason = JSON_ROWS[name]
    lines = [json.dumps(GOOD).encode(), row if isinstance(row, bytes) else json.dumps(row).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join([*lines, lines[0]]))
    is_refused_or_skipped(tmp_path / "a.jsonl", reason)


@pytest.mark.parametrize("held_out", [False, True])
def test_values_too_deep_to_tell_which_side_they_are_on_are_bad_rows_of_the_training_data(held_out: bool) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    bad: list[str] = []
    part = Part(0.5, held_out=held_out)
    assert (
        part.rows(Batch("a.jsonl", 1, cast("Any", _Given([{"deep": deep}])), 0), lambda error: bad.append(str(error)))
        == []
    )
    assert bad == ([] if held_out else ["a.jsonl:1: its values are nested too deeply"])


class _Given(NamedTuple):
    """Rows as if they had been read: how deep a line of JSON may be depends on the version of Python."""

    given: list[Any]

    def rows(self) -> Iterator[Any]:
        return iter(self.given)


def test_an_empty_file_a_byte_order_mark_and_both_line_ends_are_no_bad_rows(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + line + b"\r\n\r\n" + line + b"\n \n" + line)
    manifest = build(tmp_path / "*.jsonl", "fail").manifest
    assert (manifest.counters.rows, manifest.counters.bad_rows) == (3, 0)


def far_away(kind: Any) -> pyarrow.Array:
    """Three dates, of which the second is in the year 5,881,580, or millions of years after it."""
    width = kind.bit_width // 8
    days = b"".join(number.to_bytes(width, "little") for number in (0, 2 ** (8 * width - 1) - 1, 0))
    return pyarrow.Array.from_buffers(kind, 3, [None, pyarrow.py_buffer(days)])


def text_of_bytes(*values: bytes) -> pyarrow.Array:
    offsets = np.cumsum([0, *map(len, values)]).astype("<i4").tobytes()
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(values))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


COLUMNS: dict[str, Callable[[], pyarrow.Array]] = {
    "a far-away date": lambda: far_away(pyarrow.date32()),
    "a far-away time": lambda: far_away(pyarrow.timestamp("us")),
    "invalid UTF-8": lambda: text_of_bytes(b"x", b"\xff\xfe", b"z"),
    "nested invalid UTF-8": lambda: pyarrow.StructArray.from_arrays([text_of_bytes(b"x", b"\xff", b"z")], ["in"]),
}


def as_text(column: pyarrow.Array, kind: Any) -> pyarrow.Array:
    """The memory of a column of bytes as another type, as a writer of its own may write it into a file."""
    message = pyarrow.record_batch([column], ["in"]).serialize()
    return pyarrow.ipc.read_record_batch(message, pyarrow.schema([("in", kind)])).column(0)


TEXT, BYTES, BAD = pyarrow.string(), pyarrow.binary(), pyarrow.array([b"x", b"\xff\xfe", b"z"])
EACH = pyarrow.array([0, 1, 2], pyarrow.int32())
BAD_TEXT = as_text(BAD, TEXT)
# Parquet has no form for these.
ARROW_COLUMNS: dict[str, Callable[[], pyarrow.Array]] = {
    "a large text": lambda: as_text(BAD.cast(pyarrow.large_binary()), pyarrow.large_string()),
    "a few distinct texts": lambda: pyarrow.DictionaryArray.from_arrays(EACH, BAD_TEXT),
    "a map": lambda: as_text(
        pyarrow.MapArray.from_arrays([0, 1, 2, 3], ["a", "b", "c"], BAD), pyarrow.map_(TEXT, TEXT)
    ),
    "a list of one": lambda: as_text(pyarrow.FixedSizeListArray.from_arrays(BAD, 1), pyarrow.list_(TEXT, 1)),
    "a view": lambda: as_text(
        pyarrow.ListViewArray.from_arrays(EACH, pyarrow.array([1, 1, 1], pyarrow.int32()), BAD), pyarrow.list_view(TEXT)
    ),
    "a large view": lambda: as_text(
        pyarrow.LargeListViewArray.from_arrays([0, 1, 2], [1, 1, 1], BAD), pyarrow.large_list_view(TEXT)
    ),
    "a sparse union": lambda: as_text(
        pyarrow.UnionArray.from_sparse(pyarrow.array([0] * 3, pyarrow.int8()), [BAD]),
        pyarrow.sparse_union([pyarrow.field("0", TEXT)]),
    ),
    "a dense union in a list": lambda: pyarrow.ListArray.from_arrays(
        [0, 1, 2, 3],
        as_text(
            pyarrow.UnionArray.from_dense(pyarrow.array([0] * 3, pyarrow.int8()), EACH, [BAD]),
            pyarrow.dense_union([pyarrow.field("0", TEXT)]),
        ),
    ),
}


@pytest.mark.parametrize("name", ARROW_COLUMNS)
def test_text_that_is_not_utf_8_at_any_depth_of_a_column_that_nobody_needs_is_a_bad_row(
    tmp_path: Path, name: str
) -> None:
    other = ARROW_COLUMNS[name]()
    is_refused_or_skipped(write_table(tmp_path / "a.arrow", messages=[GOOD["messages"]] * 3, other=other), "")


def test_a_number_with_more_digits_than_its_type_is_read_as_it_is(tmp_path: Path) -> None:
    digits = pyarrow.py_buffer(b"".join(number.to_bytes(16, "little") for number in (1, 10**30, 2**127 - 1)))
    other = pyarrow.Array.from_buffers(pyarrow.decimal128(3, 0), 3, [None, digits])
    path = write_table(tmp_path / "a.arrow", messages=[GOOD["messages"]] * 3, other=other)
    assert build(path, "fail").manifest.counters.rows == 3


def write_table(path: Path, **columns: Any) -> Path:
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_value_that_cannot_be_read_in_a_column_that_nobody_needs_is_a_bad_row(
    tmp_path: Path, name: str, ending: str
) -> None:
    path = write_table(tmp_path / f"a.{ending}", messages=[GOOD["messages"]] * 3, other=COLUMNS[name]())
    is_refused_or_skipped(path, "")


def test_a_smoke_run_takes_the_rows_of_a_table_that_are_good_whatever_else_is_in_its_columns(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", text=["a", "b", "c"], other=far_away(pyarrow.date32()))
    (small,) = first_rows(Data(train=[Source(path=str(path))], on_bad_row="skip"), tmp_path)
    (file,) = expand([small], "data.train")
    assert [row["text"] for _, row in rows(file, lambda error: None)] == ["a", "c"]


def test_arrow_columns_of_a_few_distinct_values_are_read(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.arrow", text=pyarrow.array(["a", "b", "a"] * 100).dictionary_encode())
    (file,) = expand([Source(path=str(path))], "data.train")
    assert [row["text"] for _, row in rows(file, lambda error: None)] == ["a", "b", "a"] * 100


HEADER = {"column_names": ["messages"], "column_encodings": ["json"], "column_sizes": [None]}


def write_shard(path: Path, samples: list[bytes], header: Any = HEADER) -> Path:
    """An MDS shard; a header that is no bytes is written as JSON."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    offsets = 4 * (len(samples) + 2) + len(encoded) + np.cumsum([0, *map(len, samples)])
    path.write_bytes(np.array([len(samples), *offsets], "<u4").tobytes() + encoded + b"".join(samples))
    return path


def sample(content: bytes, size: int | None = None) -> bytes:
    return (len(content) if size is None else size).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (sample(b"{oops"), "column 'messages' is not of the type json"),
        (sample(b"[" * 100_000), "not a sample of its shard"),
        (sample(b"\xff\xff"), "column 'messages' is not of the type json"),
        (sample(b"[]", size=9), "its columns have 13 bytes together, the sample 6"),
        (sample(b"[", size=9), "its columns have 13 bytes together, the sample 5"),
        (sample(b"[] ", size=2), "its columns have 6 bytes together, the sample 7"),
        (sample(b"[]", size=2**32 - 1), "its columns have 4294967299 bytes together"),
        (b"\1", "not a sample of its shard"),
        (b"", "not a sample of its shard"),
    ],
)
def test_a_bad_sample_of_an_mds_shard_is_one_sentence(tmp_path: Path, bad: bytes, reason: str) -> None:
    good = sample(json.dumps(GOOD["messages"]).encode())
    is_refused_or_skipped(write_shard(tmp_path / "a.mds", [good, bad, good]), reason)


@pytest.mark.parametrize(
    "header",
    [
        b"{oops",
        b"[" * 100_000,
        [1, 2],
        None,
        {},
        {**HEADER, "column_names": 5},
        {**HEADER, "column_names": [5]},
        {**HEADER, "column_encodings": [["json"]]},
        {**HEADER, "column_sizes": [-1]},
        {**HEADER, "column_sizes": ["8"]},
        {**HEADER, "column_sizes": []},
    ],
)
def test_an_mds_shard_with_a_wrong_header_is_a_damaged_file(tmp_path: Path, header: Any) -> None:
    path = write_shard(tmp_path / "a.mds", [sample(b"[]")], header)
    with pytest.raises(
        DataError, match=r"a\.mds: damaged or not of the kind its name says \(.*\)\. Replace the file\."
    ):
        build(path, "skip")


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ((0, 0, -8), "are no places in a shard"),
        ((-90, 0, 0), "are no places in a shard"),
        ((0, 0, 1), "it ends before its last sample"),
        ((0, -1, 0), ""),
    ],
)
def test_the_samples_of_a_shard_follow_each_other(tmp_path: Path, places: tuple[int, ...], why: str) -> None:
    """Each of three places is moved by so many bytes. A sample that is none is a bad row alone."""
    content = bytearray(write_shard(tmp_path / "a.mds", [sample(b"[]"), sample(b"[]")]).read_bytes())
    offsets = np.frombuffer(content, "<u4", 3, offset=4)
    content[4:16] = (offsets + np.array(places)).astype("<u4").tobytes()
    if not why:
        assert [len(one) for one in read_shard(bytes(content))[1]] == [5, 7]
        return
    with pytest.raises(ValueError, match=why):
        read_shard(bytes(content))


@pytest.mark.parametrize("ending", ["parquet", "arrow", "mds"])
@pytest.mark.parametrize("content", [b"", b"\0\0", b"PAR1", b"\xff" * 64, b"{}\n" * 50])
def test_a_file_of_another_kind_is_a_damaged_file(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.{ending}: damaged or not of the kind its name says"):
        build(tmp_path / f"a.{ending}", "skip")


DEEP = "[" * 100_000
INDICES: list[tuple[str, str]] = [
    *(("index.json", text) for text in (DEEP, "5", "null", "{}", '{"version": 2, "shards": 5}', "\ufeff{}")),
    ("index.json", '{"version": 2, "shards": [5]}'),
    ("index.json", '{"version": 2, "shards": [{"format": "mds", "zip_data": null, "raw_data": null}]}'),
    ("index.json", '{"version": 2, "shards": [{"format": "mds", "zip_data": null, "raw_data": {"basename": 5}}]}'),
    *((("state.json", text)) for text in (DEEP, "[]", '{"_data_files": 5}', '{"_data_files": [{"filename": null}]}')),
    *(
        ("state.json", json.dumps({"_data_files": [{"filename": name}]}))
        for name in ("../a.jsonl", "/etc/passwd", "", ".", "a\0b", "\ud800", "x/../../a.jsonl")
    ),
    *(("dataset_dict.json", text) for text in (DEEP, "{}", '{"splits": 5}', '{"splits": [5, null]}', '{"splits": []}')),
]


@pytest.mark.parametrize(("name", "content"), INDICES)
def test_a_folder_with_a_wrong_index_is_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(DataError, match=r"^data\.train\[0\]\.path: [^\n]*/set'"):
        build(tmp_path / "set", "skip")
