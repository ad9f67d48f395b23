"""Rows of every format, and everything written beside compiled tokens, with any damage: a sentence and its exit code,
or sound.

A fault that a fuzzer found once has a case of its own in test_data_hostile.py and test_data_manifest.py.
"""

import datetime
import gzip
import io
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compiled import compile_dataset
from tests.material import byte_tokenizer
from trainer.config import Data
from trainer.data.compile.encode import BatchEncoder
from trainer.data.dataset.dataset import open_chapter, open_dataset
from trainer.data.source.files import expand
from trainer.data.source.reading import EVERYTHING, Part
from trainer.data.source.rows import Batch, Lines
from trainer.errors import CapstanError, DataError, StorageError
from trainer.store.json_text import digest_of
from trainer.store.store import Store, open_store

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo ä"}]
FINGERPRINT = "f" * 20
LONGEST_SECONDS = 10.0
# Bounded in examples, so that it finds the same everywhere; together they take some 20 s.
fuzzed = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    template = tmp_path_factory.mktemp("fuzz") / "t.jinja"
    template.write_text(TEMPLATE)
    settings = {"template": str(template), "sequence_length": 64, "on_bad_row": "skip"}
    return Data.model_validate({"train": [{"path": "x.jsonl"}], "format": "chat", **settings})


numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.sampled_from([10**400, -1, 0, 1])
texts = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(
    ["user", "assistant", "tool", "gpt", "human", "{}"]
)
keys = texts | st.sampled_from(
    ["messages", "tools", "role", "content", "from", "value", "weight", "tool_calls", "function", "name", "arguments"]
)
anything = st.recursive(
    numbers | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": anything})}) | anything,
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": texts | anything, "content": texts | anything},
    optional={"weight": numbers | anything, "tool_calls": calls | anything, "name": anything, "from": texts | anything},
)
rows_ = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(messages | anything, max_size=4) | anything, "tools": anything, "id": anything}
)


@pytest.mark.parametrize("train_on", [{}, {"turns": "last"}, {"roles": "all"}], ids=str)
def test_any_row_becomes_a_document_or_one_line_of_why_not(data: Data, train_on: dict[str, str]) -> None:
    encoders = [
        BatchEncoder(
            data.model_copy(update={"train_on": data.train_on.model_copy(update=train_on)}), byte_tokenizer(), part
        )
        for part in (EVERYTHING, Part(0.5))
    ]

    @fuzzed
    @given(st.lists(rows_ | anything, min_size=1, max_size=3))
    def encode(found: list[Any]) -> None:
        lines = [json.dumps(row).encode() + b"\n" for row in found]
        for encoder in encoders:
            encoded = encoder(Batch("a.jsonl", 1, Lines(lines, begins=True), 0))
            assert encoded.error is None
            assert encoded.counters.bad_rows == len(encoded.bad_rows)
            assert all(reason.startswith("a.jsonl:") and reason.isprintable() for reason in encoded.bad_rows)
            assert len(encoded.tokens) == encoded.lengths.sum()

    encode()


