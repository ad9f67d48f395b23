"""Objectives are chosen by name, refuse what they do not read, and tell their checkpoints apart from those of
others.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.toys.tuning.biases import METHODS as TOYS
from tests.unit.plan.test_plan import LLAMA_70B
from trainer import tuning
from trainer.base.describe.description import describe
from trainer.config import Config, parse_config
from trainer.errors import ConfigError
from trainer.plan.plan import Plan, make_plan
from trainer.plan.resolve import objective_mismatches, reference_of
from trainer.state.checkpoint.identity import Identity, check_identity
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective, objectives

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"


def config(*overrides: str) -> Config:
    name = overrides[0].partition("=")[2] if overrides else "sft"
    rows = {"sft": (), "kto": ("data.format=labelled",)}.get(name, ("data.format=preference",))
    return parse_config(RUN, (*rows, *overrides))


def misfits(given: Config) -> list[str]:
    return list(objective_mismatches(given, find_objective(given), method_of(given)))


def reference(given: Config) -> str | None:
    return reference_of(given, find_objective(given), method_of(given))


@pytest.mark.parametrize("name", ["sft", "dpo", "orpo", "simpo", "kto", "reward"])
def test_an_objective_is_found_by_its_name(name: str) -> None:
    assert misfits(config(f"objective.name={name}")) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("objective.name=dpoo",),
            f"objective.name: 'dpoo' is not allowed. Allowed are {', '.join(sorted(objectives()))}. Did you mean dpo?",
        ),
        (
            ("objective.name=sft", "objective.beta=1"),
            "objective.beta: has no effect with objective.name: sft. Remove it.",
        ),
        (
            ("objective.name=dpo", "objective.gamma=2"),
            "objective.gamma: has no effect with objective.name: dpo. Remove it.",
        ),
        (
            ("objective.name=orpo", "objective.loss_type=ipo"),
            "objective.loss_type: has no effect with objective.name: orpo.",
        ),
        (("objective.name=reward", "objective.beta=0.2"), "objective.beta: has no effect with objective.name: reward."),
        (
            ("objective.name=reward", "train.sample_every=5", "eval.prompts=p.txt"),
            "train.sample_every: objective.name: reward has a head that writes no answers. Remove it.",
        ),
        (("objective.name=simpo", "objective.label_smoothing=0.1"), "objective.label_smoothing: has no effect with"),
        (
            ("objective.name=orpo", "objective.reference=stored"),
            "objective.reference: has no effect with objective.name",
        ),
        (("objective.name=dpo", "objective.dft=true"), "objective.dft: has no effect with objective.name: dpo."),
        (
            ("objective.name=sft", "objective.dft=true", "objective.z_loss=0.1"),
            "objective.z_loss: has no effect with objective.dft",
        ),
        (
            ("objective.name=sft", "objective.dft=true", "objective.label_smoothing=0.1"),
            "objective.label_smoothing: has no effect with objective.dft",
        ),
        (
            ("objective.name=sft", "objective.dft=true", "objective.eaft=1"),
            "objective.eaft: has no effect with objective.dft, which weighs the plain loss of a target",
        ),
        (
            ("objective.name=sft", "objective.eaft=1", "objective.z_loss=0.1"),
            "objective.z_loss: has no effect with objective.eaft",
        ),
        (("objective.name=sft", "objective.eaft_tokens=7"), "objective.eaft_tokens: has no effect without"),
        (("objective.name=sft", "objective.eaft_scale=1"), "objective.eaft_scale: has no effect without"),
        (("objective.name=dpo", "objective.z_loss=0.1"), "objective.z_loss: has no effect with objective.name: dpo."),
        (
            ("objective.name=dpo", "objective.label_smoothing=0.5"),
            "objective.label_smoothing: 0.5 would have most pairs be the wrong way round. It is below 0.5 with",
        ),
        (
            ("objective.name=dpo", "objective.loss_type=ipo", "objective.label_smoothing=0.1"),
            "objective.label_smoothing: 0.1 has no effect with objective.loss_type: ipo.",
        ),
        (
            ("objective.name=dpo", "objective.loss_type=hinge", "objective.label_smoothing=0.1"),
            "objective.label_smoothing: 0.1 has no effect with objective.loss_type: hinge.",
        ),
        (
            ("objective.name=sft", "data.format=preference"),
            "data.format: preference has no rows for objective.name: sft.",
        ),
        (
            ("objective.name=dpo", "data.format=chat"),
            "Set it to preference or preference_pictures, or choose another objective.",
        ),
        (
            ("objective.name=kto", "data.format=preference"),
            "Set it to labelled or labelled_pictures, or choose another objective.",
        ),
        (
            ("objective.name=dpo", "objective.undesirable_weight=2"),
            "objective.undesirable_weight: has no effect with objective.name: dpo.",
        ),
    ],
)
def test_a_setting_that_does_not_suit_the_objective_is_refused_in_one_sentence(
    overrides: tuple[str, ...], said: str
) -> None:
    try:
        (sentence,) = misfits(config(*overrides))
    except ConfigError as error:  # a value that the objective does not even read
        sentence = str(error)
    assert said in sentence
    assert "\n" not in sentence


def test_what_weighs_the_plain_loss_goes_with_its_own_settings_and_with_noise() -> None:
    eaft = ("objective.eaft=1", "objective.eaft_tokens=7", "objective.eaft_scale=1", "objective.neftune_alpha=5")
    assert misfits(config("objective.name=sft", *eaft)) == []
    assert misfits(config("objective.name=sft", "objective.dft=true", "objective.neftune_alpha=5")) == []


def test_a_method_that_changes_the_base_wants_a_reference_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "toys/tuning"
    monkeypatch.setattr(tuning, "__path__", [*tuning.__path__, str(folder)])
    assert "biases" in TOYS
    assert misfits(config("objective.name=orpo", "tuning.method=biases")) == []
    for name in ("dpo", "kto"):
        assert misfits(config(f"objective.name={name}", "tuning.method=biases")) == []
        assert reference(config(f"objective.name={name}", "tuning.method=biases")) == "stored"
        said = "objective.reference: adapter_off is not possible with tuning.method: biases"
        (sentence,) = misfits(
            config(f"objective.name={name}", "tuning.method=biases", "objective.reference=adapter_off")
        )
        assert sentence.startswith(said)


def test_where_the_reference_comes_from_is_decided_where_there_is_one() -> None:
    assert reference(config("objective.name=sft")) is None
    assert reference(config("objective.name=simpo")) is None
    for name in ("dpo", "kto"):
        assert reference(config(f"objective.name={name}")) == "adapter_off"
        assert reference(config(f"objective.name={name}", "objective.reference=stored")) == "stored"
        assert reference(config(f"objective.name={name}", "tuning.start=sft")) == "stored", "the base alone is another"
        assert identity(f"objective.name={name}", "objective.reference=stored").objective == {"name": name}


def identity(*overrides: str) -> Identity:
    objective = find_objective(config(*overrides))
    return Identity("data", {}, {}, objective=objective.identity, defaults=objective.defaults)


def manifest(objective: dict[str, Any]) -> CheckpointManifest:
    return CheckpointManifest(4, 1, 1, 0.0, 4, {}, "data", {}, {}, {}, {}, {}, None, {}, [], objective)


def test_a_checkpoint_keeps_its_objective_without_defaults() -> None:
    assert identity("objective.name=sft").objective == {}
    smoothed = identity("objective.name=sft", "objective.label_smoothing=0.6", "objective.z_loss=1e-4")
    assert smoothed.objective == {"label_smoothing": 0.6, "z_loss": 1e-4}
    assert identity("objective.name=dpo", "objective.beta=0.1").objective == {"name": "dpo"}
    assert identity("objective.name=dpo", "objective.loss_type=ipo").objective == {"name": "dpo", "loss_type": "ipo"}
    simpo = identity("objective.name=simpo", "objective.gamma=1.4")
    assert simpo.objective == {"name": "simpo", "gamma": 1.4}
    for name, *defaults in (("simpo", "beta=2", "gamma=1"), ("orpo", "beta=0.1")):
        same = identity(f"objective.name={name}", *(f"objective.{setting}" for setting in defaults))
        assert same.objective == identity(f"objective.name={name}").objective == {"name": name}
    kto = identity("objective.name=kto", "objective.beta=0.1", "objective.desirable_weight=0.5")
    assert kto.objective == {"name": "kto", "desirable_weight": 0.5}
    assert b"objective" not in manifest({}).to_json(), "manifests of sft are what they were"
    assert b'"objective": {"name": "dpo"}' in manifest({"name": "dpo"}).to_json()


@pytest.mark.parametrize(
    ("saved", "overrides", "said"),
    [
        ({}, ("objective.name=dpo",), "has objective name: 'sft', the configuration gives 'dpo'"),
        ({"name": "dpo"}, ("objective.name=sft",), "has objective name: 'dpo', the configuration gives 'sft'"),
        ({}, ("objective.name=sft", "objective.z_loss=0.1"), "has objective z_loss: 0.0, the configuration gives 0.1"),
        (
            {"name": "dpo"},
            ("objective.name=dpo", "objective.beta=0.2"),
            "objective beta: 0.1, the configuration gives 0.2",
        ),
        (
            {"name": "dpo", "beta": 0.2},
            ("objective.name=orpo",),
            "has objective name: 'dpo', the configuration gives 'orpo'",
        ),
    ],
)
def test_a_checkpoint_of_another_objective_is_refused(
    saved: dict[str, Any], overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_identity(manifest(saved), identity(*overrides))


def test_a_checkpoint_of_the_same_objective_is_continued() -> None:
    check_identity(manifest({}), identity("objective.name=sft"))
    check_identity(manifest({"name": "dpo", "beta": 0.2}), identity("objective.name=dpo", "objective.beta=0.2"))


def test_plan_counts_the_passes_of_ktos_survey() -> None:
    """A survey takes one forward pass of half of the tokens, and leaves the loss the other half."""
    sft, kto = planned("objective.name=sft"), planned("objective.name=kto")
    slower = planned("objective.name=kto", "train.activation_checkpointing=false")
    assert kto.traffic_per_step.base_gathers == 2 * sft.traffic_per_step.base_gathers
    # Adapters are whole on every rank, and come once a step.
    assert kto.traffic_per_step.adapter_gathers == sft.traffic_per_step.adapter_gathers
    stored = planned("objective.name=kto", "objective.reference=stored")
    assert stored.traffic_per_step.base_gathers * 4 == kto.traffic_per_step.base_gathers * 3
    assert (stored.batch.reference_time_percent, stored.batch.stored_reference_percent) == (0, 50)
    assert (kto.batch.reference_time_percent, slower.batch.reference_time_percent) == (50, 67)


def planned(*overrides: str) -> Plan:
    return make_plan(config(*overrides), describe(LLAMA_70B, None), 16, 8, None)


@pytest.mark.parametrize(
    ("name", "more"),
    [("grpo", ["rollout.reward=length"]), ("opd", ["objective.teacher=t"]), ("distil", ["objective.teacher=t"])],
)
def test_rollouts_and_teachers_take_no_pictures(name: str, more: list[str]) -> None:
    said = planned(f"objective.name={name}", "data.format=pictures", *more).mismatches
    wanted = f"data.format: pictures has no rows for objective.name: {name}, which takes text alone. Set it to "
    assert sum(one.startswith(wanted) for one in said) == 1, said


def test_plan_counts_the_pass_through_the_reference() -> None:
    sft, dpo, orpo = (planned(f"objective.name={name}") for name in ("sft", "dpo", "orpo"))
    assert orpo.traffic_per_step == sft.traffic_per_step
    assert dpo.traffic_per_step.base_gathers * 2 == sft.traffic_per_step.base_gathers * 3
    assert dpo.traffic_per_step.adapter_gathers == sft.traffic_per_step.adapter_gathers
    assert (sft.batch.reference_time_percent, dpo.batch.reference_time_percent) == (0, 33)
    slower = planned("objective.name=dpo", "train.activation_checkpointing=false")
    assert slower.batch.reference_time_percent == 50
    stored = planned("objective.name=dpo", "objective.reference=stored")
    assert stored.traffic_per_step == sft.traffic_per_step
    assert (stored.batch.reference_time_percent, stored.batch.stored_reference_percent) == (0, 33)
    assert sft.batch.stored_reference_percent == dpo.batch.stored_reference_percent == 0
    full = planned("objective.name=dpo", "tuning.method=full", "quant.type=none")
    assert (full.mismatches, full.batch.reference_time_percent, full.batch.stored_reference_percent) == ([], 0, 25)
    assert planned("objective.name=dpo", "data.format=chat").mismatches == [
        "data.format: chat has no rows for objective.name: dpo. Set it to preference or preference_pictures, or choose"
        " another objective."
    ]
