"""Evaluation data that is trained on is refused, or said, whatever file it stands in and whatever of it is trained."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.material import Workshop, commit, make_data
from trainer.base.find.locate import resolve_base
from trainer.config import Config, override
from trainer.data.compile.compile import Progress, hash_documents
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.overlap import Overlap, overlap_of, refuse_overlaps
from trainer.errors import DataError
from trainer.evaluate.measured import trained_on
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.json_text import digest_of


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("overlap"))


def rows_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def evaluated_on(shop: Workshop, name: str, rows: list[str], *more: str) -> Config:
    path = shop.folder / f"{name}.jsonl"
    path.write_text("".join(rows))
    return shop.config(name, f"data.eval=[{{path: {path}}}]", "eval.every=5", *more)


def said(shop: Workshop, config: Config) -> list[str]:
    notes = list[str]()

    def progress(what: str, now: Progress) -> None:
        notes.extend(f"{what}: {note}" for note in now.notes)

    prepare(config, resolve_base(config.model), shop.store, progress)
    return notes


def test_the_training_data_in_another_file_and_order_is_refused(shop: Workshop) -> None:
    """Its parts are of two sources, each with a shard of its own."""
    rows, parts = rows_of(shop.data), [shop.folder / "first.jsonl", shop.folder / "second.jsonl"]
    for path, own in zip(parts, (rows[:45], rows[45:]), strict=True):
        path.write_text("".join(own))
    train = ", ".join(f"{{path: {path}}}" for path in parts)
    config = evaluated_on(shop, "copied", rows[::-1][:30], f"data.train=[{train}]")
    with pytest.raises(DataError, match=r"data\.eval: 30 of 30 documents \(100%\) are in the training data, too"):
        said(shop, config)


def test_the_same_text_of_which_something_else_is_trained_is_refused(shop: Workshop) -> None:
    texts = [{"text": row["prompt"] + row["completion"]} for row in map(json.loads, rows_of(shop.data))]
    path = shop.folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    config = shop.config("texts", f"eval.sets={{seen: {{path: {path}, format: text}}}}", "eval.every=5")
    with pytest.raises(DataError, match=r"eval\.sets\.seen: 60 of 60"):
        said(shop, config)


def test_some_shared_documents_are_said_once_they_were_counted_and_few_are_not(shop: Workshop) -> None:
    other = rows_of(make_data(shop.folder / "other.jsonl", documents=200, seed=8))
    config = evaluated_on(shop, "half", other[:30] + rows_of(shop.data)[:30])
    for _ in range(2):  # the second time by what is kept
        assert said(shop, config) == [
            "eval: 30 of 60 documents (50%) are in the training data, too: its loss is better than that of other text"
        ]
    assert not said(shop, evaluated_on(shop, "few", other + rows_of(shop.data)[:1]))


def test_nine_of_ten_documents_are_too_many(shop: Workshop) -> None:
    other = rows_of(make_data(shop.folder / "ten.jsonl", documents=10, seed=8))
    with pytest.raises(DataError, match=r"data\.eval: 54 of 60 documents \(90%\) are in the training data, too"):
        said(shop, evaluated_on(shop, "nine", other[:6] + rows_of(shop.data)[:54]))


def test_documents_are_counted_again_once_more_chapters_are_compiled(shop: Workshop) -> None:
    config = evaluated_on(shop, "later", rows_of(shop.data)[:20] + ['{"prompt": "zebra ", "completion": "x"}\n'] * 20)
    datasets = prepare(config, resolve_base(config.model), shop.store)
    folder, key = shop.store.sub(layout.dataset(datasets.train)), f"overlap-{datasets.eval}.json"
    for earlier in (2, 0, 1):  # of more chapters, of fewer, and of as many as there are
        folder.put(key, Overlap(shared=7, documents=40, chapters=earlier).sealed())
        found = overlap_of(shop.store, datasets.train, datasets.eval or "")
        assert found is not None
        assert found.shared == (7 if earlier == 1 else 20)


def test_data_that_was_compiled_without_hashes_is_not_judged(shop: Workshop) -> None:
    config = shop.config("older", "data.held_out=0.5", "eval.every=5")
    datasets = prepare(config, resolve_base(config.model), shop.store)
    folder = shop.store.sub(layout.dataset(datasets.train))
    manifest = json.loads(folder.get("manifest.json"))
    for shard in manifest["shards"]:
        del shard["hashes_file"]
    del manifest["sha256"]
    folder.put("manifest.json", json.dumps({**manifest, "sha256": digest_of(manifest)}).encode())
    folder.delete(f"overlap-{datasets.eval}.json")
    assert overlap_of(shop.store, datasets.train, datasets.eval or "") is None
    assert not list(refuse_overlaps(shop.store, datasets.train, {"eval": datasets.eval or ""}))


def test_a_hash_is_of_the_tokens_and_their_order_and_not_of_what_is_trained() -> None:
    tokens = np.array([5, 6, 7, 5, 6, 7, 7, 6, 5, 5], np.uint32)
    tokens[3:6] |= np.uint32(1 << 31)
    first, second, turned, short = hash_documents(tokens, np.array([3, 3, 3, 1]), {}).tolist()
    assert first == second
    assert len({first, turned, short}) == 3
    assert not len(hash_documents(tokens[:0], np.zeros(0, np.int64), {}))


def test_an_evaluation_counts_documents_of_which_the_run_that_was_begun_from_has_learnt(shop: Workshop) -> None:
    first, other = shop.config("first"), make_data(shop.folder / "other.jsonl", seed=11)
    commit(shop.store.sub("first"), first, dataset=shop.prepare(first).train)
    config = shop.config("second", f"data.train=[{{path: {other}}}]", "tuning.start=first")
    commit(shop.store.sub("second"), config, dataset=shop.prepare(config).train)
    manifest = read_manifest(shop.store.sub("second"), 4)
    for ours, theirs in ((9, 2), (3, 7)):
        seen = evaluated_on(shop, "seen", rows_of(shop.data)[:ours] + rows_of(other)[-theirs:])
        key = prepare(override(seen, f"data.train=[{{path: {other}}}]"), resolve_base(seen.model), shop.store).eval
        assert trained_on(shop.store, manifest, {"eval": str(key)}) == {"eval": max(ours, theirs)}