def a_table() -> pyarrow.Table:
    count = 40
    return pyarrow.table(
        {
            "messages": [TALK] * count,
            "when": [datetime.date(2020, 1, 1)] * count,
            "at": pyarrow.array([1] * count, pyarrow.timestamp("us")),
            "kind": pyarrow.array(["a", "b"] * (count // 2)).dictionary_encode(),
            "pairs": pyarrow.array([[("k", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        }
    )


def json_lines() -> bytes:
    return b"".join(json.dumps({"messages": TALK, "n": n}, ensure_ascii=False).encode() + b"\n" for n in range(40))


def parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(a_table(), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


def arrow() -> bytes:
    buffer, table = io.BytesIO(), a_table()
    with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table, max_chunksize=15)
    return buffer.getvalue()


def mds() -> bytes:
    samples = []
    for _ in range(40):
        talk = json.dumps(TALK).encode()
        samples.append(len(talk).to_bytes(4, "little") + b"\1" * 8 + talk)
    columns = {"column_names": ["n", "messages"], "column_encodings": ["int", "json"], "column_sizes": [8, None]}
    header = json.dumps(columns).encode()
    offsets = 4 * (len(samples) + 2) + len(header) + np.cumsum([0, *map(len, samples)])
    return np.array([len(samples), *offsets], "<u4").tobytes() + header + b"".join(samples)


FILES: dict[str, Callable[[], bytes]] = {
    "jsonl": json_lines,
    "jsonl.gz": lambda: gzip.compress(json_lines(), mtime=0),
    "jsonl.zst": lambda: zstandard.compress(json_lines()),
    "parquet": parquet,
    "arrow": arrow,
    "mds": mds,
    "mds.zstd": lambda: zstandard.compress(mds()),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes are others, or the end is missing, or a part comes twice."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
    kind, place = draw.randrange(10), draw.randrange(len(changed))
    return bytes(changed[:place] if kind == 0 else changed[:place] + changed[place // 2 :] if kind == 1 else changed)


def within_time(what: Callable[[], Any], allowed: type[CapstanError]) -> None:
    """`what` returns or raises one printable sentence of the `allowed` kind, soon."""
    began = time.monotonic()
    try:
        what()
    except CapstanError as error:
        if not isinstance(error, allowed) or not str(error).isprintable():
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert time.monotonic() - began < LONGEST_SECONDS


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_gives_rows_or_one_sentence(tmp_path: Path, data: Data, kind: str) -> None:
    content, path, tokenizer = FILES[kind](), tmp_path / f"a.{kind}", byte_tokenizer()
    given_ = data.model_copy(update={"train": [data.train[0].model_copy(update={"path": str(path)})]})
    for seed in range(60):
        path.write_bytes(damaged(content, random.Random(seed)) if seed else content)
        store = open_store("memory://")

        def build(store: Store = store) -> None:
            dataset = compile_dataset(given_, expand(given_.train, "data.train"), tokenizer, store, FINGERPRINT)
            assert dataset.manifest.counters.rows >= dataset.manifest.documents

        within_time(build, DataError)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """A folder with a compiled data set of two sources, and what a first chapter of it would have had."""
    folder = tmp_path_factory.mktemp("compiled")
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(json_lines())
    sources = [data.train[0].model_copy(update={"path": str(folder / name)}) for name in ("a.jsonl", "b.jsonl")]
    given_ = data.model_copy(update={"train": sources})
    store = open_store(str(folder / "store"))
    compile_dataset(given_, expand(given_.train, "data.train"), byte_tokenizer(), store, FINGERPRINT)
    return folder / "store"


def open_all(folder: Path) -> bytes:
    """All tokens of the data set, verified."""
    store = open_store(str(folder))
    dataset = open_dataset(store, FINGERPRINT)
    open_chapter(store, FINGERPRINT, 0)
    blocks = np.arange(len(dataset.blocks) - 1)
    return dataset.read(blocks).gather(np.arange(dataset.manifest.documents)).tobytes()


def is_refused_or_as_before(folder: Path, compiled: Path) -> None:
    def check() -> None:
        assert open_all(folder) == open_all(compiled)

    within_time(check, StorageError)


def test_a_damaged_object_of_a_data_set_is_named_or_makes_no_difference(compiled: Path, tmp_path: Path) -> None:
    for seed in range(150):
        draw = random.Random(seed)
        folder = shutil.copytree(compiled, tmp_path / str(seed))
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.write_bytes(damaged(path.read_bytes(), draw))
        is_refused_or_as_before(folder, compiled)
        shutil.rmtree(folder)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


@fuzzed
@given(st.data())
def test_a_manifest_with_anything_at_any_place_is_refused_or_makes_no_difference(
    compiled: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """With a seal, as whoever wrote it would have."""
    key = f"data/{FINGERPRINT}/manifest.json"
    tree = json.loads((compiled / key).read_text())
    del tree["sha256"]
    root = {"": tree}
    place = data.draw(st.sampled_from([("", *path) for path in places(tree)]))
    paths = st.sampled_from(["../x", "/etc/passwd", "a/../../b", "tokens-00001.bin", "", ".", "\0"])
    value = data.draw(anything | paths | st.integers(0, 2**70))
    node: Any = root
    for step in place[:-1]:
        node = node[step]
    node[place[-1]] = value
    folder = shutil.copytree(compiled, tmp_path_factory.mktemp("fuzzed") / "store")
    if isinstance(root[""], dict):
        with suppress(ValueError, RecursionError):
            root[""]["sha256"] = digest_of(root[""])
    (folder / key).write_text(json.dumps(root[""]))
    is_refused_or_as_before(folder, compiled)
    shutil.rmtree(folder)
