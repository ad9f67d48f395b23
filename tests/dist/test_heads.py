"""Heads learn beside LoRA as by transformers and PEFT, whatever the ranks and the packing, and are exported as PEFT keeps them."""

import json
from pathlib import Path

import pytest

from tests.dist import heads
from tests.dist.launch import launch
from tests.material import Workshop, make_classified
from trainer.config import Config, dump_config

CLASSES = ["bad", "good", "so-so"]


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_five_steps_of_classification_have_the_losses_of_transformers_and_peft(
    workshop: Workshop, texts: Path, world_size: int
) -> None:
    config = classifying(workshop, texts, f"first-{world_size}")
    text = dump_config(config)
    ours = launch(world_size, heads.our_steps, text, workshop.prepare(config).train)[0]
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    steps = [[(rows[n]["text"], CLASSES.index(rows[n]["label"])) for n in step] for step in ours["documents"]]
    assert max(map(len, steps)) > 4, "no row holds several texts"
    (theirs,) = launch(1, heads.plain_steps, text, steps)
    assert [record["loss"] for record in ours["records"]] == pytest.approx(theirs, abs=1e-4)
    assert len({round(loss, 3) for loss in theirs}) == 5
