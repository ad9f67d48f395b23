"""A reference that is stored before the first step gives DPO's losses, for every method, whatever the ranks, and only
where it fits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist import reference, runs
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop, make_labelled, make_pairs
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import prepare_start
from trainer.run import layout
from trainer.store.store import Store
from trainer.train.reference import References, read_references, write_references

DPO = (
    "objective.name=dpo",
    "objective.beta=0.3",
    "data.format=preference",
    "data.sequence_length=96",
    "model.dtype=fp32",
)
# A learning rate at which ten steps move the loss of pairs well away from log 2.
FULL = (
    "tuning.method=full",
    "tuning.rank=16",
    "tuning.alpha=32",
    "quant.type=none",
    "optim.lr=3e-4",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("reference"))
    workshop.data = make_pairs(workshop.folder / "pairs.jsonl", 18)
    return workshop


def config_of(workshop: Workshop, name: str, *overrides: str) -> Config:
    return workshop.config(name, *DPO, *overrides)


def train(workshop: Workshop, config: Config, world_size: int, how: str = "start") -> dict[int, float]:
    """The losses of the run by step, with that of its evaluation as step 0 where it has one."""
    run, datasets = workshop.store.sub(config.run.name), workshop.prepare(config)
    run.put(layout.CONFIG, dump_config(config).encode())
    outcomes = launch(world_size, runs.run, dump_config(config), datasets.train, how, datasets.eval)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    records = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    return losses(run) | dict([(0, record["loss"]) for record in records if record["kind"] == "eval"])


def folder_of(workshop: Workshop, fingerprint: str) -> Store:
    return workshop.store.sub(layout.dataset(fingerprint))


def stored(workshop: Workshop, fingerprint: str) -> list[str]:
    """The keys of the references of a data set."""
    return [entry.key for entry in folder_of(workshop, fingerprint).list() if entry.key.startswith("reference-")]


def forget(workshop: Workshop, fingerprint: str) -> None:
    for key in stored(workshop, fingerprint):
        folder_of(workshop, fingerprint).delete(key)


def opened(workshop: Workshop, fingerprint: str) -> tuple[dict[str, Any], References]:
    """The facts and the values of the one reference of a data set."""
    from safetensors import safe_open

    (key,) = stored(workshop, fingerprint)
    path = f"{folder_of(workshop, fingerprint).uri.removeprefix('file://').rstrip('/')}/{key}"
    with safe_open(path, "np") as file:
        facts, values = json.loads(file.metadata()["facts"]), file.get_tensor("log_p")
    return facts, read_references(folder_of(workshop, fingerprint), facts, len(values))


@pytest.mark.parametrize(
    ("world_size", "what"),
    [
        (2, "lora"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((1, "lora"), (3, "lora"), (2, "prompt"), (2, "kto"))
        ),
    ],
)
def test_the_losses_are_those_of_a_second_pass_in_every_step(workshop: Workshop, world_size: int, what: str) -> None:
    short = ("train.steps=4", "optim.lr=0.01", "data.held_out=0.2", "checkpoint.every_steps=0")
    if what == "prompt":
        short = (
            *short,
            "tuning.method=prompt",
            "tuning.rank=16",
            "tuning.alpha=32",
            "tuning.virtual_tokens=4",
            "optim.lr=0.3",
        )
    if what == "kto":
        labelled = make_labelled(workshop.folder / "labelled.jsonl", 24)
        short = (
            *short,
            "objective.name=kto",
            "data.format=labelled",
            f"data.train=[{{path: {labelled}}}]",
            "optim.lr=0.03",
        )
    found = {}
    for how in ("adapter_off", "stored"):
        config = config_of(workshop, f"{how}-{what}-{world_size}", *short, f"objective.reference={how}")
        datasets = workshop.prepare(config)
        forget(workshop, datasets.train)
        found[how] = train(workshop, config, world_size)
        assert len(stored(workshop, datasets.train)) == (how == "stored")
    assert found["adapter_off"].keys() == {0, 1, 2, 3, 4}
    assert abs(found["adapter_off"][4] - found["adapter_off"][1]) > 0.01
    assert found["stored"] == pytest.approx(found["adapter_off"], abs=1e-6)


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> dict[int, float]:
    """Ten steps of full fine-tuning on two ranks."""
    return train(workshop, config_of(workshop, "full", *FULL), 2)


def test_full_fine_tuning_has_the_losses_of_plain_pytorch(workshop: Workshop, whole: dict[int, float]) -> None:
    config = config_of(workshop, "full", *FULL)
    arguments = (dump_config(config), workshop.prepare(config).train)
    (plain,) = launch(1, reference.plain_losses, *arguments)
    assert whole[1] == pytest.approx(0.693147, abs=1e-5)
    assert whole[10] < whole[1] - 0.1
    assert list(whole.values()) == pytest.approx(plain, abs=1e-4)
    (moving,) = launch(1, reference.plain_losses, *arguments, False)
    assert max(abs(loss - 0.693147) for loss in moving) < 1e-4, "the control: a reference that learns along"


@pytest.mark.long
def test_a_resume_at_another_world_size_reads_what_is_stored(workshop: Workshop, whole: dict[int, float]) -> None:
    fingerprint = workshop.prepare(config_of(workshop, "full", *FULL)).train
    (key,), folder = stored(workshop, fingerprint), folder_of(workshop, fingerprint)
    before = folder.head(key)
    for name, lift in (("again", 0.0), ("lifted", 5.0)):
        train(workshop, config_of(workshop, name, *FULL, "train.steps=5"), 2)
        if lift:  # the control: values of this very file
            facts, references = opened(workshop, fingerprint)
            write_references(folder, facts, References(references.log_p + np.array([lift, 0], np.float32)))
        else:
            assert folder.head(key) == before
        resumed = train(workshop, config_of(workshop, name, *FULL, "train.steps=10"), 3, "resume")
        last = {step: loss for step, loss in resumed.items() if step > 5}
        plain = {step: loss for step, loss in whole.items() if step > 5}
        if lift:
            assert last[6] > plain[6] + 0.1
        else:
            assert last == pytest.approx(plain, abs=1e-3)
    forget(workshop, fingerprint)


def test_an_interrupted_pass_goes_on_at_another_world_size(workshop: Workshop) -> None:
    config = config_of(workshop, "stopped", *FULL, "data.packing=false")
    fingerprint = workshop.prepare(config).train
    arguments = (dump_config(config), fingerprint)
    forget(workshop, fingerprint)
    (straight,) = launch(1, reference.passes, *arguments)
    assert straight["rows"] == 18
    forget(workshop, fingerprint)
    first = launch(2, reference.passes, *arguments, 4)
    assert [rank["values"] for rank in first] == [None, None]
    assert [rank["rows"] for rank in first] == [4, 4]
    _, half = opened(workshop, fingerprint)
    assert half.progress
    assert np.isnan(half.log_p).any(axis=1).sum() == 18 - 8
    then = launch(3, reference.passes, *arguments)
    assert [rank["rows"] for rank in then] == [4, 4, 4]  # 10 are left, two rows are empty
    assert all(np.allclose(rank["values"], straight["values"], rtol=0, atol=1e-4) for rank in then)
    assert opened(workshop, fingerprint)[1].progress is None
    (again,) = launch(1, reference.passes, *arguments)
    assert (again["rows"], again["values"]) == (0, then[0]["values"])


@pytest.mark.long
def test_what_is_damaged_or_of_something_else_is_computed_again(workshop: Workshop) -> None:
    config = config_of(workshop, "other", *FULL)
    fingerprint, key = workshop.prepare(config).train, ""
    folder = folder_of(workshop, fingerprint)
    forget(workshop, fingerprint)
    (right,) = launch(1, reference.passes, dump_config(config), fingerprint)
    facts, references = opened(workshop, fingerprint)
    (key,) = stored(workshop, fingerprint)
    content = bytearray(folder.get(key))
    content[-3] ^= 1
    wrong = References(references.log_p + 1)
    for name, change in (("damaged", {}), ("data", {"dataset": "0" * 20}), ("base", {"files": []})):
        if change:  # another's values at the place of ours
            write_references(folder, facts | change, wrong)
            (other,) = (found for found in stored(workshop, fingerprint) if found != key)
            content = bytearray(folder.get(other))
            folder.delete(other)
        folder.put(key, bytes(content))
        (found,) = launch(1, reference.passes, dump_config(config), fingerprint)
        assert found["rows"] > 0, name
        assert found["values"] == right["values"]
        assert any(f"{key} is damaged" in line and "computed again" in line for line in found["log"])
    write_references(folder, facts, wrong)  # the control: what has the right facts is taken
    (taken,) = launch(1, reference.passes, dump_config(config), fingerprint)
    assert taken["values"] == wrong.log_p.tolist()
    for other in (
        config_of(workshop, "other", *FULL, "model.layers=1"),
        config_of(workshop, "other", "quant.double=true"),
    ):
        (found,) = launch(1, reference.passes, dump_config(other), fingerprint)
        assert found["rows"] > 0
    assert len(stored(workshop, fingerprint)) == 3
    forget(workshop, fingerprint)


@pytest.mark.long
def test_the_pass_waits_for_chapters_that_are_still_compiled(
    workshop: Workshop, tmp_path: Path, chapters: None
) -> None:
    pairs = make_pairs(tmp_path / "many.jsonl", 40)
    short = ("train.steps=4", "checkpoint.every_steps=0", f"data.train=[{{path: {pairs}}}]")
    config = config_of(workshop, "chapters", *short, "objective.reference=stored")
    datasets, rest = prepare_start(config, resolve_base(config.model), workshop.store)
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    with running(2, runs.run, dump_config(config), datasets.train) as ranks:
        log = layout.rank_log(1, 0)
        ranks.wait_until(lambda: run.exists(log) and b"waits until all data is compiled" in run.get(log))
        assert not stored(workshop, datasets.train)
        assert len(list(rest)) > 1
        assert {outcome["outcome"] for outcome in ranks.wait()} == {"finished"}
    assert opened(workshop, datasets.train)[1].log_p.shape == (40, 2)
    twice = config_of(workshop, "chapters-off", *short, "objective.reference=adapter_off")
    assert losses(run) == pytest.approx(train(workshop, twice, 2), abs=1e-6)
