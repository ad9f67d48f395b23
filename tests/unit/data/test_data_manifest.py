"""The objects beside compiled tokens: sealed, looked at for sense, and named when they are damaged."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.data.compile.prepare import prepare_start
from trainer.data.dataset.chapters import Chapters, open_chapters
from trainer.data.dataset.dataset import _check_index, open_chapter, open_dataset
from trainer.data.dataset.manifest import Counters, LeftOut, add_left_out, read_manifest, read_record
from trainer.errors import Damaged, NotFound, StorageError
from trainer.run import layout
from trainer.store.json_text import digest_of
from trainer.store.store import Store, open_store

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def dataset(shop: Workshop) -> Store:
    """The folder of a compiled data set."""
    return shop.store.sub(layout.dataset(shop.prepare(shop.config("sealed")).train))


def rewrite(folder: Store, key: str, change: Change, *, kept_seal: bool) -> None:
    tree = json.loads(folder.get(key))
    assert len(tree["sha256"]) == 64
    change(tree)
    if not kept_seal:  # as its writer would have, had it written this
        del tree["sha256"]
        tree["sha256"] = digest_of(tree)
    folder.put(key, json.dumps(tree).encode())


def opened(shop: Workshop, folder: Store) -> Any:
    return open_dataset(shop.store, folder.uri.rpartition("/")[2])


def test_what_only_the_seal_can_tell_is_damage(shop: Workshop, dataset: Store) -> None:
    rewrite(dataset, "manifest.json", lambda tree: tree["counters"].update(rows=7), kept_seal=True)
    with pytest.raises(
        Damaged, match=r"manifest\.json is damaged \(its content does not match its sha256\)\. Delete .*/data/\w+,"
    ):
        opened(shop, dataset)


def first(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["shards"][0]


def column(tree: dict[str, Any]) -> dict[str, Any]:
    """A column of the first shard's documents."""
    file = first(tree)["blocks_file"]
    return {"dtype": "<u4", "per": "document", "values_file": file, "blocks_file": file}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree: first(tree)["tokens_file"].update(key="../../x"), "shards.0.tokens_file.key"),
        (lambda tree: first(tree)["blocks_file"].update(key="/etc/passwd"), "shards.0.blocks_file.key"),
        (lambda tree: first(tree)["documents_file"].update(sha256="x"), "shards.0.documents_file.sha256"),
        (lambda tree: first(tree).update(documents=61), "the sizes of its files"),
        (lambda tree: first(tree).update(source=1), "a shard belongs to a source"),
        (lambda tree: first(tree).update(chapter=1), "a shard belongs to a source or a chapter"),
        (
            lambda tree: tree.update(chapters=2, shards=[first(tree) | {"chapter": chapter} for chapter in (1, 0)]),
            "its shards are not in the order of their chapters",
        ),
        (
            lambda tree: tree.update(shards=[first(tree), first(tree) | {"columns": {"a": column(tree)}}]),
            "its shards have not the same columns",
        ),
        (lambda tree: tree.update(documents=61), "the documents of its shards do not add up"),
        (lambda tree: tree["sources"][0].update(tokens=1), "the tokens of its shards do not add up"),
        (lambda tree: first(tree).update(targets=1), "the targets of its shards do not add up"),
        (lambda tree: tree.update(tokens=10**30), "tokens"),
        (lambda tree: tree.update(tokens=True), "tokens"),
        (lambda tree: tree.update(chapters=0), "chapters"),
        (lambda tree: tree.update(documents=-1), "documents"),
        (lambda tree: tree.update(shards=None), "shards"),
        (lambda tree: tree.update(fingerprint="../../x"), "it is the manifest of the data set '../../x'"),
        (lambda tree: tree.update(more=1), "more"),
        (lambda tree: tree.pop("sources"), "sources"),
        (lambda tree: tree.update(format="three"), "format"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_damage(shop: Workshop, dataset: Store, change: Change, reason: str) -> None:
    rewrite(dataset, "manifest.json", change, kept_seal=False)
    with pytest.raises(Damaged, match=r"manifest\.json is damaged \(.*\)\. Delete ") as found:
        opened(shop, dataset)
    assert reason in str(found.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 100_000, b'{"format": 3}'])
def test_what_is_no_manifest_is_damage_for_whoever_looks(shop: Workshop, dataset: Store, content: bytes) -> None:
    dataset.put("manifest.json", content)
    with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
        opened(shop, dataset)
    with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
        shop.prepare(shop.config("sealed"))


@pytest.mark.parametrize("other", [2, 4])
def test_another_format_is_no_damage(shop: Workshop, dataset: Store, other: int) -> None:
    dataset.put("manifest.json", json.dumps({"format": other, "other": 1}).encode())
    with pytest.raises(StorageError, match=f"has format {other}, but 3 is needed") as found:
        opened(shop, dataset)
    assert not isinstance(found.value, Damaged)


