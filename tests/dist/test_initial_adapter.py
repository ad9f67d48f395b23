"""A run that begins from an adapter has its weights before the first step, and its preferences are measured against
it.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.dist import runs, trl_trainers
from tests.dist.launch import launch
from tests.dist.test_resume import losses
from tests.material import Workshop, make_pairs
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, override
from trainer.errors import ConfigError
from trainer.export.write.adapter import export_adapter
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import open_store

FP32 = ("model.dtype=fp32", "data.sequence_length=96")
DPO = (
    "objective.name=dpo",
    "objective.beta=0.3",
    "data.format=preference",
    "optim.lr=0.01",
    "train.global_batch=3",
    *FP32,
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("beginning"))


def train(workshop: Workshop, config: Config, world_size: int, how: str = "start") -> dict[int, float]:
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    datasets = workshop.prepare(config)
    outcomes = launch(world_size, runs.run, dump_config(config), datasets.train, how)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


@pytest.fixture(scope="module")
def sft(workshop: Workshop) -> Path:
    """The run `sft`, and its adapter in PEFT's folder."""
    train(workshop, workshop.config("sft", "optim.lr=0.01", "train.steps=6", *FP32), 1)
    folder = workshop.folder / "sft-adapter"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    return folder


@pytest.fixture(scope="module")
def pairs(workshop: Workshop) -> Path:
    return make_pairs(workshop.folder / "pairs.jsonl", 12)


def preferring(workshop: Workshop, pairs: Path, name: str, start: object, *overrides: str) -> Config:
    return workshop.config(name, *DPO, f"data.train=[{{path: {pairs}}}]", f"tuning.start={start}", *overrides)


@pytest.fixture(scope="module")
def from_run(workshop: Workshop, sft: Path, pairs: Path) -> dict[int, float]:
    return train(workshop, preferring(workshop, pairs, "dpo", "sft"), 1)


def test_dpo_after_sft_is_measured_against_what_sft_has_learnt(workshop: Workshop, from_run: dict[int, float]) -> None:
    assert from_run[1] == pytest.approx(math.log(2), abs=1e-5)
    assert from_run[10] < from_run[1] - 0.1
    learnt = read_manifest(workshop.store.sub("sft"), 6)
    assert read_manifest(workshop.store.sub("dpo"), 10).base["start"] == "sft@6"
    first, before = (
        master_weights(workshop.store.sub(name), manifest)
        for name, manifest in (("dpo", read_manifest(workshop.store.sub("dpo"), 1)), ("sft", learnt))
    )
    assert all(0 < float((first[name] - before[name]).abs().max()) < 0.011 for name in before), "one step of 0.01 away"


@pytest.mark.long
def test_pefts_folder_is_the_same_start_on_two_ranks_and_goes_on_after_a_resume(
    workshop: Workshop, sft: Path, pairs: Path, from_run: dict[int, float]
) -> None:
    config = preferring(workshop, pairs, "dpo-peft", sft)
    train(workshop, override(config, "train.steps=5", "optim.schedule=constant"), 2)
    constant = train(workshop, override(config, "optim.schedule=constant"), 2, "resume")
    assert constant[1] == pytest.approx(from_run[1], abs=1e-5)
    assert constant[2] == pytest.approx(from_run[2], abs=1e-4)
    whole = train(workshop, override(config, "optim.schedule=constant", "run.name=dpo-whole"), 1)
    assert constant == pytest.approx(whole, abs=1e-4)


