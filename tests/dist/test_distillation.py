"""A teacher writes beside the data once, whatever kills it, and students learn from it alike at any number of ranks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dist import runs, teaching
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, make_base
from trainer.config import Config, dump_config
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import open_dataset
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.model.head import IGNORE
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store

DOCUMENTS = 700  # three blocks of the data set


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("distillation"))
    make_base(workshop.folder / "teacher", intermediate_size=96)
    rows = [
        {"prompt": f"{number} plus {number % 7}", "completion": f"is {number + number % 7}"}
        for number in range(DOCUMENTS)
    ]
    workshop.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workshop


def config_of(workshop: Workshop, name: str, *overrides: str) -> Config:
    distil = (
        "objective.name=distil",
        f"objective.teacher={workshop.folder / 'teacher'}",
        "quant.type=none",
        "model.dtype=fp32",
    )
    return workshop.config(name, *distil, "train.steps=4", "checkpoint.every_steps=0", *overrides)


def objects(folder: Store) -> dict[str, bytes]:
    return {entry.key: folder.get(entry.key) for entry in folder.list()}


def train(workshop: Workshop, config: Config, world_size: int, *, killed: bool = False) -> dict[int, float]:
    """The losses of a run, which is killed as soon as it has a checkpoint, and goes on from there."""
    run, given = workshop.store.sub(config.run.name), (runs.run, dump_config(config), workshop.prepare(config).train)
    run.put(layout.CONFIG, dump_config(config).encode())
    if killed:
        with running(world_size, *given) as group:
            group.wait_until(lambda: bool(committed_steps(run)))
            group.kill()
    outcomes = launch(world_size, *given)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


@pytest.mark.long
def test_a_teacher_that_is_killed_goes_on_and_teaches_one_curve(workshop: Workshop) -> None:
    config = config_of(workshop, "one", "objective.top_k=100000")
    workshop.prepare(config)
    with running(2, teaching.teach, dump_config(config), 2) as group:
        assert -9 in group.wait_for_ends()
    (found,) = launch(1, teaching.teach, dump_config(config))
    assert found["written"] == 1, "two blocks were there"
    folder = workshop.store.sub(found["folder"].removeprefix(workshop.store.uri).strip("/"))
    written = objects(folder)
    for key in written:
        folder.delete(key)
    again, _ = launch(2, teaching.teach, dump_config(config))
    assert again["written"] == 3
    assert objects(folder) == written
    one = train(workshop, config, 1)
    for ranks in (2, 3):
        other = config_of(workshop, f"ranks-{ranks}", "objective.top_k=100000")
        assert train(workshop, other, ranks, killed=ranks == 2) == pytest.approx(one, rel=1e-5)
    assert one[1] == pytest.approx(full_divergence(workshop, config), rel=2e-3)
    assert one[4] < one[1]


def full_divergence(workshop: Workshop, config: Config) -> float:
    """KL(teacher || student) a target of the first step, by transformers alone."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(workshop.folder / name, dtype=torch.float32).eval()
        for name in ("teacher", "base")
    )
    dataset = open_dataset(workshop.store, workshop.prepare(config).train)
    total, targets = 0.0, 0
    for batch in train_stream(config, whole(dataset), 0, 1).step(Position()):
        for begin, end in zip(batch.input.cu_seqlens[:-1], batch.input.cu_seqlens[1:], strict=True):
            ids, labels = batch.input.input_ids[:, begin:end].long(), batch.labels[0, begin:end]
            with torch.no_grad():
                t, s = (model(ids).logits[0].log_softmax(-1)[labels != IGNORE] for model in (teacher, student))
            total += float((t.exp() * (t - s)).sum())
            targets += len(t)
    return total / targets
