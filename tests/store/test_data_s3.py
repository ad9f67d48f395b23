"""Compiled data on a real S3 server (SeaweedFS): the same order as from a disk, through restarts, refusals and
damage.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from launcher.smoke.local_s3 import S3Server
from tests.compiled import compile_dataset
from tests.material import byte_tokenizer
from trainer.config import Data
from trainer.data.compile.fingerprint import fingerprint
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import Dataset, open_dataset
from trainer.data.order.settings import Order, Position
from trainer.data.order.stream import Stream
from trainer.data.source.files import SourceFile, expand
from trainer.errors import DataError, NotFound, StorageError
from trainer.store.store import Buffer, Store, open_store

DOCUMENTS = 2000
FINGERPRINT = "f" * 20
TOKENS = f"data/{FINGERPRINT}/tokens-00000.bin"


def source(path: str, **options: object) -> tuple[Data, list[SourceFile]]:
    data = Data.model_validate({"train": [{"path": path}], "format": "text", "sequence_length": 256, **options})
    return data, expand(data.train, "data.train")


def build(path: str, store: Store) -> Dataset:
    return compile_dataset(*source(path), byte_tokenizer(), store, FINGERPRINT)


def stream(dataset: Dataset) -> Stream:
    order = Order((1.0,), sequence_length=256, packing=True, seed=3)
    return Stream(whole(dataset), order, global_batch=8, micro_batch=1, rank=0, world_size=1, epochs=1)


def rows(dataset: Dataset) -> list[list[int]]:
    return [batch.input.input_ids[0].tolist() for step in stream(dataset).epoch(0) for batch in step]


@pytest.fixture
def lines(tmp_path: Path) -> bytes:
    texts = (f"document {number} " * (1 + number % 7) for number in range(DOCUMENTS))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def expected(tmp_path: Path, lines: bytes) -> list[list[int]]:
    """The rows as they come from a disk."""
    (tmp_path / "a.jsonl").write_bytes(lines)
    return rows(build(str(tmp_path / "a.jsonl"), open_store(str(tmp_path / "store"))))


def in_bucket(server: S3Server, name: str, lines: bytes) -> Dataset:
    """Source and data set in a folder of a bucket."""
    store = open_store(f"{server.uri('data')}/{name}")
    store.put("sources/a.jsonl", lines)
    return build(f"{store.uri}/sources/*.jsonl", store)


def test_the_order_from_a_bucket_is_the_order_from_a_disk(
    s3: S3Server, lines: bytes, expected: list[list[int]]
) -> None:
    assert rows(in_bucket(s3, "order", lines)) == expected


def test_reading_goes_on_when_the_server_comes_back_and_the_retries_are_counted(
    own_server: S3Server, lines: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.order.order.WINDOW_BLOCKS", 1)
    dataset = in_bucket(own_server, "restart", lines)
    steps = stream(dataset).epoch(0)
    read = [next(steps)]
    own_server.kill()
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, steps)
        while not dataset.reads.retried:
            assert not wait([rest], timeout=0.02).done
        own_server.start()
        read += rest.result(timeout=60)
    assert sorted(number for step in read for batch in step for number in batch.documents) == list(range(DOCUMENTS))


def test_a_wrong_key_is_refused_at_once(s3: S3Server, lines: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = in_bucket(s3, "key", lines)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store(dataset.store.uri.rpartition("/data/")[0])
    began = time.monotonic()
    with pytest.raises(StorageError, match="403 Forbidden"):
        open_dataset(store, FINGERPRINT)
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: .*403 Forbidden"):
        source(f"{store.uri}/sources/*.jsonl")
    with pytest.raises(StorageError, match="403 Forbidden"):
        stream(Dataset(**{**vars(dataset), "store": store.sub(f"data/{FINGERPRINT}")})).step(Position())
    assert time.monotonic() - began < 60  # a refusal that is tried again takes minutes
    assert dataset.reads.retried == 0


def test_damage_is_named_with_object_and_range(s3: S3Server, lines: bytes) -> None:
    dataset = in_bucket(s3, "damage", lines)
    store = open_store(dataset.store.uri.rpartition("/data/")[0])
    whole = store.get(TOKENS)

    flipped = bytearray(whole)
    flipped[100] ^= 1
    store.put(TOKENS, bytes(flipped))
    with pytest.raises(StorageError, match=rf"{TOKENS}: bytes 0 to \d+ are not what was written .* made again"):
        rows(open_dataset(store, FINGERPRINT))
    store.put(TOKENS, whole[:-8])
    with pytest.raises(StorageError, match=rf"{TOKENS}: .* truncated"):
        rows(open_dataset(store, FINGERPRINT))
    store.delete(TOKENS)
    with pytest.raises(NotFound, match=rf"{TOKENS} does not exist"):
        rows(open_dataset(store, FINGERPRINT))


def test_a_block_that_was_damaged_on_its_way_is_fetched_once_more(
    s3: S3Server, lines: bytes, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = in_bucket(s3, "way", lines)
    plain = Store.get_ranges

    def damaged(self: Store, key: str, starts: list[int], ends: list[int]) -> list[Buffer]:
        first, *others = plain(self, key, starts, ends)
        return [bytes([first[0] ^ 1]) + bytes(first[1:]), *others]

    monkeypatch.setattr(Store, "get_ranges", damaged)
    assert rows(dataset) == expected
    assert dataset.reads.refetched == 1  # of its only window


def test_a_changed_source_is_another_data_set(s3: S3Server, lines: bytes) -> None:
    store = open_store(f"{s3.uri('data')}/changed")
    store.put("a.jsonl", lines)
    data, files = source(f"{store.uri}/a.jsonl")
    before = fingerprint(data, files, {})
    store.put("a.jsonl", lines[:-20] + lines[-20:].upper())
    assert fingerprint(*source(f"{store.uri}/a.jsonl"), {}) != before
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        compile_dataset(data, files, byte_tokenizer(), store, before)
