"""The manifest of a cached base is whole and leads to its own objects only, or it is damaged: then the base is read
anew.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.faulty import Fault, FaultyStore
from trainer.base.load import cache
from trainer.base.load.cache import CHUNK_BYTES, MANIFEST, BaseCache, parse_manifest, read_manifest, write_cache
from trainer.errors import Damaged, StorageError
from trainer.state.zero.division import Division, Span, share
from trainer.state.zero.partition import Partition
from trainer.store.store import Store, open_store

SIZES = {"a.weight": 2 * CHUNK_BYTES + 5, "a.absmax": 40, "a.nested_absmax": 8}
BYTES = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in SIZES.items()}


class Alone:
    """The only rank, and the one that holds all of a partition."""

    rank, place, division = 0, 0, Division(1, 1)

    def broadcast(self, value: Any) -> Any:
        return value

    def read_part(self, partition: Partition) -> Partition:
        return partition

    def brought_together(self, part: Partition, numel: int, spans: list[Any]) -> list[Any]:
        assert not spans
        return []

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def folder() -> Store:
    return written(open_store("memory://"))


def written(folder: Store, log: Callable[[str], None] = lambda text: None) -> Store:
    """`folder` with a cache of one module."""
    partitions = {name: Partition(nn.Parameter(data.float()), 0, len(data), data) for name, data in BYTES.items()}
    alone: Any = Alone()
    write_cache(folder, partitions, {"a": [0.5]}, alone, alone, log)
    return folder


def opened(folder: Store) -> BaseCache:
    return parse_manifest(folder, read_manifest(folder))


def reseal(folder: Store, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the manifest says, and its hash with it."""
    body = json.loads(folder.get(MANIFEST))["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    folder.put(MANIFEST, json.dumps({"sha256": digest, "body": body}).encode())


def test_what_was_written_is_read_back(folder: Store) -> None:
    sources = opened(folder).sources("a")
    assert sources.mean == [0.5]
    assert sources.parts["weight"].read(7, SIZES["a.weight"]) == bytes(BYTES["a.weight"][7:].tolist())


def test_a_reader_asks_for_whole_chunks_of_what_it_wants_alone(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of ranks reads what one rank has written, also over the borders of objects."""
    monkeypatch.setattr(cache, "_OBJECT_BYTES", 2 * CHUNK_BYTES)
    source = opened(written(open_store("memory://"))).sources("a").parts["weight"]
    for ranks in (1, 2, 7):
        found = b"".join(source.read(*share(source.shape[0], ranks, rank)) for rank in range(ranks))
        assert found == bytes(BYTES["a.weight"].tolist()), ranks
    before = folder.range_bytes
    opened(folder).sources("a").parts["weight"].read(CHUNK_BYTES // 2, CHUNK_BYTES // 2 + 9)
    assert folder.range_bytes - before == CHUNK_BYTES + 16


def test_a_chunk_in_the_place_of_another_is_damage(folder: Store) -> None:
    """Each has a hash that would be right, had it been written there."""
    key = largest(folder)
    content, each = bytes(folder.get(key)), CHUNK_BYTES + 16
    folder.put(key, content[each : 2 * each] + content[:each] + content[2 * each :])
    with pytest.raises(Damaged, match="is damaged between bytes 0 and"):
        opened(folder).sources("a").parts["weight"].read(0, 8)


def largest(folder: Store) -> str:
    return max((entry for entry in folder.list() if entry.key != MANIFEST), key=lambda entry: entry.size).key


def sized(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"][0].__setitem__(1, value)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda body: body.update(format=1),
    "objects outside of the cache": lambda body: body.update(attempt="../../run"),
    "objects of no name": lambda body: body.update(attempt=5),
    "a size of text": sized("5"),
    "a fraction": sized(40.0),
    "a negative size": sized(-1),
    "a size beyond every disk": sized(2**62),
    "no tensors": lambda body: body.update(tensors=[1]),
    "a tensor without a size": lambda body: body.update(tensors=[["a.weight"]]),
    "means of text": lambda body: body.update(means={"a": ["x"]}),
    "no means": lambda body: body.pop("means"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_says_something_else_is_damaged_though_its_hash_is_right(folder: Store, damage: str) -> None:
    reseal(folder, DAMAGES[damage])
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged"):
        opened(folder)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"sha256": "", "body": {}}']
)
def test_bytes_that_are_no_manifest_are_damaged(folder: Store, content: bytes) -> None:
    folder.put(MANIFEST, content)
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged"):
        opened(folder)


def test_a_module_that_is_missing_is_damage(folder: Store) -> None:
    reseal(folder, lambda body: body["tensors"].clear())
    with pytest.raises(Damaged, match="has no a"):
        opened(folder).sources("a")


@pytest.mark.parametrize("kept", [0, CHUNK_BYTES + 16, 2 * CHUNK_BYTES + 36])
def test_an_object_that_is_truncated_is_damage(folder: Store, kept: int) -> None:
    key = largest(folder)
    folder.put(key, bytes(folder.get(key))[:kept])
    with pytest.raises(Damaged):
        opened(folder).sources("a").parts["weight"].read(0, SIZES["a.weight"])


def test_a_cache_of_before_is_read(folder: Store) -> None:
    """Whoever changes one of these numbers gives the format another one, and so its caches another folder."""
    assert cache.FORMAT == 2
    assert (cache.CHUNK_BYTES, cache._OBJECT_BYTES, cache._HASH_BYTES) == (2**14, 2**24, 16)
    content, key = bytes(folder.get(largest(folder))), largest(folder)
    first = bytes(BYTES["a.weight"][: 2**14].tolist())
    assert content[:16] == hashlib.sha256(f"{key} 0 ".encode() + first).digest()[:16]
    assert content[16 : 16 + 2**14] == first
    assert key.endswith("/00000-00000.bin")


def test_what_is_gone_is_damage(folder: Store) -> None:
    cached = opened(folder)
    folder.delete(largest(folder))
    with pytest.raises(Damaged, match=r"bin is gone"):
        cached.sources("a").parts["weight"].read(0, 8)
    folder.delete(MANIFEST)
    with pytest.raises(Damaged, match=f"{MANIFEST} is gone"):
        read_manifest(folder)


def test_objects_that_no_manifest_names_are_removed(folder: Store) -> None:
    before = {entry.key for entry in folder.list()}
    folder.put("0badc0de/00000-00000.bin", b"of a start that was killed")
    said = list[str]()
    written(folder, said.append)  # another start, whose manifest comes too late
    assert {entry.key for entry in folder.list()} == before
    assert said == [f"the quantized base is cached in {folder.uri}"]


class Refusing(Fault):
    """Every operation of this name fails."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def around(self, name: str, operation: Callable[[], Any]) -> Any:
        self.operations.append(name)
        if name.startswith(self.name):
            raise StorageError(f"there was no answer to {name}.")
        return operation()


@pytest.mark.parametrize(
    ("fails", "kept", "said"),
    [
        ("put", 0, "not cached: there was no answer to put .*/00000-00000.bin"),
        ("create", 0, "not cached: there was no answer to create manifest.json"),
        ("list", len(SIZES) + 1, "cached in memory:"),
    ],
    ids=["objects", "the manifest", "the removal of others"],
)
def test_a_store_that_fails_loses_no_more_than_the_cache(fails: str, kept: int, said: str) -> None:
    """Its first error is told, and what was written is removed."""
    folder, lines = open_store("memory://"), list[str]()
    written(FaultyStore(folder, Refusing(fails)), lines.append)
    assert len(folder.list()) == kept
    assert [re.match(f"the quantized base is {said}", line) is not None for line in lines] == [True]


@pytest.mark.parametrize(("rank", "said"), [(0, ["the quantized base is not cached: its disk is full"]), (1, [])])
def test_the_first_rank_alone_commits_and_only_what_all_have_written(rank: int, said: list[str]) -> None:
    class Two(Alone):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value, "its disk is full"]

    two: Any = Two()
    two.rank = rank
    folder, lines = open_store("memory://"), list[str]()
    partitions = {name: Partition(nn.Parameter(data.float()), 0, len(data), data) for name, data in BYTES.items()}
    write_cache(folder, partitions, {"a": [0.5]}, two, two, lines.append)
    assert lines == said
    assert len(folder.list()) == (len(SIZES) if rank else 0)


def test_nothing_is_written_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_UPLOADS", 1)
    fault = Refusing("put")
    written(FaultyStore(open_store("memory://"), fault))
    assert [name.partition(" ")[0] for name in fault.operations] == ["put", "list"]


class OneOfSeveral(Alone):
    """A rank at a place among several, each with its part of a tensor of one byte a number."""

    def __init__(self, division: Division, place: int, data: Tensor) -> None:
        self.division, self.place, self._data = division, place, data
        self.spans = list[Span]()

    def read_part(self, partition: Partition) -> Partition:
        begin, end = self.division.read_at(self.place, partition.numel)
        return Partition(partition.parameter, begin, end, self._data[begin:end])

    def brought_together(self, part: Partition, numel: int, spans: list[Span]) -> list[tuple[Span, Tensor]]:
        assert numel == len(self._data)
        self.spans = spans
        return [(span, self._data[span.begin : span.end]) for span in spans if span.place == self.place]


@pytest.mark.parametrize("division", [Division(2, 1), Division(3, 1), Division(2, 2)])
def test_each_object_is_written_by_one_rank_and_shared_ones_by_one_of_those_that_have_some_of_it(
    division: Division, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_OBJECT_BYTES", 10)
    data = torch.arange(105, dtype=torch.uint8)
    whole = Partition(nn.Parameter(data.float()), 0, 105, data)
    for number in (0, 1):
        ranks = [OneOfSeveral(division, place, data) for place in range(division.readers)]
        by = [dict(cache._own_objects(number, whole, rank)) for rank in ranks]  # type: ignore[arg-type]
        assert sum(map(len, by)) == 11
        assert {part: content for found in by for part, content in found.items()} == {
            part: bytes(data[10 * part : 10 * part + 10].tolist()) for part in range(11)
        }
        assert all(rank.spans == ranks[0].spans for rank in ranks)
        for begin, end, place in ranks[0].spans:  # they take turns, from object to object and from tensor to tensor
            holders = [holder for holder, _, _ in division.places(begin, end, 105)]
            assert len(holders) == 2
            assert place == holders[(number + begin // 10) % 2]
