"""Answers are sampled while a run learns, by its ranks or by servers; whatever is killed, each is trained on once, with the same losses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.view.status import read_generation
from tests.cli.test_vllm import TARGETS, VLLM, vllm
from tests.dist import rollouts
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from tests.needs import need
from tests.rollout_kills import begin, config_of, fed, kill, place_of, train
from tests.unit.test_served import stub
from trainer.data.dataset.rollouts import is_committed, read_figures
from trainer.run import layout
from trainer.store.store import Store

STEPS = 10
TEN = f"train.steps={STEPS}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("rollouts"))


def gradients(run: Store) -> list[float]:
    """The norm of the gradient of each step."""
    return [record["grad_norm"] for record in read_generation(run, 1)["step"]]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_reward_rises_by_what_the_ranks_sample_and_a_kill_changes_nothing(workshop: Workshop) -> None:
    config = config_of(workshop, "own", TEN)
    found, run = train(workshop, config), workshop.store.sub("own")
    place = place_of(workshop, config)
    figures = [read_figures(place, step) for step in range(STEPS)]
    rewards = [figure["reward"] for figure in figures]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert {figure["adapter"] - step for step, figure in enumerate(figures)} == {0}
    records = map(json.loads, run.get(layout.metrics(1)).splitlines())
    assert all(abs(record["ratio"] - 1) < 1e-3 for record in records if record["kind"] == "step")

    again = config_of(workshop, "killed", TEN)
    killed, given = begin(workshop, again)
    place = place_of(workshop, again)
    with running(1, *given) as group:
        group.wait_until(lambda: is_committed(place, 5))
        group.kill()
    assert launch(1, *given)[0]["outcome"] == "finished"
    assert losses(killed) == found
    # The losses are sums of advantages that cancel, so the gradients tell more.
    assert fed(workshop, run, "two", TEN, world_size=2) == pytest.approx(found, abs=2e-5)
    assert gradients(workshop.store.sub("two")) == pytest.approx(gradients(run), rel=1e-3)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_a_teacher_holds_likely_becomes_so(workshop: Workshop) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(workshop.base)

    def judge(body: dict[str, Any]) -> Any:
        if "max_tokens" not in body:
            return {"tokens": tokenizer.encode(body["prompt"], add_special_tokens=False)}
        likely = [" " <= tokenizer.decode([token]) <= "~" for token in body["prompt"]]
        places = [
            {str(token): {"logprob": -4.6 if one else -9.0}} for token, one in zip(body["prompt"], likely, strict=True)
        ]
        return {"choices": [{"prompt_logprobs": places, "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]}

    with stub(judge, "big") as url:
        config = config_of(workshop, "opd", TEN, f"objective={{name: opd, teacher: '{url}#big'}}")
        train(workshop, config)
    figures = [read_figures(place_of(workshop, config), step) for step in range(STEPS)]
    divergences, rewards = ([figure[name] for figure in figures] for name in ("divergence", "reward"))
    assert sum(divergences[-3:]) < sum(divergences[:3]) - 1.0, divergences
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_whatever_is_killed_each_chapter_is_trained_on_once(tmp_path: Path) -> None:
    assert kill(tmp_path, seed=5, kills=4) == []


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
