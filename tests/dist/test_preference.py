"""Preference objectives have the papers' losses and gradients, whatever the ranks, the accumulation and the packing."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.dist import preference, runs, traffic, trl_trainers
from tests.dist.launch import launch, running
from tests.dist.preference import OBJECTIVES
from tests.dist.test_resume import losses
from tests.families import rows
from tests.material import Workshop, make_pairs
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, override
from trainer.export.write.adapter import export_adapter
from trainer.plan.plan import make_plan
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import open_store

PAIRS = 12
# world size, micro_batch and packing. Without packing each of the 12 pairs has a row, with it 8 rows hold them.
LAYOUTS = {
    "one": (1, 1, True),
    "rows": (1, 4, True),
    "two": (2, 1, True),
    "three": (3, 1, True),
    "apart": (2, 3, False),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pairs(workshop: Workshop) -> Path:
    return make_pairs(workshop.folder / "pairs.jsonl", PAIRS)


def configured(workshop: Workshop, pairs: Path, name: str, *overrides: str) -> Config:
    data = (f"data.train=[{{path: {pairs}}}]", "data.format=preference", "data.sequence_length=96", "model.dtype=fp32")
    return workshop.config(name, *data, *overrides)


Steps = Callable[[str], dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]]


@pytest.fixture(scope="module")
def steps(workshop: Workshop, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """layout -> objective -> (record of rank 0, its gradients) of a step over all pairs; plain and glued are
    PyTorch's.
    """
    folder = tmp_path_factory.mktemp("preference")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]

    @cache
    def step(layout_name: str) -> Any:
        world_size, micro_batch, packing = LAYOUTS.get(layout_name, (1, 1, True))
        settings = ("train.global_batch=12", f"train.micro_batch={micro_batch}", f"data.packing={packing}")
        config = configured(workshop, pairs, "first", *settings)
        if layout_name in LAYOUTS:
            ours = (dump_config(config), workshop.prepare(config).train, str(folder), OBJECTIVES)
            records = launch(world_size, preference.first_steps, *ours, timeout=200)[0]
        else:
            plain = (dump_config(config), rows, str(folder), layout_name == "glued")
            records = launch(1, preference.plain_first_steps, *plain, timeout=200)[0]
        return {name: (record, load_file(folder / f"{name}.safetensors")) for name, record in records.items()}

    return step


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of two gradients of one parameter, relative to its norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout_name", rows(LAYOUTS, ["two", "apart"]))
def test_losses_gradients_and_measures_are_those_of_the_papers_formulas(
    steps: Steps, layout_name: str, objective: str
) -> None:
    (record, gradients), (plain, plain_gradients) = steps(layout_name)[objective], steps("plain")[objective]
    assert record["pairs"] == PAIRS
    assert distance(gradients, plain_gradients) < TOLERANCE
    assert {name: record[name] for name in plain} == pytest.approx(plain, rel=TOLERANCE, abs=TOLERANCE)
    assert record["reward_margin"] == pytest.approx(record["reward_chosen"] - record["reward_rejected"], abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_check_would_see_that_an_answer_sees_the_other_one(steps: Steps, objective: str) -> None:
    (glued, glued_gradients), (plain, gradients) = steps("glued")[objective], steps("plain")[objective]
    assert abs(glued["loss"] / plain["loss"] - 1) > 100 * TOLERANCE
    assert distance(glued_gradients, gradients) > 100 * TOLERANCE


def test_the_check_tells_the_objectives_apart(steps: Steps) -> None:
    every = [steps("plain")[objective][0]["loss"] for objective in OBJECTIVES]
    assert min(abs(a - b) for n, a in enumerate(every) for b in every[:n]) > 100 * TOLERANCE


def test_lengths_and_the_ratio_to_the_reference_are_means_over_the_pairs(steps: Steps, pairs: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    record = steps("two")["sigmoid"][0]
    for name in ("chosen", "rejected"):  # a token for each byte, and the end
        assert record[f"length_{name}"] == pytest.approx(sum(len(row[name]) + 1 for row in rows) / PAIRS)
    assert record["log_ratio"] == pytest.approx((record["reward_chosen"] + record["reward_rejected"]) / 0.8, rel=1e-5)


@pytest.mark.long
def test_twenty_steps_of_dpo_have_the_losses_of_trls_trainer(workshop: Workshop, pairs: Path) -> None:
    """From the same adapter, on the same pairs in the same order; the same pairs in another order lead elsewhere."""
    settings = ("objective.name=dpo", "objective.beta=0.3", "optim.lr=0.003", "optim.weight_decay=0.1")
    config = configured(workshop, pairs, "trl", *settings, "data.packing=false", "train.steps=20")
    text = dump_config(config)
    (ours,) = launch(1, trl_trainers.our_losses, text, workshop.prepare(config).train)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    same = [rows[number] for number in ours["documents"]]
    (theirs,) = launch(1, trl_trainers.dpo_losses, text, same)
    assert len(theirs) == 20
    assert ours["losses"] == pytest.approx(theirs, abs=1e-5)
    (other,) = launch(1, trl_trainers.dpo_losses, text, same[1:] + same[:1])
    assert max(abs(a - b) for a, b in zip(theirs, other, strict=True)) > 1e-2


DPO = ("objective.name=dpo", "objective.beta=0.3", "optim.lr=0.01", "data.held_out=0.2", "train.global_batch=3")


def train(workshop: Workshop, config: Config, world_size: int, how: str = "start") -> dict[int, float]:
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    datasets = workshop.prepare(config)
    outcomes = launch(world_size, runs.run, dump_config(config), datasets.train, how, datasets.eval)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop, pairs: Path) -> dict[int, float]:
    return train(workshop, configured(workshop, pairs, "dpo", *DPO), 2)


def test_dpo_begins_at_log_2_and_learns_to_prefer(workshop: Workshop, uninterrupted: dict[int, float]) -> None:
    assert uninterrupted[1] == pytest.approx(0.693147, abs=1e-5)  # the adapter changes nothing yet
    assert uninterrupted[10] < uninterrupted[1] - 0.1
    records = [json.loads(line) for line in workshop.store.sub("dpo").get(layout.metrics(1)).splitlines()]
    (evaluated,) = (record for record in records if record["kind"] == "eval")
    assert evaluated["pairs"] >= 1
    assert 0 <= evaluated["reward_accuracy"] <= 1
    assert read_manifest(workshop.store.sub("dpo"), 10).objective == {"name": "dpo", "beta": 0.3}


@pytest.mark.long
def test_a_killed_run_goes_on_bitwise_and_at_another_world_size(
    workshop: Workshop, pairs: Path, uninterrupted: dict[int, float]
) -> None:
    for name, world_size in (("same", 2), ("other", 3)):
        config = configured(workshop, pairs, f"dpo-{name}", *DPO)
        run, datasets = workshop.store.sub(config.run.name), workshop.prepare(config)
        run.put(layout.CONFIG, dump_config(config).encode())
        with running(2, runs.run, dump_config(config), datasets.train, "hold", datasets.eval) as ranks:
            ranks.wait_until(lambda run=run: run.exists(layout.manifest(5)))
            ranks.kill()
        assert committed_steps(run) == [5, 1]
        resumed = train(workshop, config, world_size, "resume")
        assert resumed == (uninterrupted if world_size == 2 else pytest.approx(uninterrupted, abs=1e-3))
    changed = configured(workshop, pairs, "dpo-same", *DPO, "objective.beta=0.1", "train.steps=12")
    arguments = (dump_config(changed), workshop.prepare(changed).train, "resume")
    (outcome,) = launch(1, runs.run, *arguments)
    assert "has objective beta: 0.3, the configuration gives 0.1" in outcome["message"]


def test_an_export_of_dpo_is_loaded_by_peft(
    workshop: Workshop, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    run = workshop.store.sub("dpo")
    manifest = export_adapter(run, open_store(str(tmp_path / "adapter")))
    base: Any = AutoModelForCausalLM.from_pretrained(manifest.base["path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    adapters = {name: value for name, value in model.named_parameters() if "lora_" in name}
    masters = master_weights(run, manifest)
    assert len(adapters) == len(masters) == 2 * 7 * 2
    for name, value in masters.items():
        assert torch.equal(adapters[f"base_model.model.{name}"], value), name


def base_gathers(workshop: Workshop, config: Config, folder: Path) -> tuple[float, int]:
    """The bytes of the base that a rank of two receives in a step, as measured and as planned.

    The policy keeps nothing gathered; the usual one keeps so small a base from one pass to the next.
    """
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    (folder / "policy.json").write_text(json.dumps(policy))
    config = override(config, f"sharding.deepspeed={folder}/policy.json")
    arguments = dump_config(config), workshop.prepare(config).train
    received = launch(2, traffic.step_traffic, *arguments)[0]["inside"]["torch.uint8"]
    plan = make_plan(config, resolve_base(config.model).description, 2, 2, None)
    return received, plan.traffic_per_step.base_gathers


def test_the_reference_costs_one_gather_of_the_base_more_and_no_other(
    workshop: Workshop, pairs: Path, tmp_path: Path
) -> None:
    configs = [configured(workshop, pairs, f"traffic-{name}", f"objective.name={name}") for name in ("dpo", "orpo")]
    (dpo, planned_dpo), (orpo, planned_orpo) = (base_gathers(workshop, config, tmp_path) for config in configs)
    assert dpo / orpo == pytest.approx(planned_dpo / planned_orpo, rel=0.02)
