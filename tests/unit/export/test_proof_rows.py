"""The parts of a proof: fixed rows of the run's data, and distances between distributions."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.material import Workshop, commit, make_data, make_pairs
from trainer.base.find.locate import resolve_base
from trainer.base.find.processor import PROMPTS
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.dataset import REJECTED_BIT, TARGET_BIT
from trainer.data.dataset.pictures import PICTURE, entries_in
from trainer.data.order import pictures
from trainer.errors import ConfigError, Damaged, DataError, StorageError
from trainer.export.proof import rows
from trainer.export.proof.rows import (
    ROWS,
    TARGETS,
    TOKENS,
    Probe,
    ProbeRow,
    _row,
    distance,
    find_probe,
    judged,
    training_rows,
)
from trainer.state.checkpoint.manifest import read_manifest


def probe_of(workshop: Workshop, *overrides: str, compiled: bool = True, most: int = ROWS) -> Probe:
    config, run = workshop.config("run", *overrides), workshop.store.sub("run")
    dataset = workshop.prepare(config).train if compiled else "gone"
    commit(run, config, dataset=dataset)
    return find_probe(run, config, read_manifest(run, 4), resolve_base(config.model), most)


def test_rows_are_documents_of_the_training_data_and_the_same_ones_at_every_call(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    probe = probe_of(workshop)
    assert (len(probe.rows), probe.origin) == (ROWS, "8 rows of the training data")
    again = find_probe(
        workshop.store.sub("run"),
        workshop.config("run"),
        read_manifest(workshop.store.sub("run"), 4),
        resolve_base(workshop.config("run").model),
    )
    for row, same in zip(probe.rows, again.rows, strict=True):
        assert torch.equal(row.tokens, same.tokens)
    tokenizer = load_tokenizer(resolve_base(workshop.config("run").model))
    documents = ["".join(json.loads(line).values()) for line in workshop.data.read_text().splitlines()]
    for row in probe.rows:
        assert torch.equal(row.tokens[0, row.places + 1], row.targets)
        assert tokenizer.decode(row.tokens[0], skip_special_tokens=True) in documents


def test_a_trained_token_that_begins_a_text_is_not_compared_as_nothing_predicts_it() -> None:
    row = _row(np.array([5 | TARGET_BIT, 6 | TARGET_BIT, 7, 8 | TARGET_BIT], np.uint32))
    assert row is not None
    assert (row.places.tolist(), row.targets.tolist()) == ([0, 2], [6, 8])
    assert _row(np.array([5 | TARGET_BIT, 6], np.uint32)) is None
    assert _row(np.array([5, 6], np.uint32)) is None


def test_rows_of_the_evaluation_data_go_first(tmp_path: Path) -> None:
    other = make_data(tmp_path / "other.jsonl", documents=12, seed=9)
    assert probe_of(Workshop(tmp_path), f"data.eval=[{{path: {other}}}]").origin == "8 rows of the evaluation data"


def test_the_end_of_a_long_document_counts_up_to_its_last_trained_token(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, max_position_embeddings=2048)
    row = {"prompt": "?" * 700, "completion": "!" * 300}
    workshop.data.write_text(json.dumps(row) + "\n")
    (found,) = probe_of(workshop, "data.sequence_length=1024").rows
    assert found.tokens.shape == (1, TOKENS)
    assert len(found.places) == TARGETS
    assert found.places[-1] == TOKENS - 2


def test_a_row_of_a_pair_is_its_chosen_answer(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    make_pairs(workshop.data)
    probe = probe_of(workshop, "data.format=preference", "objective.name=dpo", "data.sequence_length=96")
    tokenizer = load_tokenizer(resolve_base(workshop.config("run").model))
    pairs = map(json.loads, workshop.data.read_text().splitlines())
    chosen = [pair["prompt"] + pair["chosen"] for pair in pairs]
    assert len(probe.rows) == ROWS
    for row in probe.rows:
        assert tokenizer.decode(row.tokens[0], skip_special_tokens=True) in chosen


def test_a_row_of_a_pair_with_pictures_has_those_of_its_chosen_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents without pictures come behind it."""
    chosen, rejected = np.array([5, 6, 7, 8 | TARGET_BIT], np.uint32), np.array([5, 6, 7, 9 | TARGET_BIT], np.uint32)
    rejected[0] |= REJECTED_BIT
    entries = np.zeros(2, PICTURE)
    entries["begin"] = 1, 4  # the second is the first token of the rejected answer
    documents, given = {0: (chosen, entries[:0]), 1: (np.concatenate([chosen, rejected]), entries)}, list[Any]()

    def blocks(number: int) -> Any:
        stored, own = documents[number]
        values = own.view(np.uint8).reshape(len(own), PICTURE.itemsize)
        return SimpleNamespace(gather=lambda _: stored, gather_column=lambda name, _: {"picture": [values]}[name])

    class Reader:
        def __init__(self, *_: Any) -> None: ...

        def begin(self, values: Any, segments: Any, ids: Any, prompts: Any) -> Any:
            given.append((entries_in(values)["begin"].tolist(), segments, [own.tolist() for own in ids], prompts))
            return SimpleNamespace(arrived=lambda: [SimpleNamespace(inputs={"pixels": len(given)})])

    monkeypatch.setattr(
        rows, "_candidates", lambda data: [(np.array([number]), blocks(number)) for number in documents]
    )
    monkeypatch.setattr(rows, "read_processor", lambda *_: None)
    monkeypatch.setattr(pictures, "PictureReader", Reader)
    base: Any = SimpleNamespace(directory=None, name="")
    data: Any = SimpleNamespace(store=SimpleNamespace(uri="memory://data"))
    pictured, plain = rows._seen_rows(data, base, 8)
    assert given == [([1], [0], [[5, 6, 7, 8]], [3]), ([], [], [[5, 6, 7, 8]], [3])]
    assert (pictured.entries, pictured.folder, pictured.pictures) == (
        entries[:1].tobytes(),
        "memory://data",
        {"pixels": 1},
    )
    assert (pictured.tokens.tolist(), pictured.places.tolist(), plain.entries) == ([[5, 6, 7, 8]], [2], b"")
    assert len(rows._seen_rows(data, base, 1)) == 1


