"""The manifest of a cached base is whole and leads to its own objects only, or it is damaged: then the base is read
anew.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer.base.load.cache import CHUNK_BYTES, MANIFEST, open_cache, write_cache
from trainer.errors import Damaged
from trainer.state.zero.partition import Partition
from trainer.store.store import Store, open_store

SIZES = {"a.weight": 2 * CHUNK_BYTES + 5, "a.absmax": 40, "a.nested_absmax": 8}
BYTES = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in SIZES.items()}


class Alone:
    """The only rank."""

    rank = 0

    def broadcast(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def folder() -> Store:
    return written(open_store("memory://"))


def written(folder: Store) -> Store:
    """`folder` with a cache of one module."""
    parameter = nn.Parameter(torch.empty(0))
    partitions = {name: Partition(parameter, 0, len(data), data) for name, data in BYTES.items()}
    ranks: Any = Alone()
    write_cache(folder, partitions, {"a": [0.5]}, 1, ranks, lambda text: None)
    return folder


def reseal(folder: Store, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the manifest says, and its hash with it."""
    body = json.loads(folder.get(MANIFEST))["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    folder.put(MANIFEST, json.dumps({"sha256": digest, "body": body}).encode())


def test_what_was_written_is_read_back(folder: Store) -> None:
    sources = open_cache(folder).sources("a")
    assert sources.mean == [0.5]
    assert sources.parts["weight"].read(7, SIZES["a.weight"]) == bytes(BYTES["a.weight"][7:].tolist())


def extent(index: int, value: Any, name: str = "a.weight") -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"][name][0].__setitem__(index, value)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda body: body.update(format=2),
    "a key outside of the cache": extent(2, "../../run/config.yaml"),
    "a key within it that is none of its objects": extent(2, MANIFEST),
    "a key that is no text": extent(2, 5),
    "a begin beyond the end": extent(0, 10**9),
    "a gap": extent(0, 1),
    "an end of text": extent(1, "5"),
    "a fraction": extent(1, 40.0, "a.absmax"),
    "a negative offset": extent(3, -1),
    "too few hashes": extent(4, "00"),
    "overlapping extents": lambda body: body["tensors"]["a.absmax"].append(
        [20, 40, "00000000/rank-00000-0000.bin", 0, "0" * 32]
    ),
    "no extents": lambda body: body.update(tensors=[1]),
    "an extent of another length": lambda body: body["tensors"].update({"a.weight": [[1, 2]]}),
    "means of text": lambda body: body.update(means={"a": ["x"]}),
    "no means": lambda body: body.pop("means"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_says_something_else_is_damaged_though_its_hash_is_right(folder: Store, damage: str) -> None:
    reseal(folder, DAMAGES[damage])
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged"):
        open_cache(folder)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"sha256": "", "body": {}}']
)
def test_bytes_that_are_no_manifest_are_damaged(folder: Store, content: bytes) -> None:
    folder.put(MANIFEST, content)
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged"):
        open_cache(folder)


def test_a_module_that_is_missing_is_damage(folder: Store) -> None:
    reseal(folder, lambda body: body["tensors"].clear())
    with pytest.raises(Damaged, match="has no a"):
        open_cache(folder).sources("a")


@pytest.mark.parametrize("kept", [0, CHUNK_BYTES, 2 * CHUNK_BYTES + 4])
def test_an_object_that_is_truncated_is_damage(folder: Store, kept: int) -> None:
    (key,) = (entry.key for entry in folder.list() if entry.key != MANIFEST)
    folder.put(key, bytes(folder.get(key))[:kept])
    with pytest.raises(Damaged):
        open_cache(folder).sources("a").parts["weight"].read(0, SIZES["a.weight"])
