"""Ranks that share a row compute the loss and the gradients of one rank that has it whole, over the same data in the
same order.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.dist import gradients, runs, shared_rows
from tests.dist.launch import launch, running
from tests.dist.test_gradients import distance
from tests.dist.test_resume import losses
from tests.material import Workshop, make_classified, make_labelled, make_pairs, make_tagged
from tests.methods import trained_by
from trainer.base.find.locate import describe_base
from trainer.config import dump_config
from trainer.plan.plan import make_plan
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.tuning.method import methods

TOLERANCE = 1e-5
PAIRS = ("objective.name=dpo", "data.format=preference")
BASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "one key head": ("llama", {"num_key_value_heads": 1}, ()),
    "as many key heads": ("llama", {"num_key_value_heads": 4}, ()),
    "three key heads": ("llama", {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 3}, ()),
    "windows and caps": ("gemma2", {}, ()),
    "windows and sinks": ("gpt-oss", {}, ()),
    "latent": ("deepseek-v3", {}, ()),
    "experts": ("mixtral", {}, ("tuning.experts=true",)),
    "shared keys": ("gemma4", {}, ()),
    "delta rule": ("qwen3-next", {}, ()),
    "state space": ("nemotron-h", {}, ()),
    "state space and attention": ("granitemoe-hybrid", {"num_attention_heads": 4}, ()),
    "computed whole": ("llama4", {}, ()),
}
OF_FOUR = ("delta rule", "state space")
QUICK = ("state space and attention", "computed whole")


def first_step(workshop: Workshop, folder: Path, ranks: int, shared: int, *settings: str) -> tuple[dict[str, Any], Any]:
    """The record of the first step and its gradients, on so many ranks of which `shared` share each row."""
    more = ("model.dtype=fp32", f"sharding.sequence_parallel={shared}", *settings)
    if PAIRS[1] in settings:
        more = (*more, f"data.train=[{{path: {make_pairs(folder / 'pairs.jsonl')}}}]")
    config, file = workshop.config(f"shared-{ranks}-{shared}", *more), folder / f"{ranks}-{shared}.safetensors"
    record = launch(ranks, gradients.first_step, dump_config(config), workshop.prepare(config).train, str(file))[0]
    return record, load_file(file)


def assert_same(found: tuple[dict[str, Any], Any], expected: tuple[dict[str, Any], Any]) -> None:
    assert found[0]["targets"] == expected[0]["targets"]
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=TOLERANCE)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=TOLERANCE)
    assert distance(found[1], expected[1]) < TOLERANCE


def test_two_ranks_that_share_packed_rows_have_the_loss_and_the_gradients_of_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    shared, alone = (first_step(workshop, tmp_path, ranks, ranks) for ranks in (2, 1))
    assert_same(shared, alone)
    assert shared[0]["accumulation"] == alone[0]["accumulation"] == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "shared", "settings"),
    [
        (4, 2, ()),
        (4, 4, ()),
        (2, 2, ("data.packing=false",)),
        (2, 2, ("train.activation_checkpointing=all",)),
        (2, 2, ("train.activation_checkpointing=none", "train.micro_batch=2")),
        (2, 2, ("model.attention=eager",)),
        (2, 2, PAIRS),
        (4, 2, (*PAIRS, "objective.name=orpo")),
    ],
    ids=str,
)
def test_so_have_others(workshop: Workshop, tmp_path: Path, ranks: int, shared: int, settings: tuple[str, ...]) -> None:
    assert_same(
        first_step(workshop, tmp_path, ranks, shared, *settings), first_step(workshop, tmp_path, 1, 1, *settings)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in BASES]
)
def test_so_have_they_over_other_bases(tmp_path: Path, name: str) -> None:
    kind, sizes, settings = BASES[name]
    workshop = Workshop(tmp_path, kind, **sizes)
    alone, *shared = (
        first_step(workshop, tmp_path, ranks, ranks, *settings) for ranks in ((1, 2, 4) if name in OF_FOUR else (1, 2))
    )
    for found in shared:
        assert_same(found, alone)


@pytest.mark.long
def test_so_have_two_whatever_learns(workshop: Workshop, tmp_path: Path) -> None:
    ways: dict[str, tuple[str, ...]] = {
        **{method: trained_by(method) for method in methods()},
        "some": ("tuning={method: full, train: ['model.layers.1.*']}", "quant.type=none"),
        "tokens": ("model.add_tokens=[he, ant]",),
        "modules": ("tuning.modules_to_save=[embed_tokens, lm_head]",),
    }
    assert_alike(workshop, tmp_path, ways)


def assert_alike(workshop: Workshop, folder: Path, ways: Mapping[str, tuple[str, ...]]) -> None:
    """One and two ranks that share rows have the same loss and gradients, with each of these settings."""
    steps = dict[int, list[float]]()
    for ranks in (1, 2):
        loads = list[tuple[str, str, str]]()
        for name, settings in ways.items():
            shared = (f"sharding.sequence_parallel={ranks}", "model.dtype=fp32", "train.global_batch=2")
            config = workshop.config(f"{name}-{ranks}", *shared, *settings)
            data = workshop.prepare(config).train
            loads.append((dump_config(config), data, str(folder / f"{name}-{ranks}.safetensors")))
        steps[ranks] = launch(ranks, gradients.first_steps, loads, timeout=600.0)[0]
    assert steps[2] == pytest.approx(steps[1], rel=TOLERANCE)
    for name in ways:
        alone, shared = (load_file(folder / f"{name}-{ranks}.safetensors") for ranks in (1, 2))
        assert distance(shared, alone) < TOLERANCE, name


@pytest.mark.long
def test_so_have_two_with_objectives_that_look_at_parts_of_a_row_or_at_single_tokens(
    workshop: Workshop, tmp_path: Path
) -> None:
    made = {"labelled": make_labelled, "preference": make_pairs, "classified": make_classified, "tagged": make_tagged}
    files = {form: make(tmp_path / f"{form}.jsonl") for form, make in made.items()}
    flags = (
        {"text": json.loads(line)["text"], "labels": ["a", "b"][: number % 3]}
        for number, line in enumerate(files["classified"].read_text().splitlines())
    )
    (tmp_path / "flags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flags))
    of: dict[str, tuple[str, ...]] = {
        "kto": ("labelled", "train.global_batch=4"),
        "kto-prefix": ("labelled", "objective.name=kto", "data.share_prefix=true", "train.micro_batch=2"),
        "reward": ("preference", "data.sequence_length=96"),
        "classification": ("classified", "data.labels=[bad, good, so-so]"),
        "token_classification": ("tagged", "data.labels=[B, O]", "data.format=auto"),
        "multilabel_classification": ("flags", "data.labels=[a, b]", "data.format=auto"),
    }
    ways = {
        name: (
            f"objective.name={name}",
            f"data.format={form}",
            f"data.train=[{{path: {tmp_path / form}.jsonl}}]",
            *settings,
        )
        for name, (form, *settings) in of.items()
    }
    assert_alike(workshop, tmp_path, ways)


@pytest.mark.long
def test_a_run_whose_rows_two_ranks_shared_goes_on_with_four_and_with_one_and_evaluates_alike(
    workshop: Workshop,
) -> None:
    settings = ("model.dtype=fp32", "data.held_out=0.2", "eval.every=5")

    def arguments(name: str, shared: int, *more: str) -> tuple[list[str], str | None]:
        config = workshop.config(name, *settings, f"sharding.sequence_parallel={shared}", *more)
        data = workshop.prepare(config)
        return [dump_config(config), data.train], data.eval

    def train(name: str, how: str) -> dict[int, float]:
        given, held_out = arguments(name, 1)
        assert {one["outcome"] for one in launch(1, runs.run, *given, how, held_out)} == {"finished"}
        return losses(workshop.store.sub(name))

    folder = workshop.store.sub("passed-on")
    for ranks, how, step in ((2, "hold", 5), (4, "resume_hold", 8)):
        given, held_out = arguments("passed-on", ranks, f"checkpoint.every_steps={5 if step == 5 else 4}")
        with running(ranks, runs.run, *given, how, held_out) as group:
            group.wait_until(lambda: folder.exists(layout.manifest(step)))  # noqa: B023
            group.kill()
    assert train("passed-on", "resume") == pytest.approx(train("whole", "start"), rel=TOLERANCE)
    expected = read_manifest(workshop.store.sub("whole"), 10).eval_loss
    assert read_manifest(folder, 10).eval_loss == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "recomputed"), [(2, "all"), (4, "none")])
def test_a_rank_receives_what_the_plan_says(workshop: Workshop, ranks: int, recomputed: str) -> None:
    settings = (f"train.activation_checkpointing={recomputed}", f"sharding.sequence_parallel={ranks}")
    config = workshop.config(f"exchanged-{ranks}", *settings)
    received = launch(ranks, shared_rows.exchanged, dump_config(config), workshop.prepare(config).train)
    plan = make_plan(config, describe_base(config.model), ranks, ranks, None)
    assert received == [plan.traffic_per_step.row_exchanges] * ranks


@pytest.mark.long
def test_a_reference_is_stored_and_an_evaluation_of_pairs_is_that_of_whole_rows(
    workshop: Workshop, tmp_path: Path
) -> None:
    pairs = f"data.train=[{{path: {make_pairs(tmp_path / 'pairs.jsonl')}}}]"
    more = ("model.dtype=fp32", "objective.reference=stored", "data.held_out=0.3", "eval.every=1", "train.steps=3")
    found = {}
    for ranks in (1, 2):
        config = workshop.config(f"stored-{ranks}", *PAIRS, pairs, *more, f"sharding.sequence_parallel={ranks}")
        data = workshop.prepare(config)
        ends = launch(ranks, runs.run, dump_config(config), data.train, "start", data.eval)
        assert {end["outcome"] for end in ends} == {"finished"}, ends
        run = workshop.store.sub(f"stored-{ranks}")
        found[ranks] = losses(run), read_manifest(run, 3).eval_loss
    assert found[2][0] == pytest.approx(found[1][0], rel=TOLERANCE)
    assert found[2][1] == pytest.approx(found[1][1], rel=TOLERANCE)