def test_rows_with_files_are_counted_by_what_these_are(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("torchvision")
    from tests.hearing import hearing_base, make_sounding
    from tests.seeing import trained_over

    base, rows = hearing_base(tmp_path / "hears"), make_sounding(tmp_path / "rows", 8)
    workshop, settings = Workshop(tmp_path), (*trained_over(base, rows), "data.format=pictures")
    probe = probe_of(workshop, *settings, "data.sequence_length=160")
    assert probe.origin == "8 rows of the training data, 6 of them with sounds"
    few = probe_of(workshop, *settings, "data.sequence_length=160", most=6)
    assert few.origin == "6 rows of the training data, 6 of them with sounds", "those with files go first"


def test_without_compiled_data_tokens_take_their_place_and_it_is_said(tmp_path: Path) -> None:
    probe = probe_of(Workshop(tmp_path), compiled=False)
    assert probe.origin == "tokens 3 to 66, as the run's compiled data is gone"
    assert torch.equal(probe.rows[0].targets, torch.arange(4, 67))


def test_a_base_that_reads_prompts_reads_the_first_half_of_such_tokens_as_one(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    config, run = workshop.config("run"), workshop.store.sub("run")
    commit(run, config, dataset="gone")
    base = resolve_base(config.model)
    reading: Any = SimpleNamespace(
        architecture=SimpleNamespace(vocabulary=400, reads_prompts=True), directory=base.directory, name=base.name
    )
    (row,) = find_probe(run, config, read_manifest(run, 4), reading).rows
    (kinds,) = row.pictures.values()
    assert list(row.pictures) == [PROMPTS]
    assert kinds.tolist() == [[0] * 30 + [1] * 34]


def test_rows_for_gptq_are_the_trained_texts_or_it_is_said_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    config, run = workshop.config("run"), workshop.store.sub("run")
    commit(run, config, dataset=workshop.prepare(config).train)
    manifest = read_manifest(run, 4)
    found = training_rows(run, config, manifest, 5)
    assert [row.tolist() for row in found] == [row.tokens[0].tolist() for row in probe_of(workshop, most=5).rows]
    for data, sentence in (
        ({"format": "pictures"}, "and the run's rows have pictures, videos or sounds. Leave rounding out."),
        ({}, "which has none. Leave rounding out."),
    ):
        monkeypatch.setattr(rows, "_rows", lambda *_: [])
        other = config.model_copy(update={"data": config.data.model_copy(update=data)})
        with pytest.raises(ConfigError, match=sentence):
            training_rows(run, other, manifest, 5)
    with pytest.raises(ConfigError, match=r"training data, which cannot be read \(.*\) Leave rounding out"):
        training_rows(run, config, replace(manifest, dataset="gone"), 5)


def test_rows_whose_sources_are_gone_are_those_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = SimpleNamespace(dataset="trained")
    nothing: Any = None
    for error in (ConfigError("gone"), DataError("gone"), StorageError("gone")):

        def fail(config: Any, base: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(rows, "locate", fail)
        assert list(rows._datasets(nothing, given, nothing, nothing)) == [("training", "trained")]
    monkeypatch.setattr(rows, "locate", lambda config, base: {"train": "t", "eval": "e"})
    assert list(rows._datasets(nothing, given, nothing, nothing)) == [("evaluation", "e"), ("training", "trained")]


def test_data_that_is_damaged_is_left_and_tokens_are_those_of_a_small_vocabulary_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = list[str]()

    def damaged(root: Any, fingerprint: str, chapter: int) -> Any:
        tried.append(fingerprint)
        raise Damaged("it has other bytes")

    monkeypatch.setattr(rows, "_datasets", lambda *_: [("evaluation", "e"), ("training", "t")])
    monkeypatch.setattr(rows, "open_chapter", damaged)
    monkeypatch.setattr(rows, "store_of", lambda folder: folder)
    architecture = SimpleNamespace(vocabulary=40, reads_prompts=False)
    nothing: Any = None
    (row,) = find_probe(nothing, nothing, nothing, SimpleNamespace(architecture=architecture)).rows  # type: ignore[arg-type]
    assert tried == ["e", "t"]
    assert row.tokens.tolist() == [[number % 40 for number in range(3, 67)]]
    assert torch.equal(row.targets, row.tokens[0, row.places + 1])


@pytest.mark.parametrize(
    ("several", "outputs", "places"), [(False, 1, [1, 4]), (True, 3, [1]), (True, 1, [1]), (False, 3, None)]
)
def test_outputs_of_a_head_that_stand_for_themselves_are_compared_all_at_once(
    several: bool, outputs: int, places: list[int] | None
) -> None:
    probe = Probe([ProbeRow(torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([1, 4]), torch.tensor([7, 2]))], "a row")
    head: Any = SimpleNamespace(head=SimpleNamespace(several=several), outputs=outputs)
    (row,) = judged(probe, head).rows
    of_words = (row.places.tolist(), row.targets.tolist(), row.beside_zero)
    assert of_words == (([1, 4], [7, 2], False) if places is None else (places, [0] * len(places), True))
    assert judged(probe, None) is probe


def test_the_distance_is_the_mean_divergence_and_the_trained_tokens_log_probabilities() -> None:
    row = ProbeRow(torch.tensor([[5, 0, 1]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    one = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    found = distance([one], [other + 7], [row])  # a constant on all logits changes nothing
    assert found.kl == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert found.log_prob == pytest.approx(math.log(1.5) / 2)
    assert distance([one], [one], [row]) == (0, 0)