def test_the_export_is_one_adapter_that_equals_in_peft(
    workshop: Workshop, from_run: dict[int, float], tmp_path: Path
) -> None:
    export_adapter(workshop.store.sub("dpo"), open_store(str(tmp_path / "out")))
    ours = master_weights(workshop.store.sub("dpo"), read_manifest(workshop.store.sub("dpo"), 10))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    named = {f"base_model.model.{name.replace('.default.', '.')}": values for name, values in ours.items()}
    assert saved.keys() == named.keys()
    assert all(torch.equal(saved[name], named[name].view_as(saved[name])) for name in saved)
    assert "sft@6" in (tmp_path / "out" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(values, saved[name]) for name, values in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("tuning.rank=4", "tuning.rank: tuning.start: {start} has 8. Set tuning.rank: 8"),
        ("tuning.alpha=8", "tuning.alpha: tuning.start: {start} has 16"),
        ("tuning.method=dora", "tuning.method: tuning.start: {start} has 'lora'. Set tuning.method: 'lora'"),
        ("objective.reference=adapter_off", "objective.reference: adapter_off would compare with the base without"),
    ],
)
def test_settings_that_make_another_adapter_are_refused(
    workshop: Workshop, sft: Path, pairs: Path, settings: str, sentence: str
) -> None:
    for start, named in (("sft", "sft@6"), (sft, str(sft))):
        config = preferring(workshop, pairs, "refused", start, settings)
        with pytest.raises(ConfigError) as refused:
            resolve(config, resolve_base(config.model))
        assert sentence.format(start=repr(named)) in str(refused.value)


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ("nothing", "tuning.start: 'nothing' is no run with a checkpoint and no folder with adapter_config.json."),
        ("{store}/sft/checkpoints/step-000000003", "is no committed checkpoint. The run has those of steps 1, 5, 6."),
    ],
)
def test_a_start_that_is_not_there_is_named(
    workshop: Workshop, sft: Path, pairs: Path, start: str, sentence: str
) -> None:
    place = start.format(store=workshop.folder / "store")
    with pytest.raises(ConfigError, match=sentence.replace(".", "[.]")):
        resolve(preferring(workshop, pairs, "missing", place))


def test_targets_that_the_adapter_has_not_are_said(workshop: Workshop, sft: Path, pairs: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuning.targets: .* has 'all-linear'"):
        resolve(preferring(workshop, pairs, "few", "sft", "tuning.targets=[q_proj]"))
    with pytest.raises(ConfigError, match=r"Set tuning.targets: \[.*q_proj.*\]"):
        resolve(preferring(workshop, pairs, "few", sft, "tuning.targets=[q_proj]"))


@pytest.mark.long
def test_twenty_steps_of_dpo_from_an_adapter_have_the_losses_of_trls_trainer(
    workshop: Workshop, sft: Path, pairs: Path
) -> None:
    settings = ("optim.lr=0.003", "data.packing=false", "train.steps=20", "train.global_batch=4")
    config = preferring(workshop, pairs, "trl", sft, *settings)
    ours = train(workshop, config, 1)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    plain = override(config, "tuning.start=null", "run.name=order")
    (order,) = launch(1, trl_trainers.our_losses, dump_config(plain), workshop.prepare(plain).train)
    same = [rows[number] for number in order["documents"]]
    (theirs,) = launch(1, trl_trainers.dpo_losses_from, dump_config(plain), same, str(sft))
    assert list(ours.values()) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.long
def test_a_resume_needs_the_first_run_for_a_lost_reference_alone(
    workshop: Workshop, sft: Path, pairs: Path, from_run: dict[int, float]
) -> None:
    first = workshop.store.sub("sft-gone")
    for entry in workshop.store.sub("sft").list():
        first.put(entry.key, workshop.store.sub("sft").get(entry.key))
    config = preferring(workshop, pairs, "dpo-gone", "sft-gone@6", "optim.schedule=constant")
    whole = train(workshop, override(config, "run.name=dpo-there"), 1)
    train(workshop, override(config, "train.steps=4"), 1)
    dataset = workshop.store.sub(layout.dataset(workshop.prepare(config).train))
    kept = [entry.key for entry in dataset.list() if "reference" in entry.key]
    assert kept
    for key in kept:  # it is read off the base with the first run's adapter again, not with the one that has learnt
        dataset.delete(key)
    half = train(workshop, override(config, "train.steps=7"), 2, "resume")
    assert half == pytest.approx({step: whole[step] for step in half}, abs=1e-4)
    first.delete_folder(layout.checkpoint(6))
    assert train(workshop, config, 2, "resume") == pytest.approx(whole, abs=1e-4)
