"""Heads learn beside LoRA as by transformers and PEFT, whatever the ranks and the packing, and are exported as PEFT
keeps them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist import evaluating, heads, runs
from tests.dist.launch import launch
from tests.dist.proofs import proof_of
from tests.material import Workshop, make_classified, make_pairs, make_tagged
from trainer.config import Config, dump_config
from trainer.data.compile.inputs import with_labels
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store

CLASSES = ["bad", "good", "so-so"]
NAMES = ["bee", "cat", "no"]


@pytest.fixture(scope="module")
def texts(workshop: Workshop) -> Path:
    return make_classified(workshop.folder / "classified.jsonl")


def classifying(workshop: Workshop, texts: Path, name: str, *overrides: str) -> Config:
    return workshop.config(
        name,
        "objective.name=classification",
        f"data.train=[{{path: {texts}}}]",
        "data.format=classified",
        f"data.labels={json.dumps(CLASSES)}",
        "model.dtype=fp32",
        "quant.type=none",
        "optim.lr=0.003",
        "train.steps=5",
        *overrides,
    )


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_five_steps_of_classification_have_the_losses_of_transformers_and_peft(
    workshop: Workshop, texts: Path, world_size: int
) -> None:
    config = classifying(workshop, texts, f"first-{world_size}")
    text = dump_config(config)
    ours = launch(world_size, heads.our_steps, text, workshop.prepare(config).train)[0]
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    steps = [[[rows[n]["text"], CLASSES.index(rows[n]["label"])] for n in step] for step in ours["documents"]]
    assert max(map(len, steps)) > 4, "no row holds several texts"
    (theirs,) = launch(1, heads.plain_steps, text, steps)
    assert [record["loss"] for record in ours["records"]] == pytest.approx(theirs, abs=1e-4)
    assert len({round(loss, 3) for loss in theirs}) == 5


@pytest.mark.long
def test_several_classes_of_a_text_have_the_losses_of_transformers_and_are_exported(
    workshop: Workshop, texts: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    said = [[name for name in NAMES if name in row["text"].split()] for row in rows]
    several = workshop.folder / "several.jsonl"
    several.write_text(
        "".join(json.dumps({"text": row["text"], "labels": of}) + "\n" for row, of in zip(rows, said, strict=True))
    )
    given = (
        "objective.name=multilabel_classification",
        "data.format=auto",
        f"data.labels={json.dumps(NAMES)}",
        f"data.train=[{{path: {several}}}]",
    )
    config = classifying(workshop, texts, "several-first", *given)
    text = dump_config(config)
    ours = launch(3, heads.our_steps, text, workshop.prepare(config).train)[0]
    flags = [[int(name in of) for name in NAMES] for of in said]
    steps = [[[rows[n]["text"], flags[n]] for n in step] for step in ours["documents"]]
    (theirs,) = launch(1, heads.plain_steps, text, steps)
    assert [record["loss"] for record in ours["records"]] == pytest.approx(theirs, abs=1e-4)

    run = finished(workshop, classifying(workshop, texts, "several", *given, "train.steps=40", "optim.lr=0.02"))
    lines = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    last = [record for record in lines if record["kind"] == "step"][-1]
    assert last["micro_f1"] > 0.7
    export_adapter(run, open_store(str(tmp_path / "out")))
    proof = proof_of(run, tmp_path / "out", step=40)
    assert proof.holds, proof
    loaded = by_its_card(tmp_path / "out")
    assert loaded["model"].config.problem_type == "multi_label_classification"
    batch = loaded["tokenizer"](["the gnu no", "cat cat yes"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    no = loaded["model"].eval()(**batch).logits[:, 2].sigmoid().tolist()
    assert no[0] > 0.5 > no[1]


def by_its_card(folder: Path) -> dict[str, Any]:
    """The names that the card's lines of Python make."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    loaded: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), loaded)
    return loaded


def rewarding(workshop: Workshop, name: str, *overrides: str) -> Config:
    pairs = make_pairs(workshop.folder / "pairs.jsonl", 24)
    return workshop.config(
        name,
        "objective.name=reward",
        f"data.train=[{{path: {pairs}}}]",
        "data.format=preference",
        "data.sequence_length=96",
        "model.dtype=fp32",
        "quant.type=none",
        "optim.lr=0.003",
        "train.steps=5",
        *overrides,
    )


def test_five_steps_of_a_reward_model_have_the_losses_of_transformers_and_peft(workshop: Workshop) -> None:
    config = rewarding(workshop, "reward-first", "objective.margin=0.3", "objective.center_rewards=0.05")
    text = dump_config(config)
    ours = launch(2, heads.our_steps, text, workshop.prepare(config).train)[0]
    rows = [json.loads(line) for line in (workshop.folder / "pairs.jsonl").read_text().splitlines()]
    both = [[f"{row['prompt']}{row[side]}</s>" for side in ("chosen", "rejected")] for row in rows]
    (theirs,) = launch(1, heads.plain_steps, text, [[both[n] for n in step] for step in ours["documents"]])
    assert [record["loss"] for record in ours["records"]] == pytest.approx(theirs, abs=1e-4)
    assert len({round(loss, 3) for loss in theirs}) == 5


def tagging(workshop: Workshop, name: str, *overrides: str) -> Config:
    words = make_tagged(workshop.folder / "tagged.jsonl")
    return workshop.config(
        name,
        "objective.name=token_classification",
        f"data.train=[{{path: {words}}}]",
        "data.format=auto",
        "data.labels=[B, O]",
        "model.dtype=fp32",
        "quant.type=none",
        "optim.lr=0.003",
        "train.steps=5",
        *overrides,
    )


