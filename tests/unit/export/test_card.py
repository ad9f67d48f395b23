"""A model card may become public: it names no place of the machine, and no file beside the checkpoint keeps it from
being written.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.material import Workshop, commit
from trainer.config import override
from trainer.errors import StorageError
from trainer.export import card
from trainer.export.card import CardContent, _metadata, head_usage, model_card, peft_usage, with_proof
from trainer.export.trained import trained_config
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("card"))
    commit(here.store.sub("done"), here.config("done"))
    return here


def written_card(run: Store, *paths: str) -> str:
    manifest = read_manifest(run, 4)
    config = trained_config(run, manifest)
    sources = [config.data.train[0].model_copy(update={"path": path}) for path in paths] or config.data.train
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": sources})})
    return model_card(run, config, manifest, CardContent("peft", "An adapter.", "adapter")).decode()


def test_bases_and_data_that_are_not_on_the_hub_are_named_without_their_place(workshop: Workshop) -> None:
    run = workshop.store.sub("done")
    assert str(workshop.folder) not in written_card(run)
    assert f"| base | {workshop.base.name} |" in written_card(run)
    assert ", rank: " in written_card(run)
    assert "reduction" not in written_card(run), "a setting of another method"
    places = ("/home/ann/secret/train.jsonl", "s3://ours/secret/more-*.jsonl", "/home/ann/shards/", "hf://me/data")
    told = written_card(run, *places)
    assert "(train.jsonl, more-*.jsonl, shards, hf://me/data)" in told
    assert "\ndatasets:\n- me/data\n" in told
    assert "datasets:" not in written_card(run, places[0])
    assert "secret" not in told


def test_a_card_of_the_base_that_cannot_be_read_names_no_licence(workshop: Workshop) -> None:
    readme = workshop.base / "README.md"
    readme.write_text("---\nlicense: llama3.1\n---\n")
    assert "license: llama3.1" in written_card(workshop.store.sub("done"))
    readme.write_text("---\nlicense: [llama3.1\n---\n")
    assert "license" not in written_card(workshop.store.sub("done"))


def test_a_set_that_was_trained_on_is_called_so(workshop: Workshop) -> None:
    run = workshop.store.sub("done")
    of = {"documents": 9, "trained_on": 7, "base": {"loss": 3.0}, "adapter": {"loss": 1.0, "perplexity": 2.7183}}
    run.put(layout.evaluation(4), json.dumps({"step": 4, "sets": {"seen": of}}).encode())
    assert "| seen (7 of 9 documents are in the training data) | 3.0000 | 1.0000 | - | 2.7183 |" in written_card(run)


def test_a_damaged_evaluation_is_none(workshop: Workshop) -> None:
    run = workshop.store.sub("done")
    run.put(layout.evaluation(4), b'{"sets": ')
    assert "It was not evaluated against its base" in written_card(run)


def test_it_says_what_the_checkpoint_was_made_with_and_what_it_is_not_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workshop.store.sub("done")
    manifest = read_manifest(run, 4)
    config = trained_config(run, manifest)
    content = CardContent("peft", "An adapter.", "adapter")
    order = {**manifest.order, "seed": 77, "sequence_length": 4321}
    begun = {**manifest.base, "start": "/home/ann/runs/first/checkpoints/step-000000012"}
    then = replace(manifest, order=order, base=begun, eval_loss=1.23456)
    told = model_card(run, config, then, content).decode()
    for fact in (
        "| seed | 77 |",
        "| sequence length | 4321 |",
        "| evaluation loss | 1.2346 |",
        "| begun from | first@12 |",
    ):
        assert fact in told
    assert "/home/ann" not in told
    assert "None" not in told
    assert f"It was trained over that base {config.quant.held.in_words}." in told
    assert "of no use over the whole base" not in told
    part = override(config, "model.layers=1", "run.name=left")
    cut = model_card(run, part.model_copy(update={"run": part.run.model_copy(update={"name": "a|b"})}), then, content)
    assert "It was trained over the first 1 layer of its base alone (model.layers)" in cut.decode()
    assert "| run | a\\|b |" in cut.decode()
    monkeypatch.setattr(card, "base_files", lambda model: workshop.base)
    known = config.model_copy(update={"model": config.model.model_copy(update={"base": "me/b"})})
    metadata = _metadata(known, content)
    assert (metadata.base_model, metadata["base_model_relation"]) == ("me/b", "adapter")
    assert _metadata(config, content).base_model is None
    assert "base_model_relation" not in _metadata(config, content).to_dict(), (
        "the Hub knows relations to its own models"
    )


def test_its_lines_make_the_class_with_the_head_and_the_rows_of_new_tokens() -> None:
    def lines(several: bool, labels: tuple[str, ...], sees: str = "") -> str:
        head: Any = SimpleNamespace(
            head=SimpleNamespace(transformers_class="AutoModelForSequenceClassification", several=several),
            labels=labels,
            outputs=max(1, len(labels)),
        )
        return head_usage(head, sees=sees)

    assert 'problem_type="multi_label_classification"' in lines(True, ("a", "b"))
    assert "problem_type" not in lines(False, ("a", "b"))
    assert "id2label={0: 'a', 1: 'b'}" in lines(False, ("a", "b"))
    assert "num_labels=1" in lines(False, ())
    assert "tokenizer = AutoTokenizer" in lines(False, ())
    seen = lines(False, (), sees="image")
    assert 'processor = AutoProcessor.from_pretrained("FOLDER")' in seen
    assert "config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id" in seen
    grown = peft_usage("Gemma3ForConditionalGeneration", grows=True)
    assert grown.index("base.resize_token_embeddings(len(tokenizer))") < grown.index(
        "model = PeftModel.from_pretrained"
    )
    assert "resize" not in peft_usage("Gemma3ForConditionalGeneration")


@pytest.mark.parametrize(
    ("takes", "sees", "asked"),
    [
        (("text", "image", "video"), "video", "video.mp4"),
        (("text", "image", "video"), "image", "picture.jpg"),
        (("text", "video"), "image", "video.mp4"),
        (("text",), "audio", "sound.wav"),
        (None, "video", "picture.jpg"),
    ],
)
def test_its_lines_ask_about_what_the_run_has_seen_as_far_as_the_class_takes_it(
    takes: tuple[str, ...] | None, sees: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SimpleNamespace() if takes is None else SimpleNamespace(input_modalities=takes)
    monkeypatch.setattr("transformers.OwnModel", whole, raising=False)
    files = {"picture.jpg", "video.mp4", "sound.wav"}
    for lines in (card.model_usage("OwnModel", sees=sees), peft_usage("OwnModel", sees=sees)):
        assert {file for file in files if file in lines} == {asked}


def test_its_lines_ask_about_the_kind_of_file_that_the_rows_have_most_of(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workshop.store.sub("done")
    manifest, asked = read_manifest(run, 4), list[Any]()
    config = trained_config(run, manifest)
    seeing = config.model_copy(update={"data": config.data.model_copy(update={"format": "pictures"})})
    data = SimpleNamespace(manifest=SimpleNamespace(sources=[SimpleNamespace(tokens=5)]))
    found: Any = SimpleNamespace(entries={"modality": np.array([0, 1, 0])}, each=[1, 3, 1])
    monkeypatch.setattr("trainer.data.dataset.dataset.open_chapter", lambda *of: asked.append(of[1:]) or data)
    monkeypatch.setattr("trainer.data.dataset.pictures.sampled_files", lambda data, weights: found)
    assert card.sees(run, config, manifest) == ""
    assert asked == []
    assert card.sees(run, seeing, manifest) == "video"
    assert asked == [(manifest.dataset, 0)]
    found.each = [2, 3, 2]
    assert card.sees(run, seeing, manifest) == "image"

    def gone(*_: Any) -> Any:
        raise StorageError("it was removed")

    monkeypatch.setattr("trainer.data.dataset.dataset.open_chapter", gone)
    assert card.sees(run, seeing, manifest) == "image"


def test_it_says_whether_the_export_was_proven(workshop: Workshop) -> None:
    written = written_card(workshop.store.sub("done"))
    assert "It was not compared with the trained model" in written
    proven = with_proof(written.encode(), "KL 0.1").decode()
    assert "\n\n## Proof\n\nIt was compared with the trained model: KL 0.1.\n\n## Limitations\n" in proven
    assert "not compared" not in proven
    assert with_proof(proven.encode(), None).decode() == written
    assert with_proof(b"My own weights.", "KL 0.1") == b"My own weights."
