"""Answers are sampled while a run learns, by its ranks or by servers; whatever is killed, each is trained on once, with the same losses."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.view.status import read_generation
from tests.cli.test_vllm import TARGETS, VLLM, vllm
from tests.dist import rollouts, runs
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from tests.needs import need
from tests.unit.test_served import stub
from trainer.config import Config, dump_config
from trainer.data.dataset.rollouts import is_committed, read_figures
from trainer.evaluate.rollout.making import rollouts_of
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.store.store import Store

STEPS = 10


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("rollouts"))


def config_of(workshop: Workshop, name: str, *overrides: str) -> Config:
    return workshop.config(
        name,
        *(
            "objective.name=grpo",
            "rollout.reward=tests.dist.rewards:printable",
            "rollout.answers=8",
            "rollout.max_tokens=1",
        ),
        *("quant.type=none", "model.dtype=fp32", "optim.lr=5.0e-2", "optim.schedule=constant", "optim.warmup_steps=0"),
        *(f"train.steps={STEPS}", "train.global_batch=8", "checkpoint.every_steps=3"),
        *overrides,
    )


def place_of(workshop: Workshop, config: Config) -> Store:
    """The folder of the run's answers."""
    key = workshop.prepare(config).train
    return rollouts_of(resolve(config), workshop.store.sub(config.run.name), key)


def begin(workshop: Workshop, config: Config) -> tuple[Store, tuple[Any, ...]]:
    """The folder of a new run, and the arguments of its ranks."""
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    return run, (runs.run, dump_config(config), workshop.prepare(config).train)


def train(workshop: Workshop, config: Config, world_size: int = 1) -> dict[int, float]:
    run, given = begin(workshop, config)
    outcomes = launch(world_size, *given)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


def gradients(run: Store) -> list[float]:
    """The norm of the gradient of each step."""
    return [record["grad_norm"] for record in read_generation(run, 1)["step"]]


def fed(workshop: Workshop, source: Store, name: str, *overrides: str, world_size: int = 1) -> dict[int, float]:
    """The losses of a run that finds the chapters of another one."""
    config = config_of(workshop, name, *overrides)
    run = workshop.store.sub(name)
    for entry in source.list("rollouts/"):
        run.put(entry.key, source.get(entry.key))
    return train(workshop, config, world_size)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_reward_rises_by_what_the_ranks_sample_and_a_kill_changes_nothing(workshop: Workshop) -> None:
    config = config_of(workshop, "own")
    found, run = train(workshop, config), workshop.store.sub("own")
    place = place_of(workshop, config)
    figures = [read_figures(place, step) for step in range(STEPS)]
    rewards = [figure["reward"] for figure in figures]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert {figure["adapter"] - step for step, figure in enumerate(figures)} == {0}
    records = map(json.loads, run.get(layout.metrics(1)).splitlines())
    assert all(abs(record["ratio"] - 1) < 1e-3 for record in records if record["kind"] == "step")

    again = config_of(workshop, "killed")
    killed, given = begin(workshop, again)
    place = place_of(workshop, again)
    with running(1, *given) as group:
        group.wait_until(lambda: is_committed(place, 5))
        group.kill()
    assert launch(1, *given)[0]["outcome"] == "finished"
    assert losses(killed) == found
    # The losses are sums of advantages that cancel, so the gradients tell more.
    assert fed(workshop, run, "two", world_size=2) == pytest.approx(found, abs=2e-5)
    assert gradients(workshop.store.sub("two")) == pytest.approx(gradients(run), rel=1e-3)


def answers(body: dict[str, Any]) -> Any:
    """As a vLLM does, whose model says anything, by the seed, and now and then fails."""
    if "lora_name" in body:
        return b"done"
    draw = random.Random(body["seed"])
    if random.random() < 0.02:
        return 500
    texts = [[draw.randrange(3, 259) for _ in range(body["max_tokens"])] for _ in range(body["n"])]
    return {
        "choices": [
            {"token_ids": text, "logprobs": {"token_logprobs": [-5.5 - draw.random() for _ in text]}} for text in texts
        ]
    }


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_whatever_is_killed_each_chapter_is_trained_on_once(workshop: Workshop) -> None:
    draw = random.Random(5)
    with stub(answers, "base") as url:
        config = config_of(workshop, "served", f"rollout.engine=[{url}]", "rollout.max_lag=1")
        run, given = begin(workshop, config)
        place = place_of(workshop, config)
        beside = (rollouts.sample, run.uri)
        for kill in range(4):
            with running(1, *given) as trainer, running(1, *beside), running(1, *beside):
                step = 1 + 2 * kill
                trainer.wait_until(lambda step=step: is_committed(place, step))
                time.sleep(draw.random())
        with running(1, *given) as trainer, running(1, *beside) as sampler:
            assert trainer.wait()[0]["outcome"] == "finished"
            assert sampler.wait()[0]["outcome"] == "finished"
    figures = [read_figures(place, step) for step in range(STEPS)]
    assert all(0 <= step - figure["adapter"] <= 1 for step, figure in enumerate(figures))
    names = {entry.key.split("/")[1] for entry in place.list("data/") if entry.key.endswith("manifest.json")}
    assert names == {layout.chapter_of_rollouts(step) for step in range(STEPS)}
    assert losses(run) == fed(workshop, run, "fed")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_real_server_samples_what_the_trainer_computes(tmp_path: Path) -> None:
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop = Workshop(tmp_path, hidden_size=128)  # vLLM wants heads of 32
    with vllm(workshop.base, tmp_path / "vllm.log") as url:
        targets = f"tuning.targets=[{', '.join(TARGETS)}]"
        config = config_of(workshop, "real", f"rollout.engine=[{url}]", "rollout.max_lag=0", "train.steps=4", targets)
        run, given = begin(workshop, config)
        with running(1, *given, timeout=900) as trainer, running(1, rollouts.sample, run.uri, timeout=900) as sampler:
            assert trainer.wait()[0]["outcome"] == "finished"
            assert sampler.wait()[0]["outcome"] == "finished"
    records = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["lag"] for record in steps] == [0] * 4
    # Also of the later ones, whose adapter is no longer nothing.
    assert all(record["log_ratio"] < 1e-4 and abs(record["ratio"] - 1) < 1e-3 for record in steps), steps