@pytest.mark.usefixtures("chapters")
def test_the_manifest_of_a_chapter_is_sealed_too(shop: Workshop) -> None:
    config = shop.config("chapters")
    datasets, _ = prepare_start(config, resolve_base(config.model), shop.store)
    folder = shop.store.sub(layout.dataset(datasets.train))
    rewrite(folder, "chapter-00000.json", lambda tree: tree["counters"].update(rows=7), kept_seal=True)
    for look in (open_chapter, read_manifest):
        with pytest.raises(Damaged, match=r"chapter-00000\.json is damaged"):
            look(shop.store, datasets.train, 0)
    with pytest.raises(Damaged, match=r"chapter-00000\.json is damaged"):
        open_chapters(shop.store, datasets.train, shop.store.sub("chapters"))


@pytest.mark.usefixtures("chapters")
@pytest.mark.parametrize("content", [b"{", b'{"shard": 5}', None])
def test_a_damaged_journal_is_compiled_again(shop: Workshop, content: bytes | None) -> None:
    """None: a sealed one whose counts are others."""
    config = shop.config("journal")
    expected = shop.prepare(config).train
    reference = read_manifest(shop.store, expected)
    shop.store.delete_folder(layout.dataset(expected))
    prepare_start(config, resolve_base(config.model), shop.store)
    folder = shop.store.sub(layout.dataset(expected))
    if content is None:
        rewrite(folder, "progress-00000.json", lambda tree: tree["counters"].update(rows=999), kept_seal=True)
    else:
        folder.put("progress-00000.json", content)
    assert shop.prepare(config).train == expected
    assert read_manifest(shop.store, expected) == reference


def test_bins_that_are_damaged_are_counted_again(shop: Workshop) -> None:
    config = shop.config("bins", "train.epochs=2", "train.steps=null")
    expected = shop.prepare(config)
    folder = shop.store.sub(layout.dataset(expected.train))
    (key,) = (entry.key for entry in folder.list() if entry.key.startswith("bins-"))
    for content in (b"{", b'{"bins": ["x"], "order": {}}', folder.get(key).replace(b'"bins": [', b'"bins": [ 9,')):
        folder.put(key, content)
        assert shop.prepare(config) == expected


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000])
def test_a_damaged_word_that_no_more_data_comes_is_named(shop: Workshop, content: bytes) -> None:
    datasets = shop.prepare(shop.config("end"))
    run = shop.store.sub("end")
    run.put(layout.NO_MORE_DATA, content)
    found = open_chapters(shop.store, datasets.train, run)

    def missing(chapter: int) -> Any:
        raise NotFound(str(chapter))

    chapters = Chapters(2, missing, found._given_up)
    try:
        with pytest.raises(Damaged, match="is damaged: it does not say why the data ends"):
            chapters.get(1)
    finally:
        chapters.close()
        found.close()


def test_a_seal_covers_everything() -> None:
    folder, sealed = open_store("memory://seal"), Counters(rows=5).sealed()
    folder.put("y.json", sealed)
    assert read_record(Counters, folder, "y.json") == Counters(rows=5)
    folder.put("y.json", sealed.replace(b'"rows": 5', b'"rows": 6'))
    with pytest.raises(Damaged, match=r"memory://seal/y\.json is damaged .* Delete memory://seal, and"):
        read_record(Counters, folder, "y.json")
    folder.put("y.json", b'{"rows": 5}')
    with pytest.raises(Damaged, match="its content does not match its sha256"):
        read_record(Counters, folder, "y.json")


def test_names_of_what_is_left_out_are_the_first_and_each_is_counted_to_the_end() -> None:
    total = dict[str, LeftOut]()
    for row in range(5):
        add_left_out(total, {f"field {number}": LeftOut(rows=1, examples=[f"a:{row}"]) for number in range(25)})
    assert total == {f"field {number}": LeftOut(rows=5, examples=["a:0", "a:1", "a:2"]) for number in range(20)}


@pytest.mark.parametrize(
    ("offsets", "firsts", "is_whole"),
    [
        ([0, 3, 5, 9], [0, 1], True),
        ([0, 3, 3, 9], [0], False),  # a document without tokens
        ([1, 3, 5, 9], [0], False),
        ([0, 3, 5, 8], [0], False),
        ([0, 3, 5, 9], [1], False),
        ([0, 3, 5, 9], [0, 0], False),
        ([0, 3, 5, 9], [0, 3], False),  # a block without documents
    ],
)
def test_documents_and_blocks_reach_from_the_first_token_of_a_shard_to_its_last(
    offsets: list[int], firsts: list[int], is_whole: bool
) -> None:
    shard: Any = SimpleNamespace(documents=3, tokens=9, documents_file=SimpleNamespace(key="documents-0.bin"))
    given = open_store("memory://"), shard, np.array(offsets, np.uint64), np.array(firsts, np.uint64)
    with nullcontext() if is_whole else pytest.raises(Damaged, match="documents-0.bin is damaged"):
        _check_index(*given)