def test_five_steps_of_tags_have_the_losses_of_transformers_and_peft(workshop: Workshop) -> None:
    config = tagging(workshop, "tags-first")
    text = dump_config(config)
    ours = launch(2, heads.our_steps, text, workshop.prepare(config).train)[0]
    rows = [json.loads(line) for line in (workshop.folder / "tagged.jsonl").read_text().splitlines()]
    read = [[" ".join(row["tokens"]), [["B", "O"].index(tag) for tag in row["ner_tags"]]] for row in rows]
    (theirs,) = launch(1, heads.plain_steps, text, [[read[n] for n in step] for step in ours["documents"]])
    assert [record["loss"] for record in ours["records"]] == pytest.approx(theirs, abs=1e-4)
    assert len({round(loss, 3) for loss in theirs}) == 5
    assert ours["records"][0]["words"] == sum(len(rows[n]["tokens"]) for n in ours["documents"][0])


def finished(workshop: Workshop, config: Config) -> Store:
    """The folder of the run, which one rank has trained to its end."""
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    outcomes = launch(1, runs.run, dump_config(config), workshop.prepare(config).train)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return run


@pytest.mark.long
def test_a_tagger_is_exported_and_proven(workshop: Workshop, tmp_path: Path) -> None:
    run = finished(workshop, tagging(workshop, "tags", "train.steps=20", "optim.lr=0.01"))
    export_adapter(run, open_store(str(tmp_path / "out")))
    proof = proof_of(run, tmp_path / "out", step=20)
    assert proof.holds, proof


@pytest.mark.long
def test_a_reward_model_is_exported_and_proven(workshop: Workshop, tmp_path: Path) -> None:
    run = finished(workshop, rewarding(workshop, "reward", "train.steps=20", "optim.lr=0.01"))
    lines = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    last = [record for record in lines if record["kind"] == "step"][-1]
    assert last["reward_accuracy"] > 0.7
    assert last["reward_margin"] > 0
    export_adapter(run, open_store(str(tmp_path / "out")))
    proof = proof_of(run, tmp_path / "out", step=20)
    assert proof.holds, proof
    assert "num_labels=1" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(workshop: Workshop, texts: Path) -> Config:
    """A run on two ranks over 4 bits, with data held out, whose classes are those of its data."""
    held_out = make_classified(workshop.folder / "held-out.jsonl", rows=30, seed=8)
    settings = ("model.dtype=bf16", "quant.type=nf4", "train.steps=30", "optim.lr=0.02", "data.labels=null")
    config = classifying(workshop, texts, "trained", *settings, f"data.eval=[{{path: {held_out}}}]")
    config = with_labels(config)
    workshop.store.sub("trained").put(layout.CONFIG, dump_config(config).encode())
    datasets = workshop.prepare(config)
    outcomes = launch(2, runs.run, dump_config(config), datasets.train, "start", datasets.eval)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return config


def test_a_run_learns_the_classes_of_its_data_and_is_evaluated(workshop: Workshop, trained: Config) -> None:
    assert trained.data.labels == CLASSES
    lines = map(json.loads, workshop.store.sub("trained").get(layout.metrics(1)).splitlines())
    (evaluated,) = [record for record in lines if record["kind"] == "eval"]
    assert evaluated["texts"] == 30
    assert evaluated["accuracy"] > 0.6
    assert 0.5 < evaluated["macro_f1"] <= 1
    labels = read_manifest(workshop.store.sub("trained"), 30).objective
    assert labels == {"name": "classification", "labels": CLASSES}


@pytest.mark.long
def test_the_export_is_proven(workshop: Workshop, trained: Config, tmp_path: Path) -> None:
    run = workshop.store.sub("trained")
    export_adapter(run, open_store(str(tmp_path / "out")))
    proof = proof_of(run, tmp_path / "out", step=30)
    assert proof.holds, proof


def test_the_export_loads_by_the_lines_of_its_card(workshop: Workshop, trained: Config, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    export_adapter(workshop.store.sub("trained"), open_store(str(destination)))
    assert json.loads((destination / "id2label.json").read_text()) == {"0": "bad", "1": "good", "2": "so-so"}
    assert "pipeline_tag: text-classification" in (destination / "README.md").read_text()
    loaded = by_its_card(destination)
    model, tokenizer = loaded["model"].eval(), loaded["tokenizer"]
    batch = tokenizer(["the ant yes", "emu emu fox gnu no"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    found = [model.config.id2label[number] for number in model(**batch).logits.argmax(-1).tolist()]
    assert found == ["good", "bad"]


def test_a_checkpoint_is_measured_beside_the_head_as_it_began_and_says_classes(
    workshop: Workshop, trained: Config
) -> None:
    run = workshop.store.sub("trained")
    prompts = [[{"prompt": "the ant yes"}, {"prompt": "emu emu fox gnu no"}]]
    asks = [
        {"what": "evaluate", "run": run.uri, "step": 30},
        {"what": "generate", "run": run.uri, "step": 30, "sampling": {"max_tokens": 1}, "prompts": prompts},
    ]
    evaluated, said = launch(1, evaluating.answers, asks)[0]
    lines = map(json.loads, run.get(layout.metrics(1)).splitlines())
    (recorded,) = [record for record in lines if record["kind"] == "eval"]
    measures = evaluated["tasks"]["eval"]
    for name in ("loss", "accuracy", "macro_f1"):
        assert measures[name]["adapter"] == pytest.approx(recorded[name], abs=1e-2), name
    assert measures["accuracy"]["adapter"] > measures["accuracy"]["base"] + 0.1
    assert [row["adapter"].partition(" ")[0] for row in said["answers"]] == ["good", "bad"]
