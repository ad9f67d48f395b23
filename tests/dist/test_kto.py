"""KTO has the paper's loss and gradients, with one z0 for the global batch, whatever the ranks, the accumulation and
the packing.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.dist import kto, preference, runs, trl_trainers
from tests.dist.kto import OBJECTIVES
from tests.dist.launch import launch, running
from tests.dist.test_preference import TOLERANCE, Steps, base_gathers, configured, distance, train
from tests.families import rows
from tests.material import Workshop, make_labelled
from trainer.config import Config, dump_config, override
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps, read_manifest

ROWS = 12
# world size, micro_batch and packing. Without packing each of the 12 answers has a row, with it 8 rows hold them.
LAYOUTS = {
    "one": (1, 1, True),
    "rows": (1, 4, True),
    "two": (2, 1, True),
    "three": (3, 1, True),
    "apart": (2, 3, False),
}


@pytest.fixture(scope="module")
def labelled(workshop: Workshop) -> Path:
    return make_labelled(workshop.folder / "labelled.jsonl", ROWS)


def of_kto(workshop: Workshop, labelled: Path, name: str, *overrides: str) -> Config:
    return configured(workshop, labelled, name, "data.format=labelled", "objective.name=kto", *overrides)


@pytest.fixture(scope="module")
def steps(workshop: Workshop, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """layout -> objective -> (record of rank 0, its gradients) of a step over all rows; plain and divided are
    PyTorch's.
    """
    folder = tmp_path_factory.mktemp("kto")
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]

    @cache
    def step(layout_name: str) -> Any:
        world_size, micro_batch, packing = LAYOUTS.get(layout_name, (1, 1, True))
        settings = ("train.global_batch=12", f"train.micro_batch={micro_batch}", f"data.packing={packing}")
        config = of_kto(workshop, labelled, "first", *settings)
        if layout_name in LAYOUTS:
            ours = (dump_config(config), workshop.prepare(config).train, str(folder), OBJECTIVES)
            records = launch(world_size, preference.first_steps, *ours, timeout=200)[0]
        else:
            plain = (dump_config(config), rows, str(folder), 4 if layout_name == "divided" else 1)
            records = launch(1, kto.plain_first_steps, *plain, timeout=200)[0]
        return {name: (record, load_file(folder / f"{name}.safetensors")) for name, record in records.items()}

    return step


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout_name", rows(LAYOUTS, ["two", "apart"]))
def test_losses_gradients_and_measures_are_those_of_the_papers_formulas(
    steps: Steps, layout_name: str, objective: str
) -> None:
    (record, gradients), (plain, plain_gradients) = steps(layout_name)[objective], steps("plain")[objective]
    assert record["answers"] == ROWS
    assert plain["kl"] > 0.1, "z0 is 0 anyway, so this test says nothing of it"
    assert distance(gradients, plain_gradients) < TOLERANCE
    assert {name: record[name] for name in plain} == pytest.approx(plain, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_check_would_see_that_each_quarter_of_the_batch_has_a_z0_of_its_own(steps: Steps, objective: str) -> None:
    (divided, divided_gradients), (plain, gradients) = steps("divided")[objective], steps("plain")[objective]
    assert abs(divided["loss"] / plain["loss"] - 1) > 100 * TOLERANCE
    assert distance(divided_gradients, gradients) > 100 * TOLERANCE


@pytest.mark.long
def test_twenty_steps_have_the_losses_of_trls_trainer(workshop: Workshop, labelled: Path) -> None:
    """Each step takes all rows, as TRL mismatches the answers of a step and Capstan those of a file."""
    settings = ("objective.beta=0.3", "objective.undesirable_weight=1.5", "optim.lr=0.003", "train.global_batch=12")
    layout = ("train.micro_batch=8", "train.steps=20")
    config = of_kto(workshop, labelled, "trl-kto", *settings, *layout)
    text, rows = dump_config(config), [json.loads(line) for line in labelled.read_text().splitlines()]
    (ours,) = launch(1, trl_trainers.our_losses, text, workshop.prepare(config).train, timeout=200)
    (theirs,) = launch(1, trl_trainers.kto_losses, text, 20 * rows)
    assert len(theirs) == 20
    assert ours["losses"] == pytest.approx(theirs, abs=1e-5)
    shifted = dump_config(override(config, "train.steps=1"))
    (other,) = launch(1, trl_trainers.kto_losses, shifted, rows[:6] + rows[:5:-1])  # mismatched in another way
    assert abs(other[0] - theirs[0]) > 1e-3


RUN = ("objective.beta=0.3", "optim.lr=0.01", "train.global_batch=3")


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop, labelled: Path) -> dict[int, float]:
    return train(workshop, with_eval(workshop, labelled, "kto"), 2)


def with_eval(workshop: Workshop, labelled: Path, name: str) -> Config:
    held_out = labelled.with_name("held-out.jsonl")
    rows = map(json.loads, labelled.read_text().splitlines())
    held_out.write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']}! "}) + "\n" for row in rows))
    return of_kto(workshop, labelled, name, *RUN, f"data.eval=[{{path: {held_out}}}]")


def records(workshop: Workshop, name: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, workshop.store.sub(name).get(layout.metrics(1)).splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.long
def test_a_run_begins_at_one_half_learns_and_is_evaluated_alike_on_any_number_of_ranks(
    workshop: Workshop, labelled: Path, uninterrupted: dict[int, float]
) -> None:
    assert uninterrupted[1] == pytest.approx(0.5, abs=1e-5)  # the adapter changes nothing yet
    assert uninterrupted[10] < 0.45
    (evaluated,) = records(workshop, "kto", "eval")
    assert evaluated["answers"] == ROWS
    assert evaluated["reward_margin"] > 0.1
    assert evaluated["kl"] >= 0
    assert read_manifest(workshop.store.sub("kto"), 10).objective == {"name": "kto", "beta": 0.3}
    train(workshop, with_eval(workshop, labelled, "kto-three"), 3)
    (on_three,) = records(workshop, "kto-three", "eval")
    for name in ("loss", "kl", "reward_desired", "reward_undesired", "length_desired"):
        assert on_three[name] == pytest.approx(evaluated[name], abs=1e-3), name


@pytest.mark.long
def test_a_killed_run_goes_on_bitwise_and_at_another_world_size(
    workshop: Workshop, labelled: Path, uninterrupted: dict[int, float]
) -> None:
    for name, world_size in (("same", 2), ("other", 3)):
        config = with_eval(workshop, labelled, f"kto-{name}")
        run, datasets = workshop.store.sub(config.run.name), workshop.prepare(config)
        run.put(layout.CONFIG, dump_config(config).encode())
        with running(2, runs.run, dump_config(config), datasets.train, "hold", datasets.eval) as ranks:
            ranks.wait_until(lambda run=run: run.exists(layout.manifest(5)))
            ranks.kill()
        assert committed_steps(run) == [5, 1]
        resumed = train(workshop, config, world_size, "resume")
        assert resumed == (uninterrupted if world_size == 2 else pytest.approx(uninterrupted, abs=1e-3))


def test_the_survey_and_the_reference_cost_a_gather_of_the_base_each(
    workshop: Workshop, labelled: Path, tmp_path: Path
) -> None:
    sft = configured(workshop, workshop.data, "traffic-sft", "data.format=prompt_completion")
    measured, planned = base_gathers(workshop, of_kto(workshop, labelled, "traffic-kto"), tmp_path)
    measured_sft, planned_sft = base_gathers(workshop, sft, tmp_path)
    assert planned / planned_sft == 4 / 2
    assert measured / measured_sft == pytest.approx(planned / planned_sft, rel=0.02)
